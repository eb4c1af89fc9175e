"""References to values on other workers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from distgrad import _codec
from distgrad._core import Tensor
from distgrad.errors import (
    DistgradError,
    OwnerLostError,
    ProtocolError,
    RpcTimeoutError,
    SerializationError,
    WorkerLostError,
)
from distgrad.message import RRefBackward, RRefCall, RRefFetch
from distgrad.rpc import UNSET_RPC_TIMEOUT, Future, WorkerInfo, current_worker
from distgrad.rpc.activity import activity
from distgrad.rpc.calls import allowed_timeout
from distgrad.rpc.future import DONE, FAILED
from distgrad.rpc.payload import Session
from distgrad.rref.protocol import Fork, ForkState
from distgrad.rref.table import Cell, RRefTable

__all__ = ["RRef", "run_backward"]


class RRef:
    """A reference to a value that lives on one worker, its owner.

    References travel as arguments and results, also inside containers. The owner keeps
    the value while any worker holds a reference. Copies of a reference object are the
    same reference.

    Parameters
    ----------
    value
        The value; this worker becomes its owner.
    type_hint
        Accepted for programs written for torch, and ignored: methods are looked up at
        the owner.
    """

    __slots__ = ("__weakref__", "_cell", "_fork", "_table")

    _table: RRefTable
    _cell: Cell | None
    _fork: Fork | None

    def __init__(self, value: Any, type_hint: Any = None) -> None:
        self._table = current_worker().extensions["rref"]
        self._fork = None
        self._cell = self._table.keep(value)

    @classmethod
    def _of(cls, table: RRefTable, target: Fork | Cell) -> RRef:
        rref = cls.__new__(cls)
        rref._table = table
        rref._fork = target if isinstance(target, Fork) else None
        rref._cell = target if isinstance(target, Cell) else None
        return rref

    def __del__(self) -> None:
        if (fork := getattr(self, "_fork", None)) is not None:
            self._table.drop(fork)

    # --- about it ----------------------------------------------------------------------

    def is_owner(self) -> bool:
        """Return whether the value lives on this worker."""
        return self._cell is not None

    def confirmed_by_owner(self) -> bool:
        """Return whether the owner counts this reference."""
        return self._fork is None or self._fork.state is ForkState.CONFIRMED

    def owner(self) -> WorkerInfo:
        """Return name and id of the owner."""
        worker = self._table.worker
        return worker.infos[worker.id if self._fork is None else self._fork.owner]

    def owner_name(self) -> str:
        """Return the name of the owner."""
        return self.owner().name

    # --- its value ---------------------------------------------------------------------

    def to_here(self, timeout: float = UNSET_RPC_TIMEOUT) -> Any:
        """Return the value: itself on the owner, a copy anywhere else.

        Waits until the function that makes it has returned.

        Parameters
        ----------
        timeout
            Seconds to wait; 0 for no limit. By default the worker's ``rpc_timeout``.

        Raises
        ------
        Exception
            What that function raised.
        OwnerLostError
            If the owner is gone, and the value with it.
        RpcTimeoutError
            If the value does not come in time, or `distgrad.rpc.remote` was not
            acknowledged in time.
        """
        if self._cell is not None:
            seconds = allowed_timeout(self._table.worker, timeout, "RRef.to_here")
            return self._cell.value.wait(seconds or None)
        return self._wait(self._request(RRefFetch(self._id), timeout, "fetch", _chain()))

    def local_value(self) -> Any:
        """Return the value itself; only on the owner.

        Waits until the function that makes it has returned.

        Raises
        ------
        DistgradError
            If this worker is not the owner.
        Exception
            What that function raised.
        """
        if self._cell is None:
            raise DistgradError(
                f"cannot get the local value of {self}: worker {self._table.worker.name!r} is "
                f"not its owner, {self.owner_name()!r} is",
                hint="use to_here() for a copy, or a proxy such as rpc_sync() for a call",
            )
        return self._cell.value.wait()

    def __await__(self) -> Generator[Any, None, Any]:
        if self._cell is not None:
            local: Generator[Any, None, Any] = self._cell.value.__await__()
            return local
        answer = self._request(RRefFetch(self._id), UNSET_RPC_TIMEOUT, "fetch")
        fetched: Generator[Any, None, Any] = self._followed(answer).__await__()
        return fetched

    # --- calls of its methods ------------------------------------------------------------

    def rpc_sync(self, timeout: float = UNSET_RPC_TIMEOUT) -> Proxy:
        """Return a proxy whose methods run on the value and return their results.

        One round trip a call. The class of the value must be exposed at the owner.
        """
        return Proxy(lambda call: self._wait(self._request(call, timeout, "call", _chain())), self)

    def rpc_async(self, timeout: float = UNSET_RPC_TIMEOUT) -> Proxy:
        """Return a proxy whose methods run on the value and return futures."""
        return Proxy(lambda call: self._followed(self._request(call, timeout, "call")), self)

    def remote(self, timeout: float = UNSET_RPC_TIMEOUT) -> Proxy:
        """Return a proxy whose methods run on the value and return new RRefs."""
        from distgrad.rref.remote import call_method, remote

        def invoke(call: RRefCall) -> RRef:
            args = (self, call.method, call.args, call.kwargs)
            self._check("call")
            try:
                return remote(self.owner(), call_method, args, timeout=timeout)
            except WorkerLostError as error:
                raise self._owner_lost("call") from error

        return Proxy(invoke, self)

    def backward(self, dist_autograd_ctx_id: int = -1, retain_graph: bool = False) -> None:
        """Run a backward pass with the value as its root; the owner becomes the root worker.

        Parameters
        ----------
        dist_autograd_ctx_id
            The context; -1 runs a local pass into ``.grad``, on the owner only.
        retain_graph
            Keep the graph for another pass.
        """
        if self._cell is not None:
            run_backward(self, self.local_value(), dist_autograd_ctx_id, retain_graph)
            return
        if dist_autograd_ctx_id == -1:
            raise DistgradError(
                f"cannot run backward from {self}: a local pass runs on the owner only",
                hint="pass dist_autograd_ctx_id, the id of a distgrad.autograd.context()",
            )
        body = RRefBackward(self._id, int(dist_autograd_ctx_id), bool(retain_graph))
        try:
            self._wait(self._request(body, UNSET_RPC_TIMEOUT, "run backward from", _chain()))
        except RpcTimeoutError as error:
            autograd = self._table.worker.extensions["autograd"]
            error.detail = autograd.report(dist_autograd_ctx_id)
            raise

    # --- messages ------------------------------------------------------------------------

    @property
    def _id(self) -> int:
        target = self._fork or self._cell
        assert target is not None
        return target.rref_id

    def _request(self, body: Any, timeout: float, verb: str, chain: int = 0) -> Future:
        self._check(verb)
        worker = self._table.worker
        what = f"{verb} RRef {self._id:#x}"
        seconds = allowed_timeout(worker, timeout, what)
        if self._fork is None:
            return self._request_here(body, seconds, what, chain)
        try:
            return worker.request(self._fork.owner, body, timeout=seconds, chain=chain, what=what)
        except WorkerLostError as error:
            raise self._owner_lost(verb) from error

    def _request_here(self, body: Any, seconds: float, what: str, chain: int) -> Future:
        """Send a message to the own worker, which counts the value until it is answered."""
        assert self._cell is not None
        worker = self._table.worker
        _, release = self._table.share(self._cell, worker.id)
        try:
            answer = worker.request(worker.id, body, timeout=seconds, chain=chain, what=what)
        except BaseException:
            release()
            raise
        answer.add_done_callback(lambda _: release(), inline=True)
        return answer

    def _wait(self, answer: Future) -> Any:
        try:
            return answer.wait()
        except WorkerLostError as error:
            if hasattr(error, "workers"):  # raised over there
                raise
            raise self._owner_lost("use") from error

    def _followed(self, answer: Future) -> Future:
        """Return a future like ``answer`` that knows of lost owners, and keeps the RRef."""
        followed = Future(chain=answer.chain, agent=self._table.worker.agent)

        def complete(answer: Future) -> None:
            try:
                value = self._wait(answer)
            except BaseException as error:
                followed._try_complete(FAILED, error)
            else:
                followed._try_complete(DONE, value)

        answer.add_done_callback(complete, inline=True)
        return followed

    def _check(self, verb: str) -> None:
        """Raise what is known to be wrong with this reference."""
        fork = self._fork
        if fork is None or fork.state in (ForkState.CONFIRMED, ForkState.PENDING):
            return
        if fork.state is ForkState.OWNER_LOST:
            raise self._owner_lost(verb)
        if fork.state is ForkState.TIMED_OUT:
            raise RpcTimeoutError(
                f"cannot {verb} {self}: its creation was not acknowledged in time, "
                f"so it may not exist on worker {self.owner_name()!r}",
                hint="pass a longer timeout to remote()",
            ) from fork.cause
        if fork.cause is not None:
            raise fork.cause
        raise WorkerLostError(
            f"cannot {verb} {self}: worker {self._name_of(fork.parent)!r}, which passed it on, "
            "was lost before the owner knew of this reference"
        )

    def _owner_lost(self, verb: str) -> OwnerLostError:
        return OwnerLostError(f"cannot {verb} {self}: its owner {self.owner_name()!r} is lost")

    def _name_of(self, worker_id: int) -> str:
        return self._table.worker.infos[worker_id].name

    # --- copies and text -------------------------------------------------------------------

    def __copy__(self) -> RRef:
        return self

    def __deepcopy__(self, memo: Any) -> RRef:
        return self

    def __reduce__(self) -> Any:
        raise SerializationError(
            f"cannot pickle {self}: references travel in calls and their results only"
        )

    def __str__(self) -> str:
        if self._fork is None:
            return f"OwnerRRef({_text(self._id)})"
        return f"UserRRef(RRefId = {_text(self._id)}, ForkId = {_text(self._fork.fork_id)})"

    __repr__ = __str__


class Proxy:
    """The methods of a remote value: each attribute is a callable that runs there."""

    __slots__ = ("_invoke", "_rref")

    def __init__(self, invoke: Callable[[RRefCall], Any], rref: RRef) -> None:
        self._invoke = invoke
        self._rref = rref

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(f"cannot call {method} through a proxy of {self._rref}")

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._invoke(RRefCall(self._rref._id, method, args, kwargs or None))

        return call


def run_backward(rref: RRef | int, value: Any, context_id: int, retain_graph: bool) -> None:
    """Run a backward pass on the owner, with the value of an RRef as its root."""
    if not isinstance(value, Tensor):
        raise DistgradError(
            f"cannot run backward from {rref}: its value is {type(value).__name__}, not a Tensor"
        )
    if context_id == -1:
        value.backward(retain_graph=retain_graph)
    else:
        autograd = current_worker().extensions["autograd"]
        autograd.backward(context_id, [value], retain_graph)


def _chain() -> int:
    now = activity.get(None)
    return 0 if now is None else now.chain


def _text(identifier: int) -> str:
    created_on, local_id = identifier >> 48, identifier & (1 << 48) - 1
    return f"GloballyUniqueId(created_on={created_on}, local_id={local_id})"


# --- in messages: (owner, RRef id, fork id, parent) ------------------------------------------


def _encode(rref: RRef, session: Session | None) -> tuple[int, int, int, int]:
    table = rref._table
    if session is None or session.worker is not table.worker:
        raise SerializationError(
            f"cannot send {rref}: it belongs to worker {table.worker.name!r}, "
            "and travels in its calls and results only"
        )
    rref._check("send")
    if rref._cell is not None:
        fork_id, undo = table.share(rref._cell, session.peer_id)
    else:
        assert rref._fork is not None
        fork_id, undo = table.pass_on(rref._fork, session.peer_id)
    if session.undo is None:
        session.undo = []
    session.undo.append(undo)  # of perhaps 10^5 references in one message
    return rref.owner().id, rref._id, fork_id, table.worker.id


def _decode(value: Any, session: Session | None) -> RRef:
    if session is None or type(value) is not tuple or [type(v) for v in value] != [int] * 4:
        raise ProtocolError(f"cannot read an RRef: {value!r} is no description of one")
    owner, _, _, parent = value
    if max(owner, parent) >= len(session.worker.infos) or min(value) < 0:
        raise ProtocolError(f"cannot read an RRef: {value!r} names no worker of this world")
    table: RRefTable = session.worker.extensions["rref"]
    target, gate = table.receive(*value)
    if gate is not None:
        if session.awaited is None:
            session.awaited = []
        session.awaited.append(gate)
    return RRef._of(table, target)


_codec.register_type(RRef, "distgrad.RRef", _encode, _decode)
