"""Sends and receives the messages of one worker: the rare half; the other is compiled."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from distgrad import _codec
from distgrad.errors import ProtocolError, SerializationError, TransportError
from distgrad.message import Bye, Cancel, Error, code_of
from distgrad.rpc._exchange import Exchange, Served
from distgrad.rpc._future import FAILED, PendingRequests, RpcFuture
from distgrad.rpc.crew import Crew
from distgrad.rpc.failures import bare, describe, rebuild
from distgrad.rpc.future import Future, all_ended
from distgrad.rpc.links import Links
from distgrad.rpc.pulse import Doors, Rounds
from distgrad.transport._poller import Poller

if TYPE_CHECKING:
    from distgrad.rpc.worker import Worker

__all__ = ["Agent"]

_ERROR, _CANCEL, _BYE = code_of(Error), code_of(Cancel), code_of(Bye)
_AGAIN_S = 1.0  # after which a tick that failed is called again

_log = logging.getLogger("distgrad")


class Agent(Exchange):
    """Sends and receives the messages of one worker.

    Parameters
    ----------
    worker
        Whose messages these are.
    poller
        Polls its connections.
    max_threads
        Most serving threads.

    Attributes
    ----------
    ticks
        Called with the time by the polling thread now and then (see `tick_by`); each
        returns when it wants to be called next.
    """

    def __init__(self, worker: Worker, poller: Poller, max_threads: int) -> None:
        self.ticks: list[Callable[[float], float]] = []
        self._doors: Doors | None = None
        self._rounds: Rounds | None = None
        crew = Crew(worker.name, poller, self.on_events, self._tick, max_threads)
        self._assemble(
            worker,
            Links(worker.world, poller, crew.polls_here, self._lose),
            crew,
            PendingRequests(self.forget, worker.world.name_of),
        )

    # --- answers that are not values ------------------------------------------------------

    def reply_error(self, to: int, request_id: int, error: BaseException) -> None:
        """Answer a request with the failure of its handler."""
        told = describe(error, self.worker.name)
        try:
            self.reply_with(to, request_id, _ERROR, tuple(told))
        except SerializationError:  # too large or too deep; but an answer there must be
            self.reply_with(to, request_id, _ERROR, tuple(bare(told)))

    def _answer_lost(self, why: Exception, context_id: int, message_id: int) -> None:
        _log.info("worker %r drops an answer: %s", self.worker.name, why)
        self._take_back(context_id, message_id)

    def _take_back(self, context_id: int, message_id: int) -> None:
        hook = self.hook
        if hook is not None and message_id:
            hook.undelivered(self.worker, context_id, message_id)

    def _doubt(self, future: RpcFuture) -> None:
        hook = self.hook
        if hook is not None and future.message_id:
            hook.uncertain(self.worker, future.context_id, future.message_id)

    def forget(self, future: RpcFuture) -> None:
        """Stop waiting for an answer and tell the callee."""
        if not self.pending.withdraw(future):
            return
        self._doubt(future)
        with contextlib.suppress(TransportError):
            connection = self.links.to(future.peer, 0.0)
            connection.send(_codec.encode(_CANCEL, (), None, request_id=future.request_id))

    # --- what arrives ---------------------------------------------------------------------

    def _take_error(self, future: RpcFuture, body: Any) -> None:
        if type(body) is not tuple or len(body) != len(Error._fields):
            raise ProtocolError("cannot read an Error message: it has other fields")
        error = rebuild(Error(*body))
        if self.pending.withdraw(future):
            self._doubt(future)
            future._try_complete(FAILED, error)

    def _after(self, awaited: list[Future], action: Callable[[], object]) -> None:
        """Act once all futures are complete, however they ended."""
        all_ended(awaited, lambda _: action())

    def _refuse(self, peer: int, request_id: int, error: Exception) -> None:
        self.submit(lambda: self.reply_error(peer, request_id, error))

    def _on_control(self, peer: int, frame: _codec.Frame) -> None:
        if frame.kind == _CANCEL:
            self._on_cancel(peer, frame.request_id)
        elif frame.kind == _BYE:
            self.links.left.add(peer)
        else:
            raise ProtocolError(f"cannot take message kind {frame.kind}: nobody handles it")

    def _on_cancel(self, peer: int, request_id: int) -> None:
        def is_wanted(task: Any) -> bool:
            return (
                type(task) is Served and task.peer == peer and task.frame.request_id == request_id
            )

        if self.crew.withdraw(is_wanted) or self.excuse(peer, request_id):
            self.count_handled()

    def _reject(self, connection: Any, error: Exception) -> None:
        if not isinstance(error, ProtocolError):
            _log.exception("worker %r failed on a message", self.worker.name)
        connection.abort()
        self._on_end(connection, error)

    def _on_end(self, connection: Any, error: Exception | None) -> None:
        self.unsent.pop(connection, None)
        lost = self.links.drop(connection, error)
        if lost is not None:
            self._lose(*lost)

    def _lose(self, peer: int, why: Exception) -> None:
        self.pending.lose(peer, why)
        for caller, request_id in list(self.owed):
            if caller == peer:
                self.excuse(peer, request_id)
        for listener in list(self.worker.on_lost):
            self.submit(partial(listener, peer, why))

    # --- time and the end -----------------------------------------------------------------

    def beat(self, doors: Doors, interval_s: float) -> None:
        """Answer at these doors from now on, and ask the peers; see `pulse`."""
        self._doors = doors
        doors.attend(self.worker.name)
        if doors.addresses:
            self._rounds = Rounds(self, self.worker.world.doors_of, interval_s)
            self.ticks.append(self._rounds.tick)
            self.tick_by(self._rounds.tick(0.0))

    def _tick(self, now: float) -> float:
        soonest = self.pending.expire(now)
        for tick in self.ticks:
            try:
                soonest = min(soonest, tick(now))
            except Exception:  # whoever polls at this moment has nothing to do with it
                _log.exception("worker %r failed on what it does now and then", self.worker.name)
                soonest = min(soonest, now + _AGAIN_S)
        return soonest

    def close(self, reason: str) -> None:
        """Say goodbye, close all connections, end the threads, fail what is pending."""
        if self.closed:
            return
        self.closed = True
        self.links.close(
            lambda peer: self.links.to(peer).send(_codec.encode(_BYE, (reason,), None))
        )
        if self._rounds is not None:
            self._rounds.close()
        self.crew.close(timeout_s=1.0)
        if self._doors is not None:
            self._doors.close()
        self.pending.end()
        self.crew.poller.close()
