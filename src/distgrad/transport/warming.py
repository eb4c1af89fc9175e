"""Touching fresh memory before the thread that polls writes into it.

The first touch of a page may take milliseconds: the system clears it, and where this machine is a
virtual one, perhaps fetches it from another system. A thread that polls must not wait for that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from distgrad.errors import TransportError
from distgrad.transport._pool import Slab, touch

__all__ = ["Warmer", "warmer"]

_IDLE_S = 1.0

_Job = tuple[Slab, int, int, Callable[[], None]]


class Warmer:
    """One thread that touches memory, a part at a time; it ends when it has been idle."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew: in the child of a fork the thread is gone."""
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._lock = threading.Lock()
        self._running = False

    def order(self, slab: Slab, start: int, nbytes: int, done: Callable[[], None]) -> None:
        """Touch a part of a slab and then call ``done()``, on the thread of this object.

        Does not block; where there can be no thread, calls ``done()`` at once. That may raise
        `TransportError` where nobody waits any more.
        """
        with self._lock:
            if not self._running:
                with suppress(RuntimeError):  # no thread is to be had
                    threading.Thread(target=self._run, name="distgrad-memory", daemon=True).start()
                    self._running = True
            if self._running:
                self._jobs.put((slab, start, nbytes, done))
                return
        done()  # so whoever reads waits for each page

    def _run(self) -> None:
        while (job := self._next()) is not None:
            slab, start, nbytes, done = job
            touch(slab, start, nbytes)
            with suppress(TransportError):  # the poller was closed meanwhile
                done()
            del job, slab, done  # the memory is not held while this waits

    def _next(self) -> _Job | None:
        with suppress(Empty):
            return self._jobs.get(timeout=_IDLE_S)
        with self._lock:
            if self._jobs.empty():
                self._running = False
                return None
        return self._jobs.get()


# Like the memory, of the process.
warmer = Warmer()

os.register_at_fork(after_in_child=warmer.reset)
