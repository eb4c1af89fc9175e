"""The threads of a worker: who polls, who serves, who waits.

The thread that waits for an answer polls for it itself; the thread that received a request
serves it; other threads are roused only when these two are not enough. A wake-up costs
more than everything else a small call does.

Invariants
    1. One thread polls at a time: the holder of `Leadership`.
    2. A leader never runs user code: it gives the role up first.
    3. Whoever gives the role up hands it to a thread that waits, if there is one;
       otherwise it lies free, and the watcher takes it after the grace period.
    4. While a task runs on a serving thread, another thread watches or is on its way.
    5. A task of a chain may run on the thread that waits for that chain: the waiting
       thread could not go on before the task ends, wherever it ran.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import Any

from distgrad.config import config
from distgrad.errors import DistgradError
from distgrad.rpc._leader import Leadership
from distgrad.rpc.activity import Activity, activity
from distgrad.rpc.future import Future
from distgrad.rpc.waiting import Task, Waiter, WaitingThreads
from distgrad.transport._stream import Poller

__all__ = ["Crew"]

_SPARE_S = 10.0  # how long a surplus thread waits for work before it ends
_FOREVER_S = 3600.0

_log = logging.getLogger("distgrad")


class Crew:
    """Runs the poll loop and the tasks of one worker.

    Parameters
    ----------
    name
        Of the worker, for thread names.
    poller
        Polled by whoever leads.
    on_events
        Takes what `Poller.poll` returned; runs on the leader, must not block.
    on_tick
        Called by the leader when `wake_at` has passed; returns the next such time.
    max_threads
        Most serving threads.
    """

    def __init__(
        self,
        name: str,
        poller: Poller,
        on_events: Callable[[list[Any]], None],
        on_tick: Callable[[float], float],
        max_threads: int,
    ) -> None:
        self.name = name
        self.poller = poller
        self.base_activity: Activity | None = None
        self.closed = False
        self.wake_at = float("inf")
        self.busy = 0
        self._on_events = on_events
        self._on_tick = on_tick
        self._max_threads = max_threads
        self._leadership = Leadership(poller)
        self._leader_thread = 0
        self._awaited: Future | None = None  # what the leading thread waits for
        self._resident_leads = False
        self._backlog: deque[Task] = deque()
        self._followers: deque[Waiter] = deque()
        self._waiting = WaitingThreads()
        self._watch = threading.Lock()
        self._summoned = False
        self._spares: deque[SimpleQueue[bool]] = deque()
        self._threads: set[threading.Thread] = set()

    def start(self) -> None:
        """Start the first serving thread."""
        self._spawn()

    @property
    def thread_count(self) -> int:
        """Number of serving threads."""
        return len(self._threads)

    @property
    def idle(self) -> bool:
        """Whether no task runs or waits."""
        return self.busy == 0 and not self._backlog

    # --- waiting -----------------------------------------------------------------------

    def wait(self, future: Future, deadline: float | None) -> None:
        """Block until the future is done or the deadline (`time.monotonic`) has passed."""
        waiter = self._waiting.enter(future.chain)
        try:
            while not future.done():
                if self.closed:
                    raise DistgradError(f"cannot wait on worker {self.name!r}: it was shut down")
                if waiter.leads or self._leadership.try_lead():
                    self._lead(waiter, future, deadline)
                else:
                    self._follow(waiter, future, deadline)
                self._run_own(waiter)
                if deadline is not None and time.monotonic() >= deadline:
                    return
        finally:
            self._exit(waiter)

    def polls_here(self) -> bool:
        """Whether the calling thread is the leader, in the middle of a poll."""
        return self._leader_thread == threading.get_ident()

    def rouse(self, future: Future) -> None:
        """Wake the leader if it waits for this future, which another thread completed."""
        if self._awaited is future and self._leader_thread != threading.get_ident():
            self.poller.wake()

    def drain(self, connection: Any) -> None:
        """Block until the kernel has taken all that was sent on a connection."""
        waiter = Waiter(None, None)
        sent = Future(agent=None)
        try:
            while not connection.flushed() and not connection.closed and not self.closed:
                until = time.monotonic() + 0.001
                if waiter.leads or self._leadership.try_lead():
                    self._lead(waiter, sent, until)
                else:
                    self._follow(waiter, sent, until)
        finally:
            self._exit(waiter)

    def _exit(self, waiter: Waiter) -> None:
        self._waiting.leave(waiter)
        if waiter.leads:
            waiter.leads = False
            self._pass_on()
        while waiter.tasks:  # given in the last moment
            self._enqueue(waiter.tasks.popleft())

    def _run_own(self, waiter: Waiter) -> None:
        if waiter.tasks and waiter.leads:  # woken by a task and picked to lead at once
            waiter.leads = False
            self._pass_on()
        while waiter.tasks:
            self._run(waiter.tasks.popleft())

    def _lead(self, waiter: Waiter, future: Future, deadline: float | None) -> None:
        waiter.leads = True
        self._leader_thread = threading.get_ident()
        self._awaited = future
        try:
            while not future.done() and not waiter.tasks:
                self._poll_once(deadline)
                if self._backlog:
                    self._call_hands()
                if deadline is not None and time.monotonic() >= deadline:
                    return
        finally:
            waiter.leads = False
            self._awaited = None
            self._leader_thread = 0
            self._pass_on()

    def _poll_once(self, deadline: float | None) -> None:
        now = time.monotonic()
        until = self.wake_at if deadline is None or deadline > self.wake_at else deadline
        events = self.poller.poll(min(max(until - now, 0.0), _FOREVER_S), True)
        if events:
            self._on_events(events)
        if time.monotonic() >= self.wake_at:
            self.wake_at = float("inf")  # first, so that a time set meanwhile is not lost
            next_tick = self._on_tick(time.monotonic())
            if next_tick < self.wake_at:
                self.wake_at = next_tick

    def _follow(self, waiter: Waiter, future: Future, deadline: float | None) -> None:
        if waiter.mailbox is None:
            waiter.mailbox = SimpleQueue()
        if not future._add_waiter(waiter.wake):
            return
        self._followers.append(waiter)
        try:
            if not waiter.tasks and not self._leads_after_all(waiter):
                if self._resident_leads:
                    self.poller.wake()  # it hands the role to the thread that waits
                patience = None if deadline is None else max(0.0, deadline - time.monotonic())
                with contextlib.suppress(Empty):
                    waiter.mailbox.get(timeout=patience)
        finally:
            future._drop_waiter(waiter.wake)
            self._unfollow(waiter)

    def _leads_after_all(self, waiter: Waiter) -> bool:
        # The leader may have left between our try and our entry among the followers.
        if not self._leadership.try_lead():
            return False
        self._unfollow(waiter, keep_role=True)
        return True

    def _unfollow(self, waiter: Waiter, keep_role: bool = False) -> None:
        try:
            self._followers.remove(waiter)
        except ValueError:
            if keep_role and not waiter.leads:
                raise AssertionError("the role was free and handed over") from None
            # Picked to lead: the grant is made or a few instructions away.
            while not waiter.leads:
                assert waiter.mailbox is not None
                waiter.mailbox.get()
            return
        if keep_role:
            waiter.leads = True

    def _pass_on(self) -> None:
        try:
            heir = self._followers.popleft() if self._followers else None
        except IndexError:  # it stopped waiting at this moment
            heir = None
        if heir is None:
            self._leadership.leave()
            return
        heir.leads = True
        heir.wake()

    # --- tasks -------------------------------------------------------------------------

    def submit(self, task: Task, chain: Hashable = None) -> None:
        """Run a task: on the thread that waits for ``chain``, or on a serving thread.

        Any thread may call this. The task runs in a fresh `contextvars.Context`.
        """
        waiter = self._waiting.find(chain) if chain else None
        if waiter is not None:
            self._give(waiter, task)
        else:
            self._enqueue(task)

    def _give(self, waiter: Waiter, task: Task) -> None:
        waiter.tasks.append(task)
        if waiter.over:  # it left meanwhile, and may or may not have seen the task
            with contextlib.suppress(ValueError):
                waiter.tasks.remove(task)
                self._enqueue(task)
        elif waiter.mailbox is not None:
            waiter.wake()
        if waiter.leads and self._leader_thread != threading.get_ident():
            self.poller.wake()

    def _enqueue(self, task: Task) -> None:
        self._backlog.append(task)
        self._leadership.work = 1
        if self._leader_thread != threading.get_ident():
            self._call_hands()

    def withdraw(self, wanted: Callable[[Task], bool]) -> bool:
        """Take a task that has not started out of the backlog; False if none matched."""
        for task in list(self._backlog):
            if wanted(task):
                with contextlib.suppress(ValueError):
                    self._backlog.remove(task)
                    return True
        return False

    def _call_hands(self) -> None:
        """See to it that a serving thread takes up the backlog."""
        if self._resident_leads:
            self.poller.wake()
        else:
            self._ensure_watcher()
            self._leadership.ring()

    def _run(self, task: Task) -> None:
        self.busy += 1
        try:
            contextvars.Context().run(self._perform, task)
        except Exception:
            _log.exception("a task of worker %r failed", self.name)
        finally:
            self.busy -= 1

    def _perform(self, task: Task) -> None:
        if self.base_activity is not None:
            activity.set(self.base_activity)
        task()

    # --- serving threads ---------------------------------------------------------------

    def _serve(self) -> None:
        self._summoned = False
        try:
            while not self.closed:
                task = self._take()
                if task is not None:
                    self._ensure_watcher()
                    self._run(task)
                elif self._leadership.try_lead():
                    self._lead_resident()
                elif not self._stand_by():
                    return
        finally:
            self._threads.discard(threading.current_thread())

    def _take(self) -> Task | None:
        while self._backlog:
            try:
                task = self._backlog.popleft()
            except IndexError:  # another thread was faster
                break
            self._leadership.taken += 1
            return task
        self._leadership.work = 0
        if self._backlog:
            self._leadership.work = 1
        return None

    def _lead_resident(self) -> None:
        self._resident_leads = True
        self._leader_thread = threading.get_ident()
        try:
            while not self._backlog and not self._followers and not self.closed:
                self._poll_once(None)
        finally:
            self._resident_leads = False
            self._leader_thread = 0
            self._pass_on()

    def _stand_by(self) -> bool:
        """Watch, or wait for work as a spare; False if this thread is not needed."""
        if self._watch.acquire(blocking=False):
            try:
                self._leadership.watch(config.grace_us * 1e-6)
            finally:
                self._watch.release()
            return True
        needed = self._wait_as_spare()
        if needed:
            self._summoned = False
        return needed

    def _wait_as_spare(self) -> bool:
        mailbox: SimpleQueue[bool] = SimpleQueue()
        self._spares.append(mailbox)
        try:
            return mailbox.get(timeout=_SPARE_S)
        except Empty:
            try:
                self._spares.remove(mailbox)
            except ValueError:
                return mailbox.get()  # called at the same moment
            return False

    def _ensure_watcher(self) -> None:
        if self._watch.locked() or self._summoned:
            return
        self._summoned = True
        try:
            self._spares.popleft().put(True)
        except IndexError:
            self._spawn()

    def _spawn(self) -> None:
        if len(self._threads) >= self._max_threads or self.closed:
            self._summoned = False
            return
        number = len(self._threads)
        thread = threading.Thread(
            target=self._serve, name=f"distgrad-{self.name}-{number}", daemon=True
        )
        self._threads.add(thread)
        thread.start()

    def close(self, timeout_s: float) -> None:
        """End the serving threads that do not run user code; join them briefly."""
        self.closed = True
        self._leadership.close()
        self.poller.wake()
        while self._spares:
            self._spares.popleft().put(False)
        for waiter in list(self._followers):
            waiter.wake()
        until = time.monotonic() + timeout_s
        for thread in list(self._threads):
            started = thread.ident is not None
            if started and thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
