# cython: auto_pickle=False, autotestdict=False
"""Who polls, who serves, who waits: the steps that every call takes.

The thread that waits for an answer polls for it itself; the thread that received a request
serves it; other threads are roused only when these two are not enough. A wake-up costs
more than everything else a small call does.

C1  One thread polls at a time: the holder of `Leadership`.
C2  A leader never runs user code: it gives the role up first.
C3  Whoever gives the role up hands it to a thread that waits, if there is one; otherwise, and
    where threads take turns, it lies free, and the watcher sees to it after the grace period.
C4  While a task runs on a serving thread, another thread watches or is on its way.
C5  A task of a chain may run on the thread that waits for that chain: the waiting thread
    could not go on before the task ends, wherever it ran. So tasks that come once the future
    is done go to a serving thread.
C6  An event that was polled is taken in, even if a signal handler raises meanwhile: what was
    not taken in stays in `unread`, where the next leader finds it.
C7  Who has a reason to wake is roused after the poll that brought it, not during it: the
    leader holds the GIL that the other would wait for.
C8  Where more threads sleep than there are processors, and each that wakes soon waits again,
    they take turns: a thread that begins to wait polls, unless another was roused and comes
    to do so; when it sleeps it rouses the next that is ready, and otherwise only when it steps
    aside, since it may not wait again. Everything a thread needs is so in the caches of one
    processor, and a wait costs one switch. If the thread that has the turn does not wait soon,
    or no watcher could notice that, C3 and C7 hold as ever.
C9  Who leads polls at least once, however many are roused meanwhile: those may rouse each other
    for ever, and none of them poll. So all that arrives is taken in, if late.

State changes under the GIL. Python runs signal handlers only where compiled code calls out,
so an exception such as KeyboardInterrupt can come only from a wait or from a callback.
"""

import contextlib
import logging
from collections import deque

from cpython.contextvars cimport PyContext_Enter, PyContext_Exit, PyContext_New
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR
from libc.math cimport INFINITY

from distgrad.rpc._activity cimport enter_activity
from distgrad.rpc._future cimport IS_PENDING

from distgrad.config import config
from distgrad.errors import DistgradError
from distgrad.rpc.failures import is_interrupt

cimport cython

cdef extern from "transport/_wait.h":
    double now_s "distgrad_now"() noexcept nogil
    void ring_bell "distgrad_ring_bell"(int *bell) noexcept nogil
    int sleep_by_bell "distgrad_sleep_by_bell"(int *bell, double until_s) noexcept nogil

cdef extern from *:
    """
    static _Thread_local double distgrad_up_since;
    """
    double up_since "distgrad_up_since"    # when this thread was last roused (monotonic s); or 0

cdef extern from "pythread.h" nogil:
    unsigned long PyThread_get_thread_ident()

cdef double LONGEST_S = 3600.0     # of one poll
cdef double ASLEEP_S = 0.5         # a thread that was to look again at once did not run meanwhile
cdef double LONGEST_LOOK = 16.0    # times the grace period, between two looks of the watcher
cdef double BRISK_S = 100e-6       # of stretches between waits that leave the next time to wait

cdef object _log = logging.getLogger("distgrad")


@cython.final
@cython.freelist(8)
cdef class Waiter:
    """A thread that waits for a future."""

    def __call__(self):
        """Wake the thread: the future that it waits for is done."""
        self.wake()

    cdef int wake(self) except -1:
        """See to it that the thread, if it sleeps, is roused (C7, C8)."""
        if self.sleep != ASLEEP:
            return 0
        if self.crew.takes_in_here():
            self.sleep = READY
            self.crew.ready.append(self)
        else:
            ring_bell(self.crew.rouse_later(self))
        return 0


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
        self.turn_grace_s = 200e-6
        self.leadership = Leadership(poller)
        self.backlog = deque()
        self.followers = {}
        self.ready = deque()
        self.innermost = {}

    @property
    def idle(self):
        """Whether no task runs or waits."""
        return self.busy == 0 and not self.backlog

    # --- who waits for which chain ------------------------------------------------------

    cdef Waiter enter(self, object chain):
        """Note that this thread begins to wait for a chain; None and 0 are no chain."""
        cdef Waiter waiter = Waiter.__new__(Waiter), previous
        waiter.crew = self
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
        if up_since > 0.0:
            self.note_stretch()
        try:
            while future._state == IS_PENDING:
                if self.closed:
                    raise DistgradError(f"cannot wait on worker {self.name!r}: it was shut down")
                self.wait_once(waiter, future, deadline)
                if future._state != IS_PENDING:
                    break
                if waiter.tasks is not None:
                    self.run_own(waiter)
                if deadline < INFINITY and now_s() >= deadline:
                    break
        finally:
            self.exit(waiter)
        return 0

    cdef int wait_once(
        self, Waiter waiter, Future future, double deadline, object connection=None
    ) except -1:
        if waiter.leads or (not self.somebody_comes() and self.leadership.try_lead()):
            return self.lead(waiter, future, deadline, connection)
        return self.follow(waiter, future, deadline)

    def awaits(self, Future future):
        """Whether the thread that leads waits for this future."""
        return self.awaited is future

    cpdef bint polls_here(self) except -1:
        """Whether the calling thread is the leader, in the middle of a poll."""
        return self.leader_thread == PyThread_get_thread_ident()

    cdef bint takes_in_here(self) noexcept:
        """Whether the calling thread leads and, after the poll, will look at all that changed.

        Not so in a signal handler or destructor that interrupts the poll itself.
        """
        return self.takes_in and self.leader_thread == PyThread_get_thread_ident()

    cdef int rouse(self, Future future) except -1:
        if self.awaited is future and not self.takes_in_here():
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
        cdef Waiter waiter = self.enter(None)
        cdef Future sent = Future.__new__(Future)
        cdef double now = now_s(), before_now, since = now
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
                self.wait_once(waiter, sent, min(now + 0.001, deadline), connection)
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
        cdef bint polled = False
        waiter.leads = True
        self.leader_thread = PyThread_get_thread_ident()
        self.awaited = future
        try:
            if self.backlog:        # now that this thread waits, another may serve in its place
                self.call_hands()
            self.rouse_ready()
            # Looked at before every poll, so that nobody is left ready while it blocks.
            while future._state == IS_PENDING and not waiter.tasks:
                if not self.somebody_comes():
                    self.poll_once(deadline)
                elif not polled:
                    self.poll_once(0.0)
                else:
                    break
                polled = True
                if self.backlog:
                    self.call_hands()
                self.rouse_ready()
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
                self.rouse_ready()
        finally:
            self.resident_leads = False
            self.leader_thread = 0
            self.hand_on()
        return 0

    cdef int poll_once(self, double deadline) except -1:
        cdef double patience = LONGEST_S
        cdef double until = min(deadline, self.wake_at)
        if self.unread is None:
            if until < INFINITY:
                patience = min(max(until - now_s(), 0.0), LONGEST_S)
            self.takes_in = False
            self.unread = self.poller.poll(patience, True)
            self.takes_in = True
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
        cdef bint interrupted = False
        waiter.sleep = ASLEEP
        if not future.add_waiter(waiter):
            return self.get_up(waiter)
        self.followers[waiter] = None
        try:
            if not waiter.tasks and not self.leads_after_all(waiter):
                if self.resident_leads:
                    self.poller.wake()      # it hands the role to the thread that waits
                elif self.backlog:
                    self.call_hands()       # as in lead
                interrupted = self.sleep(waiter, deadline)
        finally:
            future.drop_waiter(waiter)
            self.unfollow(waiter, False)
            self.get_up(waiter)
        if interrupted:     # a signal handler may wait itself: nobody must count on this waiter
            if waiter.leads:
                waiter.leads = False
                self.pass_on()
            PyErr_CheckSignals()
        return 0

    cdef bint sleep(self, Waiter waiter, double deadline) except -1:
        """Sleep until roused, or the time is over; rouse the next that is ready.

        Returns whether a signal came meanwhile.
        """
        cdef Waiter following
        cdef int *next_bell = NULL
        cdef int code
        self.rouse_ready()
        if self.ready:
            following = self.ready.popleft()
            next_bell = self.rouse_later(following)
        with nogil:
            if next_bell != NULL:       # now that the GIL is free for it
                ring_bell(next_bell)
            code = sleep_by_bell(&waiter.bell, deadline)
        return code == EINTR

    cdef int get_up(self, Waiter waiter) except -1:
        global up_since
        if waiter.sleep == ROUSED:
            self.leadership.note_arrived()
            up_since = now_s()
        elif waiter.sleep == READY:
            self.ready.remove(waiter)
        waiter.sleep = AWAKE
        waiter.bell = 0
        return self.rouse_ready()

    # --- turns ---------------------------------------------------------------------------

    cdef bint take_turns(self) except -1:
        """Whether C8 holds now."""
        return (
            len(self.followers) >= self.poller.cpus
            and self.watched
            and self.stretch_s < BRISK_S
            and not self.closed
        )

    cdef bint somebody_comes(self) except -1:
        """Whether the calling thread, if it waits, is to sleep: another will poll."""
        return (self.leadership.coming > 0 or len(self.ready) > 0) and self.take_turns()

    cdef int note_stretch(self) except -1:
        """Take in how long this thread did something else between two waits."""
        global up_since
        cdef double stretch_s = min(now_s() - up_since, 2.0 * BRISK_S)
        up_since = 0.0
        self.stretch_s += 0.25 * (stretch_s - self.stretch_s)
        return 0

    cpdef int rouse_ready(self) except -1:
        """Rouse all that are ready, unless each is roused when its turn comes."""
        if self.ready and not self.take_turns():
            while self.ready:
                ring_bell(self.rouse_later(self.ready.popleft()))
        return 0

    cpdef int step_aside(self) except -1:
        """Rouse the next that is ready: the calling thread may not wait again soon (C8)."""
        if self.ready and not self.leadership.coming:
            ring_bell(self.rouse_later(self.ready.popleft()))
        return 0

    cdef int *rouse_later(self, Waiter waiter) noexcept:
        """Note that a thread is roused; return the bell to be rung for it."""
        waiter.sleep = ROUSED
        self.leadership.expect()
        return &waiter.bell

    cdef bint leads_after_all(self, Waiter waiter) except -1:
        # The leader may have left between our try and our entry among the followers.
        if self.somebody_comes() or not self.leadership.try_lead():
            return False
        self.unfollow(waiter, True)
        return True

    cdef int unfollow(self, Waiter waiter, bint keep_role) except -1:
        if waiter in self.followers:
            del self.followers[waiter]
            if keep_role:
                waiter.leads = True
        else:
            assert waiter.leads, "the role was handed over before its new holder was told"
        return 0

    cdef int pass_on(self) except -1:
        """Give the role up, to somebody or, where threads take turns, nobody (C3)."""
        cdef bint turns = self.take_turns()
        self.set_pace(turns)
        if not turns:
            return self.hand_on()
        self.leadership.leave()
        return 0

    cdef int set_pace(self, bint turns) except -1:
        """Say how often the watcher is to look: as often as it may if ready threads wait for it."""
        cdef double grace_s = config.grace_us * 1e-6
        self.leadership.grace_s = min(grace_s, self.turn_grace_s) if turns else grace_s
        self.leadership.longest_s = 0.0 if turns else LONGEST_LOOK * grace_s
        return 0

    cdef int hand_on(self) except -1:
        """Give the role up, to somebody if there is one; the others that are ready wake too."""
        cdef Waiter heir
        if not self.followers:
            self.leadership.leave()
            return 0
        heir = next(iter(self.followers))
        del self.followers[heir]
        heir.leads = True
        if heir.sleep == READY:
            self.ready.remove(heir)
        if heir.sleep != ROUSED:
            ring_bell(self.rouse_later(heir))
        return self.rouse_ready()

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
        waiter.wake()
        if waiter.leads and not self.takes_in_here():
            self.poller.wake()
        return 0

    cdef int enqueue(self, object task) except -1:
        self.backlog.append(task)
        self.leadership.note_work()
        if not self.takes_in_here():
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
        except BaseException as error:
            if is_interrupt(error):
                raise
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
                if self.followers and self.leadership.try_lead():
                    self.hand_on()      # nobody watches now
                self.rouse_ready()
                self.run(task)
                task = None
            elif self.leadership.try_lead():
                self.lead_resident()
            elif not self.watched:
                self.watched = True
                try:
                    self.set_pace(self.take_turns())
                    self.leadership.watch()
                finally:
                    self.watched = False
            elif not self._wait_as_spare():
                return

    cdef object take(self):
        if not self.backlog:
            self.leadership.note_taken(False)   # this thread was woken for nothing
            return None
        task = self.backlog.popleft()
        self.leadership.note_taken(len(self.backlog) > 0)
        return task
