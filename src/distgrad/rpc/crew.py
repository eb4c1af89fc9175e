"""The threads of a worker: how they begin, wait for work and end. The rest is compiled."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from distgrad.config import config
from distgrad.rpc._crew import CrewCore
from distgrad.transport._poller import Poller

__all__ = ["Crew"]

_log = logging.getLogger("distgrad")

_SPARE_S = 10.0  # how long a surplus thread waits for work before it ends


class Crew(CrewCore):
    """Runs the poll loop and the tasks of one worker.

    Parameters
    ----------
    name
        Of the worker, for thread names.
    poller
        Polled by whoever leads.
    on_events
        Takes in a list of events, and removes from the list what it has taken in; runs on
        the leader, must not block.
    on_tick
        Called by the leader when `wake_at` has passed; returns the next such time.
    max_threads
        Most threads that serve and do not wait for an answer themselves.
    """

    def __init__(
        self,
        name: str,
        poller: Poller,
        on_events: Callable[[list[Any]], None],
        on_tick: Callable[[float], float],
        max_threads: int,
    ) -> None:
        super().__init__(name, poller, on_events, on_tick)
        self._max_threads = max_threads
        self._spares: deque[SimpleQueue[bool]] = deque()
        self._threads: set[threading.Thread] = set()

    def start(self) -> None:
        """Start the first serving thread."""
        self._spawn()

    @property
    def thread_count(self) -> int:
        """Number of serving threads."""
        return len(self._threads)

    def _serve(self) -> None:
        self.summoned = False
        try:
            self._serve_until_surplus()
        finally:
            self._threads.discard(threading.current_thread())

    def _wait_as_spare(self) -> bool:
        """Wait for work; False if this thread is not needed."""
        mailbox: SimpleQueue[bool] = SimpleQueue()
        self._spares.append(mailbox)
        try:
            needed = mailbox.get(timeout=_SPARE_S)
        except Empty:
            try:
                self._spares.remove(mailbox)
                return False
            except ValueError:
                needed = mailbox.get()  # called at the same moment
        if needed:
            self.summoned = False
        return needed

    def _summon(self) -> None:
        """Have another thread come to watch."""
        try:
            self._spares.popleft().put(True)
        except IndexError:
            self._spawn()

    def _spawn(self) -> None:
        if self.closed or not self._may_grow():
            self.summoned = False
            return
        number = len(self._threads)
        thread = threading.Thread(
            target=self._serve, name=f"distgrad-{self.name}-{number}", daemon=True
        )
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # as many as this process may have: those that run go on
            self._threads.discard(thread)
            self.summoned = False
            if not self._threads:
                raise
            _log.warning("worker %r has %d serving threads, and gets no more: %s",
                         self.name, len(self._threads), error)  # fmt: skip

    def _may_grow(self) -> bool:
        """Whether there may be another thread: one that waits for an answer does not count.

        Else calls that are nested deeper than there are threads would wait for each other.
        """
        if len(self._threads) < self._max_threads:
            return True
        most: int = config.max_serving_threads
        serving = len(self._threads) - self.count_waiting(list(self._threads))
        return serving < self._max_threads and len(self._threads) < most

    def close(self, timeout_s: float) -> None:
        """End the serving threads that do not run user code; join them briefly."""
        self.closed = True
        self.leadership.close()
        self.poller.wake()
        while self._spares:
            self._spares.popleft().put(False)
        for waiter in list(self.followers):
            waiter()
        self.rouse_ready()
        until = time.monotonic() + timeout_s
        for thread in list(self._threads):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
