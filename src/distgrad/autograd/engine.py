# cython: annotation_typing=False
"""Distributed autograd on one worker: its contexts, and the passes that run through them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import ref

from distgrad._core import GraphTask, Tensor
from distgrad.autograd._lock import Lock
from distgrad.autograd.context import ContextPart, DistAutogradContext
from distgrad.autograd.functions import RecvRpcBackward
from distgrad.autograd.part import Part, Run
from distgrad.autograd.roots import failure, seeds
from distgrad.autograd.terms import COMPLETE, INTO_GRAD, LATE, RETAIN, Message, made, worker_of
from distgrad.autograd.tombstones import Tombstones
from distgrad.autograd.waiting import why_waiting
from distgrad.errors import ContextError, RpcTimeoutError, TransportError
from distgrad.message import (
    KINDS,
    CleanupContext,
    JoinContext,
    PassAbort,
    PassBegin,
    PassComplete,
    PassEnd,
    PropagateGradients,
)
from distgrad.rpc import Future, Worker, deadline
from distgrad.rpc.failures import describe

if TYPE_CHECKING:
    from distgrad._codec import Frame

__all__ = ["Engine"]

#: How long a pass whose time is up asks the others what they wait for.
_REPORT_S = 0.5

_PASS_MESSAGES: tuple[Any, ...] = (
    PropagateGradients,
    PassBegin,
    PassComplete,
    PassEnd,
    PassAbort,
)
_CLEANUP = CleanupContext()


class Engine:
    """The contexts and passes of one worker; its ``extensions["autograd"]``.

    All methods may be called from any thread.

    Parameters
    ----------
    worker
        The worker.

    Attributes
    ----------
    parts
        Contexts that are not released, by id.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._agent = worker.agent
        self.worker_id = worker.id
        self.lost: Collection[int] = worker.agent.links.lost
        self.parts: dict[int, ContextPart] = {}
        self._released = Tombstones()
        self._lock = Lock()
        first = (worker.id << 48) + 1
        self._context_ids = itertools.count(first)
        self._pass_ids = itertools.count(first)
        self.message_ids = itertools.count(first)
        self._newest = first - 1
        for kind in _PASS_MESSAGES:
            worker.register(kind, self._on_pass_message, inline=True)
        worker.register(CleanupContext, self._on_cleanup, inline=True)
        worker.register(JoinContext, self._on_join, inline=True)
        worker.on_lost.append(self._on_lost)
        worker.on_close.append(self._on_close)

    # --- contexts ------------------------------------------------------------------------

    def new_context(self) -> DistAutogradContext:
        """Return a context that this worker creates when it is entered."""
        self._newest = next(self._context_ids)
        return DistAutogradContext(ContextPart(self, self._newest))

    def open(self, part: ContextPart) -> None:
        """Make a context of this worker known; it is entered for the first time."""
        if part.released or part.context_id in self.parts:
            state = "finished" if part.released else "open"
            raise ContextError(
                f"cannot enter autograd context {part.context_id}: it is {state} already",
                hint="call context() for a new one, or use() to make it current in a thread",
            )
        self.parts[part.context_id] = part

    def part(self, context_id: int) -> ContextPart | None:
        """Return this worker's part of a context, made on first sight; None if released."""
        part = self.parts.get(context_id)
        return part if part is not None else self._meet(context_id)

    def _meet(self, context_id: int) -> ContextPart | None:
        creator = worker_of(context_id)
        if creator == self.worker_id or creator in self.lost or context_id in self._released:
            return None
        self._lock.acquire()
        try:
            part = self.parts.get(context_id)
            if part is None and context_id not in self._released:
                part = self.parts[context_id] = ContextPart(self, context_id)
        finally:
            self._lock.release()
        if self.lost or self._released.doubtful(context_id):
            self._rejoin(context_id)
        return part

    def existing(self, context_id: int) -> ContextPart:
        """Return this worker's part of a context.

        Raises
        ------
        ContextError
            If the context is finished or was never known here.
        """
        part = self.parts.get(context_id)
        if part is None:
            raise self.missing(context_id)
        return part

    def refuse_orphan(self, context_id: int) -> None:
        """Raise if a context is finished here only because its creator is lost to this worker.

        Others may still use it. What they got without a history would be a leaf to them, and the
        gradient that belongs here would be missing from a pass that succeeds.
        """
        creator = worker_of(context_id)
        if creator in self.lost:
            raise ContextError(
                f"cannot record calls in autograd context {context_id} on worker "
                f"{self.worker.name!r}: its creator, worker "
                f"{self.worker.world.name_of(creator)!r}, is lost"
            )

    def missing(self, context_id: int) -> ContextError:
        """Return the error that tells what became of a context."""
        name = self.worker.name
        if finished := self._finished(context_id):
            return ContextError(
                f"cannot find autograd context {context_id} on worker {name!r}: it {finished}",
                hint="use gradients before the `with context()` block ends",
            )
        return ContextError(
            f"cannot find autograd context {context_id}: worker {name!r} has not heard of it",
            hint="a worker learns of a context by the first call made to it inside",
        )

    def _finished(self, context_id: int) -> str:
        """Return when a context was finished here, as words for an error; "" if it is not."""
        at = self._released.when(context_id)
        own = worker_of(context_id) == self.worker_id and context_id <= self._newest
        if at is None and (context_id in self.parts or not own):
            return ""
        return "was finished" + ("" if at is None else f" {time.monotonic() - at:.3g} s ago")

    def foreign(self, part: Part, node: RecvRpcBackward) -> ContextError:
        """Return the error of a pass that leads to a tensor of another context."""
        return ContextError(
            f"cannot run the backward pass of autograd context {part.context_id} on worker "
            f"{self.worker.name!r}: it leads to a tensor that worker "
            f"{self.worker.world.name_of(node.peer)!r} sent in context {node.context_id}, "
            f"which {self._finished(node.context_id) or 'is another one'}",
            hint="receive and use a tensor in one context, or detach() it",
        )

    def release(
        self, context_id: int, sender: int = -1, error: BaseException | None = None
    ) -> None:
        """Finish a context here and tell those who learned of it from here.

        With an error because the creator is lost to this worker; the others ask for themselves.
        """
        self._lock.acquire()
        try:
            self._released.add(context_id)
            part = self.parts.pop(context_id, None)
        finally:
            self._lock.release()
        if part is None:
            return
        part.release(error)
        word = _CLEANUP if error is None else JoinContext()
        for peer in part.known:
            if peer != sender and peer != self.worker_id:
                self._post(peer, word, context_id)

    def leave(self, context_id: int) -> None:
        """Release a context as its block ends; after its last one a thread may wait no more."""
        self.release(context_id)
        self._agent.crew.step_aside()

    def _post(self, to: int, body: Any, context_id: int) -> None:
        """Tell a peer, if it is still there to be told."""
        try:
            self._agent.tell(to, body, context_id)
        except TransportError:
            return

    def _on_cleanup(self, worker: Worker, sender: int, frame: Frame, body: Any) -> None:
        if worker_of(frame.context_id) != self.worker_id:  # the creator knows best
            self.release(frame.context_id, sender)

    def _on_join(self, worker: Worker, sender: int, frame: Frame, body: Any) -> None:
        part = self.parts.get(frame.context_id)
        if worker_of(frame.context_id) != self.worker_id:  # the sender has lost the creator
            self._rejoin(frame.context_id)
        elif part is not None:
            part.known.add(sender)
        else:
            self._post(sender, _CLEANUP, frame.context_id)

    def _on_lost(self, peer: int, why: Exception) -> None:
        for part in list(self.parts.values()):
            part.lose(peer, why)
            self._rejoin(part.context_id)

    def _on_close(self) -> None:
        """Let go of the contexts of other workers: nobody can tell of their release any more."""
        for context_id in list(self.parts):
            if worker_of(context_id) != self.worker_id:
                self.parts.pop(context_id, None)

    def _rejoin(self, context_id: int) -> None:
        """Have the creator itself tell of the release: who would have told us may be lost.

        If the creator is lost to this worker, the context ends here, and those who would have
        been told from here ask the creator themselves: only their connection may be whole.
        """
        creator = worker_of(context_id)
        if creator == self.worker_id:
            return
        try:
            self.worker.post(creator, JoinContext(), context_id=context_id)
        except TransportError as error:
            self.release(context_id, error=error)

    # --- passes: what a part needs of its worker -----------------------------------------

    def post(self, part: Part, to: int, message: Message) -> None:
        """Send a message of a pass."""
        self._agent.tell(to, message, part.context_id)

    def schedule(self, part: Part, run: Run) -> None:
        """Have the events of a pass taken by the thread that waits for it, or another."""
        self._agent.submit(run, -run.pass_id)

    def build(self, part: Part, run: Run, sends: Collection[Any]) -> GraphTask:
        """Return the graph of a pass."""
        owner: Any = part
        return GraphTask(
            run.roots,
            sends=sends,
            retain_graph=bool(run.flags & RETAIN),
            table=None if run.flags & INTO_GRAD else owner.gradients,
        )

    def describe(self, pass_id: int, error: BaseException, node: str, site: str = "") -> PassAbort:
        """Return the message that tells of a failure on this worker."""
        return PassAbort(pass_id, node, site, tuple(describe(error, self.worker.name)))

    def _on_pass_message(self, worker: Worker, sender: int, frame: Frame, body: Any) -> None:
        message = made(KINDS[frame.kind], body)
        part = self.part(frame.context_id)
        if part is not None and part.receive(sender, message):
            return
        if not getattr(message, "flags", LATE) & LATE:  # it invites into the pass
            refusal = self.describe(message.pass_id, self.missing(frame.context_id), "")
            self._post(sender, refusal, frame.context_id)

    def backward(
        self,
        context_id: int,
        roots: Sequence[Tensor],
        retain_graph: bool = False,
        *,
        grads: Sequence[Any] | None = None,
        create_graph: bool = False,
        accumulate_into: str = "context",
        timeout: float | None = None,
    ) -> None:
        """Run a backward pass; see `distgrad.autograd.backward`."""
        part = self.existing(context_id)
        flags = _flags(retain_graph, create_graph, accumulate_into)
        starts = seeds(roots, grads)
        part.roots = [ref(root) for root in roots]
        patience = _patience(timeout)
        pass_id = next(self._pass_ids)
        outcome = Future(chain=-pass_id, agent=self._agent)
        until = None if patience is None else time.monotonic() + patience
        run = part.start(pass_id, flags, starts, outcome.set_result)
        if not outcome.done():
            _await(part, run, outcome, patience, until)
        cause = outcome.wait()
        if cause is not None:
            raise failure(cause, run.error if run.cause is cause else None)

    def timed_out(self, part: ContextPart, patience: float | None) -> RpcTimeoutError:
        """Return the error of a pass that takes too long: it says what everybody waits for."""
        return RpcTimeoutError(
            f"cannot finish the backward pass: it was not done within {patience:g} s",
            detail=self.report(part.context_id),
        )

    def report(self, context_id: int) -> str | None:
        """Return what a context waits for on all workers; None if it is not known here."""
        try:
            return why_waiting(self, context_id, _REPORT_S)
        except ContextError:  # finished meanwhile, which ends its passes too
            return None

    def debug_info(self) -> dict[str, int]:
        """Return counters for `rpc.debug_info`."""
        runs = [run for part in list(self.parts.values()) for run in part.table.passes.values()]
        return {
            "autograd.contexts": len(self.parts),
            "autograd.passes": sum(run.state is not COMPLETE for run in runs),
            "autograd.sends": sum(len(part.sends) for part in list(self.parts.values())),
            "autograd.recvs": sum(len(part.recvs) for part in list(self.parts.values())),
        }


def _flags(retain_graph: bool, create_graph: bool, accumulate_into: str) -> int:
    if create_graph:
        raise NotImplementedError(
            "cannot run a distributed backward pass with create_graph=True: passes across "
            "workers are not recorded yet; Tensor.backward and distgrad.grad are"
        )
    if accumulate_into not in ("context", "grad"):
        raise ValueError(
            f"cannot accumulate into {accumulate_into!r}: expected 'context' or 'grad'"
        )
    return (RETAIN if retain_graph else 0) | (INTO_GRAD if accumulate_into == "grad" else 0)


def _patience(timeout: float | None) -> float | None:
    """Return how long a pass may take: what is asked for, and within the call served here."""
    if timeout is not None and not isinstance(timeout, Real):
        raise TypeError(
            f"cannot run the backward pass with timeout={timeout!r}: expected seconds, 0 for none"
        )
    if timeout is not None and not timeout >= 0:
        raise ValueError(
            f"cannot run the backward pass with timeout={timeout!r}: expected 0 or more"
        )
    timeout = timeout or None
    by = deadline()
    if by is None:
        return timeout
    left = max(0.0, by - time.monotonic())
    return left if timeout is None else min(timeout, left)


def _await(
    part: ContextPart, run: Run, outcome: Future, patience: float | None, until: float | None
) -> None:
    try:
        outcome.wait(None if until is None else max(0.0, until - time.monotonic()))
    except RpcTimeoutError:
        part.fail(run, part.host.timed_out(part, patience))
    except BaseException as error:
        part.fail(run, error)
        raise
