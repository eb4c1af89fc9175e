"""Leaving together: nobody closes before no call runs anywhere.

A worker that is idle tells the first worker how many requests it has issued and handled.
When all have told, and the sums agree and are the same as in the round before, no request
can be under way (Mattern's four-counter method, 1987); otherwise another round begins.

The first worker connects to all others before it waits, so that it learns of each loss.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from distgrad.errors import RpcTimeoutError, TransportError, WorkerLostError
from distgrad.message import Arrived, Departed
from distgrad.rpc.future import DONE, FAILED, Future

if TYPE_CHECKING:
    from distgrad._codec import Frame
    from distgrad.rpc.worker import Worker

__all__ = ["Departure"]

_FIRST = 0  # id of the worker that counts
_PAUSE_S = 0.002  # between looks at whether the own calls have ended


class Departure:
    """One worker's part in leaving together; the first worker also counts the others.

    Parameters
    ----------
    worker
        Who leaves.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._arrived: dict[int, Arrived] = {}
        self._last_sums: tuple[int, int] | None = None
        self._verdict = Future(agent=worker.agent)
        self._lost: Exception | None = None
        worker.on_lost.append(self._on_lost)
        worker.register(Arrived, self._on_arrived, inline=True)
        worker.register(Departed, self._on_departed, inline=True)

    # --- every worker --------------------------------------------------------------------

    def wait(self, timeout: float) -> None:
        """Block until all workers may leave; ``timeout`` in seconds, 0 for no limit."""
        until = time.monotonic() + timeout if timeout else None
        if self._worker.id == _FIRST:
            for info in self._worker.infos:
                if info.id != _FIRST:
                    self._worker.agent.links.to(info.id)
        while not self._round(until):
            pass

    def _round(self, until: float | None) -> bool:
        self._wait_until_idle(until)
        agent = self._worker.agent
        verdict = self._verdict = Future(agent=agent)
        arrived = Arrived(agent.issued, agent.handled)
        if self._lost is not None:
            raise WorkerLostError(f"cannot shut down together: {self._lost}")
        if self._worker.id == _FIRST:
            self._take(_FIRST, arrived)
        else:
            self._worker.post(_FIRST, arrived)
        # Not `Future.wait`, which polls: this wait is long, and each request that arrives
        # meanwhile would have to be handed to a serving thread.
        settled = threading.Event()
        verdict.add_done_callback(lambda _: settled.set(), inline=True)
        if not settled.wait(None if until is None else max(0.0, until - time.monotonic())):
            raise RpcTimeoutError(
                f"cannot shut down worker {self._worker.name!r}: the others did not come in time",
                hint="every worker must call shutdown(), or leave with shutdown(graceful=False)",
            )
        finished: bool = verdict.result()
        return finished

    def give_up(self) -> None:
        """End the wait of another thread: this worker has left already."""
        self._end_round(False, "this worker was shut down")

    def _wait_until_idle(self, until: float | None) -> None:
        agent = self._worker.agent
        pause = threading.Event()
        while (agent.pending or not agent.crew.idle) and self._lost is None:
            if until is not None and time.monotonic() > until:
                raise RpcTimeoutError(
                    f"cannot shut down worker {self._worker.name!r}: "
                    f"{len(agent.pending)} calls it made and {agent.crew.busy} it serves still run"
                )
            pause.wait(_PAUSE_S)

    def _on_departed(self, worker: Worker, peer: int, frame: Frame, body: Any) -> None:
        finished, reason = body
        if peer == _FIRST:
            self._end_round(bool(finished), reason)

    def _end_round(self, finished: bool, reason: str | None) -> None:
        if reason is None:
            self._verdict._try_complete(DONE, finished)
        else:
            error = WorkerLostError(f"cannot shut down together: {reason}")
            self._verdict._try_complete(FAILED, error)
            self._verdict._observed = True  # whoever leaves later is told by `_lost`

    # --- the first worker ------------------------------------------------------------------

    def _on_arrived(self, worker: Worker, peer: int, frame: Frame, body: Any) -> None:
        self._take(peer, Arrived(*body))

    def _take(self, rank: int, arrived: Arrived) -> None:
        with self._lock:
            self._arrived[rank] = arrived
            complete = len(self._arrived) == len(self._worker.infos)
        if self._lost is not None:
            self._tell_all(Departed(False, str(self._lost)))
        elif complete:
            self._conclude()

    def _conclude(self) -> None:
        rows = list(self._arrived.values())
        sums = (sum(issued for issued, _ in rows), sum(handled for _, handled in rows))
        finished = sums[0] == sums[1] and sums == self._last_sums
        self._last_sums = sums
        self._tell_all(Departed(finished, None))

    def _tell_all(self, verdict: Departed) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, {}
        for rank in arrived:
            if rank == self._worker.id:
                continue
            with contextlib.suppress(TransportError):  # its loss is reported on its own
                self._worker.post(rank, verdict)
        if self._worker.id in arrived:
            self._end_round(*verdict)

    def _on_lost(self, peer: int, reason: Exception) -> None:
        self._lost = reason
        if self._worker.id == _FIRST:
            self._tell_all(Departed(False, str(reason)))
        elif peer == _FIRST:
            self._end_round(False, str(reason))
