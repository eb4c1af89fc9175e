"""The remote references of one worker: tables, locks and messages around the protocol.

Invariants
    1. The counts are touched under the lock only; actions are performed after it is
       released, so that values are freed and messages sent without it.
    2. Messages that register forks are taken in by the polling thread, in the order of
       their arrival. What runs user code is handed to serving threads.
    3. A destructor takes no lock and sends nothing: it puts its fork on a list that the
       polling thread works off.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from distgrad.errors import DistgradError, RpcTimeoutError, TransportError, WorkerLostError
from distgrad.message import RRefForkRequest, RRefUserDelete
from distgrad.rpc import Future, Worker
from distgrad.rref.protocol import (
    Action,
    Answer,
    End,
    Fork,
    ForkState,
    ReferenceCounts,
    Send,
    Settled,
)

__all__ = ["Cell", "RRefTable"]

_log = logging.getLogger("distgrad")
_SWEEP_S = 0.002  # how long dropped forks are collected before they are reported


class Cell:
    """A value at its owner, there or still to come.

    Parameters
    ----------
    rref_id
        The RRef's id.
    value
        Completes with the value, or with the failure of the function that makes it.
    """

    __slots__ = ("__weakref__", "rref_id", "value")

    def __init__(self, rref_id: int, value: Future) -> None:
        self.rref_id = rref_id
        self.value = value


class RRefTable:
    """The reference counts of a worker, connected to its messages.

    Parameters
    ----------
    worker
        Whose references these are.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._counts = ReferenceCounts(worker.id)
        self._lock = threading.Lock()
        self._dropped: deque[Fork] = deque()
        self._confirmed: dict[int, Future] = {}  # pending fork that was received -> its gate
        self._requests: dict[int, int] = {}  # fork -> id of its fork request
        worker.agent.ticks.append(self._sweep)
        worker.on_lost.append(lambda peer, reason: self._do(self._counts.lose, peer))
        worker.on_close.append(self._close)

    def _do(self, event: Callable[..., list[Action]], *args: Any) -> None:
        with self._lock:
            actions = event(*args)
        if actions:
            self._perform(actions)

    def _perform(self, actions: Iterable[Action]) -> None:
        ended: dict[int, list[tuple[int, int]]] = {}
        for action in actions:
            match action:
                case End(to, rref_id, fork_id):
                    ended.setdefault(to, []).append((rref_id, fork_id))
                case Send(to, RRefForkRequest() as body):
                    # Not a call of whatever context the polling thread happens to be in.
                    contextvars.Context().run(self._request_fork, to, body)
                case Send(to, body):
                    self._post(to, body)
                case Answer(to, fork_id, accepted):
                    if request_id := self._requests.pop(fork_id, None):
                        self.worker.agent.reply(to, request_id, accepted)
                case Settled(fork):
                    if gate := self._confirmed.pop(fork.fork_id, None):
                        gate.set_result(None)
        for to, forks in ended.items():
            self._post(to, RRefUserDelete(tuple(forks)))

    def _post(self, to: int, body: Any) -> None:
        with suppress(TransportError):  # a lost worker is dealt with as a whole
            self.worker.post(to, body)

    # --- owner -------------------------------------------------------------------------

    def keep(self, value: Any) -> Cell:
        """Return a cell with a value of this worker; it is counted once it is shared."""
        done = Future(agent=self.worker.agent)
        done.set_result(value)
        return Cell(self.new_id(), done)

    def new_id(self) -> int:
        """Mint an id."""
        with self._lock:
            return self._counts.new_id()

    def open(self, rref_id: int, fork_id: int, user: int) -> Cell:
        """Return the cell for a value that ``user`` creates here; its first fork is counted."""
        with self._lock:
            if owned := self._counts.owned.get(rref_id):  # this worker created it for itself
                cell: Cell = owned.value
                return cell
            cell = Cell(rref_id, Future(agent=self.worker.agent))
            actions = self._counts.create(rref_id, fork_id, cell, user)
        self._perform(actions)
        return cell

    def cell(self, rref_id: int) -> Cell:
        """Return the cell of a value that others use.

        Raises
        ------
        DistgradError
            If nobody does (any more).
        """
        owned = self._counts.owned.get(rref_id)
        if owned is None:
            raise DistgradError(
                f"cannot find RRef {rref_id:#x} on worker {self.worker.name!r}: "
                "its last reference is gone"
            )
        cell: Cell = owned.value
        return cell

    def share(self, cell: Cell, to: int) -> tuple[int, Callable[[], None]]:
        """Count a fork for worker ``to``; return its id, and what takes it back."""
        with self._lock:
            fork_id = self._counts.share(cell.rref_id, cell, to)
        return fork_id, partial(self._do, self._counts.unshare, cell.rref_id, fork_id)

    def on_fork_request(self, peer: int, request_id: int, rref_id: int, fork_id: int) -> None:
        """Take in the message of a new user; runs on the polling thread."""
        self._requests[fork_id] = request_id
        self._do(self._counts.on_fork_request, peer, rref_id, fork_id)

    def on_user_delete(self, peer: int, forks: Iterable[tuple[int, int]]) -> None:
        """Take in the end of forks; runs on the polling thread."""
        for rref_id, fork_id in forks:
            self._do(self._counts.on_end, peer, rref_id, fork_id)

    def _close(self) -> None:
        """Let go of all values: forks that had not ended when the worker left never will.

        Says whose they are. It is no warning: programs end with references in their variables.
        """
        with self._lock:
            owned, self._counts.owned = self._counts.owned, {}
        users = Counter(user for value in owned.values() for user in value.forks.values())
        if users:
            whom = ", ".join(
                f"{self.worker.infos[u].name!r} ({n})" for u, n in sorted(users.items())
            )
            values = "1 value" if len(owned) == 1 else f"{len(owned)} values"
            text = "worker %r leaves %s that others refer to: %s"
            _log.info(text, self.worker.name, values, whom)
        owned.clear()  # without the lock (invariant 1)

    # --- user --------------------------------------------------------------------------

    def originate(self, owner: int) -> Fork:
        """Begin a fork of a value that is about to be created at ``owner``."""
        with self._lock:
            return self._counts.originate(self._counts.new_id(), owner)

    def abandon(self, fork: Fork) -> None:
        """Forget a fork whose creating call never left."""
        with self._lock:
            self._counts.abandon(fork)

    def pass_on(self, fork: Fork, to: int) -> tuple[int, Callable[[], None]]:
        """Mint a child of a fork; return its id, and what takes it back."""
        with self._lock:
            child = self._counts.pass_on(fork, to)
        return child, partial(self._do, self._counts.revoke, child)

    def receive(
        self, owner: int, rref_id: int, fork_id: int, parent: int
    ) -> tuple[Fork | Cell, Future | None]:
        """Take up a reference that arrived; runs on the polling thread.

        Returns
        -------
        Fork or Cell
            The reference: a cell if the value is here.
        Future or None
            Completes when the owner knows of it; None if it does.
        """
        gate = None
        with self._lock:
            owned = self._counts.owned.get(rref_id)
            cell = owned.value if owned else None
            fork, actions = self._counts.receive(owner, rref_id, fork_id, parent)
            if fork is not None and fork.state is ForkState.PENDING:
                gate = self._confirmed[fork_id] = Future(agent=self.worker.agent)
        self._perform(actions)
        return fork or cell or self._freed(rref_id), gate

    def on_child_accept(self, fork_id: int) -> None:
        """Take in that a child is known to the owner; runs on the polling thread."""
        self._do(self._counts.on_child_accept, fork_id)

    def settle_by(self, fork: Fork, outcome: Future) -> None:
        """Settle a pending fork by the answer of its owner."""
        cause = outcome.exception()
        state = ForkState.REFUSED
        if cause is None:
            state = ForkState.REFUSED if outcome.result() is False else ForkState.CONFIRMED
        elif isinstance(cause, WorkerLostError) and not hasattr(cause, "workers"):
            state = ForkState.OWNER_LOST
        elif isinstance(cause, RpcTimeoutError):
            state = ForkState.TIMED_OUT
        fork.cause = cause
        if not self.worker.closed:
            self._do(self._counts.settle, fork, state)

    def drop(self, fork: Fork) -> None:
        """Let go of a fork soon. For destructors: takes no lock."""
        self._dropped.append(fork)
        # One alone is new; where there are more, the sweep that comes takes this one too.
        if len(self._dropped) == 1 and not self.worker.closed:
            self.worker.agent.tick_by(time.monotonic() + _SWEEP_S)

    def _sweep(self, now: float) -> float:
        actions: list[Action] = []
        while self._dropped:
            with self._lock:
                actions += self._counts.drop(self._dropped.popleft())
        if actions:
            self._perform(actions)
        return float("inf")

    def _request_fork(self, owner: int, body: RRefForkRequest) -> None:
        fork = self._counts.used[body.fork_id]
        try:
            answer = self.worker.request(owner, body, timeout=0)
        except TransportError:
            self._do(self._counts.settle, fork, ForkState.OWNER_LOST)
        else:
            answer.add_done_callback(partial(self.settle_by, fork), inline=True)

    def _freed(self, rref_id: int) -> Cell:
        """Return a cell for a value that went with the worker that passed it on."""
        cell = Cell(rref_id, Future(agent=self.worker.agent))
        error = DistgradError(
            f"cannot use RRef {rref_id:#x}: its value was freed, because the worker that "
            "passed it on is lost"
        )
        cell.value.set_exception(error)
        cell.value.exception()  # looked at: whoever uses the reference gets it
        return cell

    # --- books -------------------------------------------------------------------------

    def debug_info(self) -> dict[str, int]:
        """Return counters; all are 0 when nothing is shared or used."""
        with self._lock:
            return {f"rref.{name}": n for name, n in self._counts.counters().items()}
