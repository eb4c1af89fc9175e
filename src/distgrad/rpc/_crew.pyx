# cython: auto_pickle=False, autotestdict=False
"""Who polls, who serves, who waits: the steps that every call takes.

The thread that waits for an answer polls for it itself; the thread that received a request
serves it; other threads are roused only when these two are not enough. A wake-up costs
more than everything else a small call does.

C1  One thread polls at a time: the holder of `Leadership`.
C2  A leader never runs user code: it gives the role up first.
C3  Whoever gives the role up hands it to a thread that waits, if there is one; otherwise it
    lies free, and the watcher takes it after the grace period.
C4  While a task runs on a serving thread, another thread watches or is on its way.
C5  A task of a chain may run on the thread that waits for that chain: the waiting thread
    could not go on before the task ends, wherever it ran. So tasks that come once the future
    is done go to a serving thread.
C6  An event that was polled is taken in, even if a signal handler raises meanwhile: what was
    not taken in stays in `unread`, where the next leader finds it.

State changes under the GIL. Python runs signal handlers only where compiled code calls out,
so an exception such as KeyboardInterrupt can come only from a wait or from a callback.
"""

import contextlib
import logging
from _queue import Empty, SimpleQueue
from collections import deque

from cpython.contextvars cimport PyContext_Enter, PyContext_Exit, PyContext_New
from libc.math cimport INFINITY

from distgrad.rpc._activity cimport enter_activity
from distgrad.rpc._future cimport IS_PENDING

from distgrad.config import config
from distgrad.errors import DistgradError

cimport cython

cdef extern from "transport/_wait.h":
    double now_s "distgrad_now"() noexcept nogil

cdef extern from "pythread.h" nogil:
    unsigned long PyThread_get_thread_ident()

cdef double LONGEST_S = 3600.0     # of one poll
cdef double ASLEEP_S = 0.5         # a thread that was to look again at once did not run meanwhile

cdef object _log = logging.getLogger("distgrad")


@cython.final
@cython.freelist(8)
cdef class Waiter:
    """A thread that waits for a future."""

    cpdef wake(self):
        """Rouse the thread if it sleeps, or when it goes to sleep next."""
        if self.mailbox is not None:
            self.mailbox.put(None)


cdef class Job:
    """A task that sets its own activity."""

    cdef int perform(self) except -1:
        raise NotImplementedError

    def __call__(self):
        """Run the task."""
        self.perform()


cdef class CrewCore(Desk):
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
    """

    def __init__(self, str name not None, poller, on_events, on_tick):
        self.name = name
        self.poller = poller
        self.on_events = on_events
        self.on_tick = on_tick
        self.wake_at = INFINITY
        self.leadership = Leadership(poller)
        self.backlog = deque()
        self.followers = deque()
        self.innermost = {}

    @property
    def idle(self):
        """Whether no task runs or waits."""
        return self.busy == 0 and not self.backlog

    # --- who waits for which chain ------------------------------------------------------

    cdef Waiter enter(self, object chain):
        """Note that this thread begins to wait for a chain; None and 0 are no chain."""
        cdef Waiter waiter = Waiter.__new__(Waiter), previous
        waiter.thread = PyThread_get_thread_ident()
        waiter.chain = chain
        if not chain:
            return waiter
        previous = self.innermost.get(chain)
        if previous is not None:
            waiter.previous = previous
            if previous.thread == waiter.thread:
                waiter.depth = previous.depth + 1
        self.innermost[chain] = waiter
        return waiter

    cdef int leave(self, Waiter waiter) except -1:
        """Note that a thread waits no longer."""
        cdef Waiter previous = waiter.previous
        waiter.over = True
        if not waiter.chain or self.innermost.get(waiter.chain) is not waiter:
            return 0
        while previous is not None and previous.over:
            previous = previous.previous
        if previous is not None:
            self.innermost[waiter.chain] = previous
        else:
            self.innermost.pop(waiter.chain, None)
        waiter.previous = None
        return 0

    cdef Waiter find(self, object chain):
        """Return the thread that may run a task of a chain on its stack, if there is one."""
        cdef Waiter waiter = self.innermost.get(chain)
        if waiter is None or waiter.over or waiter.runs or waiter.depth >= config.inline_depth:
            return None
        return waiter

    # --- waiting --------------------------------------------------------------------------

    cdef int wait_for(self, Future future, double deadline) except -1:
        cdef Waiter waiter
        if self.polls_here():
            raise DistgradError(
                f"cannot wait on worker {self.name!r} in a signal handler or destructor: "
                "it interrupts the thread that receives the answers",
                hint="start the call with rpc_async there, or call from another thread",
            )
        waiter = self.enter(future.chain)
        try:
            while future._state == IS_PENDING:
                if self.closed:
                    raise DistgradError(f"cannot wait on worker {self.name!r}: it was shut down")
                if waiter.leads or self.leadership.try_lead():
                    self.lead(waiter, future, deadline)
                else:
                    self.follow(waiter, future, deadline)
                if future._state != IS_PENDING:
                    break
                if waiter.tasks is not None:
                    self.run_own(waiter)
                if deadline < INFINITY and now_s() >= deadline:
                    break
        finally:
            self.exit(waiter)
        return 0

    cpdef bint polls_here(self) except -1:
        """Whether the calling thread is the leader, in the middle of a poll."""
        return self.leader_thread == PyThread_get_thread_ident()

    cdef int rouse(self, Future future) except -1:
        if self.awaited is future and self.leader_thread != PyThread_get_thread_ident():
            self.poller.wake()
        return 0

    def drain(self, connection, double deadline=INFINITY):
        """Block until the kernel has taken all that was sent on a connection.

        Returns
        -------
        bool
            False if the peer has taken nothing for ``config.stall_timeout`` seconds, or the
            deadline has passed.
        """
        cdef Waiter waiter = Waiter.__new__(Waiter)
        cdef Future sent = Future.__new__(Future)
        cdef double now = now_s(), before_now, until, since = now
        progress = None
        try:
            while not (connection.flushed() or connection.closed or self.closed):
                before_now, now = now, now_s()
                before, progress = progress, connection.progress()
                # Who was stopped itself does not know what the peer could have taken meanwhile.
                if progress is None or progress != before or now - before_now > ASLEEP_S:
                    since = now
                elif now - since > config.stall_timeout:
                    return False
                if now >= deadline:
                    return False
                until = min(now + 0.001, deadline)
                if waiter.leads or self.leadership.try_lead():
                    self.lead(waiter, sent, until, connection)
                else:
                    self.follow(waiter, sent, until)
        finally:
            self.exit(waiter)
        return True

    cdef int exit(self, Waiter waiter) except -1:
        self.leave(waiter)
        if waiter.leads:
            waiter.leads = False
            self.pass_on()
        while waiter.tasks:     # given in the last moment
            self.enqueue(waiter.tasks.popleft())
        return 0

    cdef int run_own(self, Waiter waiter) except -1:
        if waiter.tasks and waiter.leads:   # woken by a task and picked to lead at once
            waiter.leads = False
            self.pass_on()
        if not waiter.tasks:        # taken back meanwhile
            return 0
        task = waiter.tasks.popleft()
        waiter.runs = True          # what arrives now may be what this task will wait for
        try:
            while waiter.tasks:
                self.enqueue(waiter.tasks.popleft())
            self.run(task)
        finally:
            waiter.runs = False
        return 0

    cdef int lead(
        self, Waiter waiter, Future future, double deadline, object connection=None
    ) except -1:
        """Poll until a future is done, a task comes, the time is over, or all is sent."""
        waiter.leads = True
        self.leader_thread = PyThread_get_thread_ident()
        self.awaited = future
        try:
            if self.backlog:        # now that this thread waits, another may serve in its place
                self.call_hands()
            while future._state == IS_PENDING and not waiter.tasks:
                self.poll_once(deadline)
                if self.backlog:
                    self.call_hands()
                if deadline < INFINITY and now_s() >= deadline:
                    break
                if connection is not None and connection.flushed():
                    break
        finally:
            waiter.leads = False
            self.awaited = None
            self.leader_thread = 0
            self.pass_on()
        return 0

    cdef int lead_resident(self) except -1:
        self.resident_leads = True
        self.leader_thread = PyThread_get_thread_ident()
        try:
            while not self.backlog and not self.followers and not self.closed:
                self.poll_once(INFINITY)
        finally:
            self.resident_leads = False
            self.leader_thread = 0
            self.pass_on()
        return 0

    cdef int poll_once(self, double deadline) except -1:
        cdef double patience = LONGEST_S
        cdef double until = min(deadline, self.wake_at)
        if self.unread is None:
            if until < INFINITY:
                patience = min(max(until - now_s(), 0.0), LONGEST_S)
            self.unread = self.poller.poll(patience, True)
        if self.unread:
            self.on_events(self.unread)
        self.unread = None
        if self.wake_at < INFINITY and now_s() >= self.wake_at:
            self.tick()
        return 0

    cdef int tick(self) except -1:
        cdef double next_tick
        self.wake_at = INFINITY     # first, so that a time set meanwhile is not lost
        try:
            next_tick = self.on_tick(now_s())
        except BaseException:
            self.wake_at = 0.0
            raise
        if next_tick < self.wake_at:
            self.wake_at = next_tick
        return 0

    cdef int follow(self, Waiter waiter, Future future, double deadline) except -1:
        if waiter.mailbox is None:
            waiter.mailbox = SimpleQueue()
        wake = waiter.wake
        if not future.add_waiter(wake):
            return 0
        self.followers.append(waiter)
        try:
            if not waiter.tasks and not self.leads_after_all(waiter):
                if self.resident_leads:
                    self.poller.wake()      # it hands the role to the thread that waits
                elif self.backlog:
                    self.call_hands()       # as in lead
                if deadline == INFINITY:
                    waiter.mailbox.get()
                else:
                    with contextlib.suppress(Empty):
                        waiter.mailbox.get(True, max(0.0, deadline - now_s()))
        finally:
            future.drop_waiter(wake)
            self.unfollow(waiter, False)
        return 0

    cdef bint leads_after_all(self, Waiter waiter) except -1:
        # The leader may have left between our try and our entry among the followers.
        if not self.leadership.try_lead():
            return False
        self.unfollow(waiter, True)
        return True

    cdef int unfollow(self, Waiter waiter, bint keep_role) except -1:
        if waiter in self.followers:
            self.followers.remove(waiter)
            if keep_role:
                waiter.leads = True
        else:
            assert waiter.leads, "the role was handed over before its new holder was told"
        return 0

    cdef int pass_on(self) except -1:
        cdef Waiter heir
        if self.followers:
            heir = self.followers.popleft()
            heir.leads = True
            heir.wake()
        else:
            self.leadership.leave()
        return 0

    # --- tasks -----------------------------------------------------------------------------

    def submit(self, task, chain=None):
        """Run a task: on the thread that waits for ``chain``, or on a serving thread.

        Any thread may call this. The task runs in a fresh `contextvars.Context`.
        """
        self.accept(task, chain)

    cdef int accept(self, object task, object chain) except -1:
        cdef Waiter waiter = self.find(chain) if chain else None
        if waiter is not None:
            return self.give(waiter, task)
        return self.enqueue(task)

    cdef int give(self, Waiter waiter, object task) except -1:
        if waiter.tasks is None:
            tasks = deque()
            if waiter.tasks is None:
                waiter.tasks = tasks
        if waiter.over:             # it left meanwhile
            return self.enqueue(task)
        waiter.tasks.append(task)
        if waiter.mailbox is not None:
            waiter.wake()
        if waiter.leads and self.leader_thread != PyThread_get_thread_ident():
            self.poller.wake()
        return 0

    cdef int enqueue(self, object task) except -1:
        self.backlog.append(task)
        self.leadership.work = 1
        if self.leader_thread != PyThread_get_thread_ident():
            self.call_hands()
        return 0

    def withdraw(self, wanted):
        """Take a task that has not started back, whoever has it; False if none matched."""
        cdef Waiter waiter
        queues = [self.backlog]
        for waiter in list(self.innermost.values()):
            if waiter.tasks:
                queues.append(waiter.tasks)
        for queue in queues:
            for task in list(queue):
                if wanted(task):
                    with contextlib.suppress(ValueError):
                        queue.remove(task)
                        return True
        return False

    def count_waiting(self, threads):
        """Return how many of some threads wait for a future, and so serve nobody else."""
        cdef Waiter waiter
        waiting = set()
        for waiter in [*self.innermost.values(), *self.followers]:
            while waiter is not None:
                if not waiter.over and not waiter.runs:
                    waiting.add(waiter.thread)
                waiter = waiter.previous
        if self.awaited is not None:
            waiting.add(self.leader_thread)
        return sum([thread.ident in waiting for thread in threads])

    cdef int call_hands(self) except -1:
        """See to it that a serving thread takes up the backlog."""
        if self.resident_leads:
            self.poller.wake()
        else:
            self.ensure_watcher()
            self.leadership.ring()
        return 0

    cdef int ensure_watcher(self) except -1:
        if not self.watched and not self.summoned:
            self.summoned = True
            self._summon()
        return 0

    cdef int run(self, object task) except -1:
        context = PyContext_New()
        self.busy += 1
        PyContext_Enter(context)
        try:
            if isinstance(task, Job):
                (<Job>task).perform()
            else:
                if self.base_activity is not None:
                    enter_activity(self.base_activity)
                task()
        except Exception:
            _log.exception("a task of worker %r failed", self.name)
        finally:
            PyContext_Exit(context)
            self.busy -= 1
        return 0

    # --- serving threads -------------------------------------------------------------------

    def _serve_until_surplus(self):
        """Serve, lead and watch until the crew is closed or does not need this thread."""
        while not self.closed:
            task = self.take()
            if task is not None:
                self.ensure_watcher()
                self.run(task)
                task = None
            elif self.leadership.try_lead():
                self.lead_resident()
            elif not self.watched:
                self.watched = True
                try:
                    self.leadership.watch(config.grace_us * 1e-6)
                finally:
                    self.watched = False
            elif not self._wait_as_spare():
                return

    cdef object take(self):
        if self.backlog:
            self.leadership.taken += 1
            return self.backlog.popleft()
        self.leadership.work = 0
        return None
