"""What a worker sends: requests, answers and one-way messages."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distgrad import _codec
from distgrad.errors import TransportError, WorkerLostError
from distgrad.message import Bye, Cancel, Error, Reply, code_of
from distgrad.rpc.crew import Crew
from distgrad.rpc.failures import describe
from distgrad.rpc.future import Future
from distgrad.rpc.inbox import Inbox
from distgrad.rpc.links import Links
from distgrad.rpc.payload import Session
from distgrad.rpc.pending import PendingRequests, RpcFuture
from distgrad.transport._stream import Poller

if TYPE_CHECKING:
    from distgrad.rpc.worker import Worker

__all__ = ["Agent"]

_REPLY, _ERROR, _CANCEL = code_of(Reply), code_of(Error), code_of(Cancel)

_log = logging.getLogger("distgrad")


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
        self.pending = PendingRequests(self.forget, worker.world.name_of)
        self.inbox = Inbox(self)
        self.crew = Crew(worker.name, poller, self.inbox.dispatch, self._tick, max_threads)
        self.submit = self.crew.submit
        self.closed = False
        self.issued = 0
        self.handled = 0
        self.bytes_sent = 0
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
        chain = chain or request_id
        future = RpcFuture(self, to, request_id, chain, what)
        session = Session(self.worker, to)
        try:
            message, connection = self._compose(future, kind, body, session, timeout, chain)
        except BaseException:
            session.take_back()
            raise
        self.pending.add(request_id, future)  # before arming: a tick looks through it
        if timeout > 0:
            self._arm(future, timeout)
        self.issued += 1
        try:
            self._send(connection, message)
        except TransportError:
            self.pending.take(request_id)
            session.take_back()
            self._take_back(future)
            raise
        return future

    def _compose(
        self,
        future: RpcFuture,
        kind: int,
        body: tuple[Any, ...],
        session: Session,
        timeout: float,
        chain: int,
    ) -> tuple[_codec.Outgoing, Any]:
        message = _codec.encode(
            kind,
            body,
            session,
            request_id=future.request_id,
            chain=chain,
            deadline_us=_microseconds(timeout),
        )
        connection = self.links.to(future.peer)
        hook = self.worker.payload_hook
        if hook is not None:
            ids = hook.outgoing(self.worker, future.peer, session.tensors, False)
            future.context_id, future.message_id = ids
            message.context_id, message.message_id = ids
        return message, connection

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
        if self.pending.take(future.request_id) is None:
            return
        hook = self.worker.payload_hook
        if hook is not None and future.message_id:
            hook.uncertain(self.worker, future.context_id, future.message_id)
        with contextlib.suppress(TransportError):
            connection = self.links.to(future.peer)
            connection.send(_codec.encode(_CANCEL, (), None, request_id=future.request_id))

    # --- time and the end ------------------------------------------------------------------

    def _tick(self, now: float) -> float:
        soonest = self.pending.expire(now)
        for tick in self.ticks:
            soonest = min(soonest, tick(now))
        return soonest

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
        self.pending.end()
        self.poller.close()


def _microseconds(timeout: float) -> int:
    if timeout <= 0:
        return 0
    return min(max(int(timeout * 1e6), 1), 0xFFFFFFFF)
