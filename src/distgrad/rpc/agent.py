"""Requests out, replies in: the heart of a worker.

Invariants
    1. Every request that is pending ends: by its reply, its deadline, the loss of its
       peer, or the end of this worker.
    2. A reply counts only if it comes from the peer that was asked.
    3. Messages are decoded by the thread that polls, in the order of their arrival, so
       that what they record is recorded in that order.
    4. Bad bytes end the connection they came on, and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from distgrad import _codec
from distgrad.errors import (
    DistgradError,
    ProtocolError,
    RpcTimeoutError,
    TransportError,
    WorkerLostError,
)
from distgrad.message import KINDS, Bye, Cancel, Error, Reply, code_of
from distgrad.rpc.crew import Crew
from distgrad.rpc.failures import describe, rebuild
from distgrad.rpc.future import DONE, FAILED, PENDING, Future, collect_all
from distgrad.rpc.links import Links
from distgrad.rpc.payload import Session
from distgrad.transport._stream import Poller

if TYPE_CHECKING:
    from distgrad.rpc.worker import Worker

__all__ = ["Agent", "RpcFuture"]

_REPLY, _ERROR = code_of(Reply), code_of(Error)
_CANCEL, _BYE = code_of(Cancel), code_of(Bye)
_ANSWERS = frozenset((_REPLY, _ERROR))

_log = logging.getLogger("distgrad")

Handler = Callable[["Worker", int, _codec.Frame, Any], Any]


class RpcFuture(Future):
    """The answer of another worker to one request.

    Attributes
    ----------
    peer
        Id of the worker that was asked.
    deadline
        When to give up (`time.monotonic` seconds), infinite for never.
    request_id
        Names the request on the wire.
    context_id, message_id
        What autograd recorded with the request; 0 is none.
    what
        Names the request in errors.
    """

    __slots__ = ("context_id", "deadline", "message_id", "peer", "request_id", "timeout", "what")

    def __init__(
        self, agent: Agent, peer: int, request_id: int, chain: Hashable, what: str
    ) -> None:
        self._state = PENDING
        self._value = None
        self._callbacks = None
        self._waiters = None
        self._observed = False
        self._agent = agent
        self.chain = chain
        self.peer = peer
        self.request_id = request_id
        self.what = what
        self.context_id = 0
        self.message_id = 0
        self.timeout = 0.0
        self.deadline = float("inf")

    def cancel(self) -> bool:
        """Give up on the answer; the callee drops the request if it has not started."""
        if not super().cancel():
            return False
        assert self._agent is not None
        self._agent.forget(self)
        return True


class Agent:
    """Sends and receives the messages of one worker.

    Parameters
    ----------
    worker
        Whose messages these are.
    poller
        Polls its connections.
    max_threads
        Most serving threads.
    """

    def __init__(self, worker: Worker, poller: Poller, max_threads: int) -> None:
        self.worker = worker
        self.poller = poller
        self.links = Links(worker.world, self.poller)
        self.crew = Crew(worker.name, self.poller, self.dispatch, self.expire, max_threads)
        self.submit = self.crew.submit
        self.handlers: dict[int, tuple[Handler, bool]] = {}
        self.pending: dict[int, RpcFuture] = {}
        self.closed = False
        self.issued = 0
        self.handled = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.ticks: list[Callable[[float], float]] = []
        self._ids = itertools.count((worker.id << 48) + 1)

    def new_id(self) -> int:
        """Return an id that no other worker of this world makes: 16 bits worker, 48 counter."""
        return next(self._ids)

    def wait(self, future: Future, deadline: float | None) -> None:
        """Block until a future is done, polling meanwhile."""
        self.crew.wait(future, deadline)

    # --- sending -----------------------------------------------------------------------

    def request(
        self,
        to: int,
        kind: int,
        body: tuple[Any, ...],
        *,
        timeout: float,
        chain: int = 0,
        what: str = "",
    ) -> RpcFuture:
        """Send a message that is answered.

        Parameters
        ----------
        to
            Id of the receiver.
        kind
            Code of the message.
        body
            Its fields.
        timeout
            Seconds until the request fails; 0 for never.
        chain
            Chain of nested calls that this one continues; 0 starts a new one.
        what
            Names the request in errors.

        Raises
        ------
        SerializationError
            If the body cannot be sent; nothing was sent then.
        WorkerLostError
            If the receiver is lost.
        """
        request_id = next(self._ids)
        future = RpcFuture(self, to, request_id, chain or request_id, what)
        session = Session(self.worker, to)
        try:
            message = _codec.encode(
                kind,
                body,
                session,
                request_id=request_id,
                chain=chain or request_id,
                deadline_us=_microseconds(timeout),
            )
            connection = self.links.to(to)
            hook = self.worker.payload_hook
            if hook is not None:
                ids = hook.outgoing(self.worker, to, session.tensors, False)
                future.context_id, future.message_id = ids
                message.context_id, message.message_id = ids
        except BaseException:
            session.take_back()
            raise
        self.pending[request_id] = future  # before arming: a tick looks through it
        if timeout > 0:
            self._arm(future, timeout)
        self.issued += 1
        try:
            self._send(connection, message)
        except TransportError:
            self.pending.pop(request_id, None)
            session.take_back()
            self._take_back(future)
            raise
        return future

    def _arm(self, future: RpcFuture, timeout: float) -> None:
        future.timeout = timeout
        future.deadline = time.monotonic() + timeout
        self.tick_by(future.deadline)

    def tick_by(self, when: float) -> None:
        """Have ``ticks`` called by the polling thread at ``when`` (`time.monotonic`) or before.

        Any thread may call this, also from a destructor: it takes no lock.
        """
        if when < self.crew.wake_at:
            self.crew.wake_at = when
            self.poller.wake()

    def _take_back(self, future: RpcFuture) -> None:
        hook = self.worker.payload_hook
        if hook is not None and future.message_id:
            hook.undelivered(self.worker, future.context_id, future.message_id)

    def _send(self, connection: Any, message: _codec.Outgoing) -> None:
        try:
            sent = connection.send(message)
        except TransportError as error:
            name = self.worker.world.name_of(connection.peer)
            raise WorkerLostError(f"cannot send to worker {name!r}: {error}") from error
        self.bytes_sent += message.nbytes
        if not sent and not self.crew.polls_here():
            self.crew.drain(connection)

    def post(self, to: int, kind: int, body: tuple[Any, ...], *, context_id: int = 0) -> None:
        """Send a one-way message.

        Raises
        ------
        WorkerLostError
            If the receiver is lost.
        """
        session = Session(self.worker, to)
        try:
            message = _codec.encode(kind, body, session, context_id=context_id)
            self._send(self.links.to(to), message)
        except Exception:
            session.take_back()
            raise

    def reply(self, to: int, request_id: int, value: Any) -> None:
        """Answer a request with a value, or with an `Error` if the value cannot be sent."""
        session = Session(self.worker, to)
        try:
            message = _codec.encode(_REPLY, (value,), session, request_id=request_id)
        except Exception as error:
            session.take_back()
            self.reply_error(to, request_id, error)
            return
        hook = self.worker.payload_hook
        ids = (0, 0)
        if hook is not None and session.tensors:
            ids = hook.outgoing(self.worker, to, session.tensors, True)
            message.context_id, message.message_id = ids
        self.handled += 1
        try:
            self._send(self.links.to(to), message)
        except TransportError as error:  # nobody is left to answer
            _log.info("worker %r drops an answer: %s", self.worker.name, error)
            session.take_back()
            if hook is not None and ids[1]:
                hook.undelivered(self.worker, *ids)

    def reply_error(self, to: int, request_id: int, error: BaseException) -> None:
        """Answer a request with the failure of its handler."""
        self.handled += 1
        body = describe(error, self.worker.name)
        try:
            self._send(
                self.links.to(to),
                _codec.encode(_ERROR, tuple(body), None, request_id=request_id),
            )
        except TransportError as lost:
            _log.info("worker %r drops an error answer: %s", self.worker.name, lost)

    def forget(self, future: RpcFuture) -> None:
        """Stop waiting for an answer and tell the callee."""
        if self.pending.pop(future.request_id, None) is None:
            return
        hook = self.worker.payload_hook
        if hook is not None and future.message_id:
            hook.uncertain(self.worker, future.context_id, future.message_id)
        with contextlib.suppress(TransportError):
            connection = self.links.to(future.peer)
            connection.send(_codec.encode(_CANCEL, (), None, request_id=future.request_id))

    # --- receiving (on the thread that polls) --------------------------------------------

    def dispatch(self, events: list[tuple[Any, Any]]) -> None:
        """Take in what the poller returned."""
        for connection, item in events:
            if isinstance(item, _codec.Frame):
                self._on_frame(connection, item)
            else:
                self._on_end(connection, item)

    def _on_frame(self, connection: Any, frame: _codec.Frame) -> None:
        try:
            peer = self.links.peer_of(connection)
            self.bytes_received += frame.nbytes
            kind = frame.kind
            if kind in _ANSWERS:
                self._on_answer(peer, frame)
            elif kind in self.handlers:
                self._on_request(peer, frame)
            elif kind == _CANCEL:
                self._on_cancel(peer, frame.request_id)
            elif kind == _BYE:
                self.links.left.add(peer)
            else:
                raise ProtocolError(f"cannot take message kind {kind}: nobody handles it")
        except Exception as error:
            self._reject(connection, error)

    def _reject(self, connection: Any, error: Exception) -> None:
        if not isinstance(error, ProtocolError):
            _log.exception("worker %r failed on a message", self.worker.name)
        connection.abort()
        self._on_end(connection, error)

    def _decode(self, peer: int, frame: _codec.Frame) -> tuple[Any, Session]:
        session = Session(self.worker, peer)
        body = _codec.decode(frame, session)
        if frame.message_id and self.worker.payload_hook is not None:
            self.worker.payload_hook.incoming(
                self.worker, peer, frame.context_id, frame.message_id, session.tensors
            )
        return body, session

    def _on_answer(self, peer: int, frame: _codec.Frame) -> None:
        future = self.pending.get(frame.request_id)
        body, session = self._decode(peer, frame)
        if future is None or future.peer != peer:
            return  # timed out or cancelled meanwhile; what it recorded stays recorded
        if session.awaited:
            _after(session.awaited, lambda: self._take_answer(future, frame, body))
        else:
            self._take_answer(future, frame, body)

    def _take_answer(self, future: RpcFuture, frame: _codec.Frame, body: Any) -> None:
        if self.pending.pop(frame.request_id, None) is None:
            return  # it timed out while references in the answer were confirmed
        if frame.kind == _REPLY:
            (value,) = _fields(Reply, body)
            future._try_complete(DONE, value)
            return
        error = rebuild(Error(*_fields(Error, body)))
        hook = self.worker.payload_hook
        if hook is not None and future.message_id:
            hook.uncertain(self.worker, future.context_id, future.message_id)
        future._try_complete(FAILED, error)

    def _on_request(self, peer: int, frame: _codec.Frame) -> None:
        handler, inline = self.handlers[frame.kind]
        arrived = time.monotonic()
        try:
            body, session = self._decode(peer, frame)
        except ProtocolError:
            raise
        except Exception as error:
            if not frame.request_id:
                raise
            failure = error
            self.submit(lambda: self.reply_error(peer, frame.request_id, failure))
            return
        _fields(KINDS[frame.kind], body)
        task = (
            handler(self.worker, peer, frame, body)
            if inline
            else _Served(self, handler, peer, frame, body, arrived)
        )
        if task is None:
            return
        if session.awaited:
            _after(session.awaited, lambda: self.submit(task, frame.chain))
        else:
            self.submit(task, frame.chain)

    def _on_cancel(self, peer: int, request_id: int) -> None:
        def is_wanted(task: Any) -> bool:
            return (
                type(task) is _Served and task.peer == peer and task.frame.request_id == request_id
            )

        if self.crew.withdraw(is_wanted):
            self.handled += 1

    # --- ends ----------------------------------------------------------------------------

    def _on_end(self, connection: Any, error: Exception | None) -> None:
        lost = self.links.drop(connection, error)
        if lost is None:
            return
        peer, why = lost
        for future in [f for f in list(self.pending.values()) if f.peer == peer]:
            self.pending.pop(future.request_id, None)
            future._try_complete(FAILED, _copy_of(why, future.what))
        for listener in list(self.worker.on_lost):
            self.submit(lambda listener=listener: listener(peer, why))  # type: ignore[misc]

    def expire(self, now: float) -> float:
        """Fail what is overdue; return when the next request will be."""
        soonest = float("inf")
        for future in list(self.pending.values()):
            if future.deadline <= now:
                self._time_out(future)
            elif future.deadline < soonest:
                soonest = future.deadline
        for tick in self.ticks:
            soonest = min(soonest, tick(now))
        return soonest

    def _time_out(self, future: RpcFuture) -> None:
        self.forget(future)
        name = self.worker.world.name_of(future.peer)
        error = RpcTimeoutError(
            f"cannot finish {future.what} on worker {name!r}: "
            f"no answer within {future.timeout:g} s",
            hint="pass a longer timeout (seconds), or 0 for none",
        )
        future._try_complete(FAILED, error)

    def close(self, reason: str) -> None:
        """Say goodbye, close all connections, end the threads, fail what is pending."""
        if self.closed:
            return
        self.closed = True
        goodbye = code_of(Bye)
        self.links.close(
            lambda peer: self.links.to(peer).send(_codec.encode(goodbye, (reason,), None))
        )
        self.crew.close(timeout_s=1.0)
        for future in list(self.pending.values()):
            error = DistgradError(f"cannot finish {future.what}: worker was shut down")
            future._try_complete(FAILED, error)
            future._observed = True
        self.pending.clear()
        self.poller.close()


class _Served:
    """A request that waits for, or is in, the hands of a serving thread."""

    __slots__ = ("agent", "body", "deadline", "frame", "handler", "peer")

    def __init__(
        self,
        agent: Agent,
        handler: Handler,
        peer: int,
        frame: _codec.Frame,
        body: tuple[Any, ...],
        arrived: float,
    ) -> None:
        self.agent = agent
        self.handler = handler
        self.peer = peer
        self.frame = frame
        self.body = body
        self.deadline = arrived + frame.deadline_us * 1e-6 if frame.deadline_us else None

    def __call__(self) -> None:
        agent, frame = self.agent, self.frame
        if self.deadline is not None and time.monotonic() > self.deadline:
            agent.handled += 1  # the caller gave up already
            return
        try:
            agent.worker.serve(self.handler, self.peer, frame, self.body, self.deadline)
        except BaseException as error:
            if not frame.request_id:
                raise
            agent.reply_error(self.peer, frame.request_id, error)
            if not isinstance(error, Exception):
                raise


def _after(awaited: list[Future], action: Callable[[], None]) -> None:
    """Act once all futures are complete, however they ended."""
    collect_all(awaited).add_done_callback(lambda _: action(), inline=True)


def _fields(cls: type, body: Any) -> tuple[Any, ...]:
    """Return a body that has as many fields as its kind."""
    if type(body) is not tuple or len(body) != len(cls._fields):  # type: ignore[attr-defined]
        raise ProtocolError(f"cannot read a {cls.__name__} message: it has other fields")
    return body


def _microseconds(timeout: float) -> int:
    if timeout <= 0:
        return 0
    return min(max(int(timeout * 1e6), 1), 0xFFFFFFFF)


def _copy_of(error: Exception, what: str) -> Exception:
    """Return the error for one of the requests that a lost peer leaves behind."""
    return type(error)(f"cannot finish {what}: {error}")
