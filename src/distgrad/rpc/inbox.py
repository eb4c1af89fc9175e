"""What arrives: messages and the ends of connections, on the thread that polls.

Invariants
    1. Messages are decoded in the order of their arrival, so that what they record is
       recorded in that order.
    2. An answer counts only if it comes from the peer that was asked.
    3. Bad bytes end the connection they came on, and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distgrad import _codec
from distgrad.errors import ProtocolError
from distgrad.message import KINDS, Bye, Cancel, Error, Reply, code_of
from distgrad.rpc.failures import rebuild
from distgrad.rpc.future import DONE, FAILED, Future, collect_all
from distgrad.rpc.payload import Session
from distgrad.rpc.pending import RpcFuture

if TYPE_CHECKING:
    from distgrad.rpc.agent import Agent
    from distgrad.rpc.worker import Worker

__all__ = ["Handler", "Inbox"]

_REPLY, _ERROR = code_of(Reply), code_of(Error)
_CANCEL, _BYE = code_of(Cancel), code_of(Bye)
_ANSWERS = frozenset((_REPLY, _ERROR))

_log = logging.getLogger("distgrad")

Handler = Callable[["Worker", int, _codec.Frame, Any], Any]


class Inbox:
    """Takes in what the poller of a worker returns.

    Parameters
    ----------
    agent
        Whose pending requests, connections and threads are served.

    Attributes
    ----------
    handlers
        Code of a kind to (handler, whether it runs on the polling thread).
    nbytes
        Bytes of messages received so far.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._worker = agent.worker
        self.handlers: dict[int, tuple[Handler, bool]] = {}
        self.nbytes = 0

    def dispatch(self, events: list[tuple[Any, Any]]) -> None:
        """Take in what the poller returned."""
        for connection, item in events:
            if isinstance(item, _codec.Frame):
                self._on_frame(connection, item)
            else:
                self._on_end(connection, item)

    def _on_frame(self, connection: Any, frame: _codec.Frame) -> None:
        try:
            peer = self._agent.links.peer_of(connection)
            self.nbytes += frame.nbytes
            kind = frame.kind
            if kind in _ANSWERS:
                self._on_answer(peer, frame)
            elif kind in self.handlers:
                self._on_request(peer, frame)
            elif kind == _CANCEL:
                self._on_cancel(peer, frame.request_id)
            elif kind == _BYE:
                self._agent.links.left.add(peer)
            else:
                raise ProtocolError(f"cannot take message kind {kind}: nobody handles it")
        except Exception as error:
            self._reject(connection, error)

    def _reject(self, connection: Any, error: Exception) -> None:
        if not isinstance(error, ProtocolError):
            _log.exception("worker %r failed on a message", self._worker.name)
        connection.abort()
        self._on_end(connection, error)

    def _decode(self, peer: int, frame: _codec.Frame) -> tuple[Any, Session]:
        session = Session(self._worker, peer)
        body = _codec.decode(frame, session)
        if frame.message_id and self._worker.payload_hook is not None:
            self._worker.payload_hook.incoming(
                self._worker, peer, frame.context_id, frame.message_id, session.tensors
            )
        return body, session

    def _on_answer(self, peer: int, frame: _codec.Frame) -> None:
        future = self._agent.pending.find(frame.request_id, peer)
        body, session = self._decode(peer, frame)
        if future is None:
            return  # timed out or cancelled meanwhile; what it recorded stays recorded
        if session.awaited:
            _after(session.awaited, lambda: self._take_answer(future, frame, body))
        else:
            self._take_answer(future, frame, body)

    def _take_answer(self, future: RpcFuture, frame: _codec.Frame, body: Any) -> None:
        if self._agent.pending.take(frame.request_id) is None:
            return  # it timed out while references in the answer were confirmed
        if frame.kind == _REPLY:
            (value,) = _fields(Reply, body)
            future._try_complete(DONE, value)
            return
        error = rebuild(Error(*_fields(Error, body)))
        hook = self._worker.payload_hook
        if hook is not None and future.message_id:
            hook.uncertain(self._worker, future.context_id, future.message_id)
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
            self._agent.submit(lambda: self._agent.reply_error(peer, frame.request_id, failure))
            return
        _fields(KINDS[frame.kind], body)
        task = (
            handler(self._worker, peer, frame, body)
            if inline
            else _Served(self._agent, handler, peer, frame, body, arrived)
        )
        if task is None:
            return
        if session.awaited:
            _after(session.awaited, lambda: self._agent.submit(task, frame.chain))
        else:
            self._agent.submit(task, frame.chain)

    def _on_cancel(self, peer: int, request_id: int) -> None:
        def is_wanted(task: Any) -> bool:
            return (
                type(task) is _Served and task.peer == peer and task.frame.request_id == request_id
            )

        if self._agent.crew.withdraw(is_wanted):
            self._agent.handled += 1

    def _on_end(self, connection: Any, error: Exception | None) -> None:
        lost = self._agent.links.drop(connection, error)
        if lost is None:
            return
        peer, why = lost
        self._agent.pending.lose(peer, why)
        for listener in list(self._worker.on_lost):
            self._agent.submit(lambda listener=listener: listener(peer, why))  # type: ignore[misc]


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
