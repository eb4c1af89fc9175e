"""The poll loop and the tasks of one worker at C level; ``crew.py`` has the rare half."""

from distgrad.rpc._activity cimport Activity
from distgrad.rpc._future cimport Desk, Future
from distgrad.rpc._leader cimport Leadership
from distgrad.transport._poller cimport Poller


cdef class CrewCore(Desk)

# Whether a waiting thread sleeps. AWAKE -> ASLEEP -> (READY ->) ROUSED -> AWAKE; asleep and
# ready threads wake by themselves when their time is over.
cdef enum Sleep:
    AWAKE = 0
    ASLEEP = 1
    READY = 2       # has a reason to wake; who polls, waits or steps aside next will rouse it
    ROUSED = 3      # its bell was rung


cdef class Waiter:
    """A thread that waits for a future."""

    cdef CrewCore crew             # whose future
    cdef object chain              # the chain it waits for; its tasks may run on this thread
    cdef Waiter previous           # who waited for the chain before
    cdef unsigned long thread      # the thread
    cdef int depth                 # waiting threads of the same chain below on this stack
    cdef object tasks              # deque of tasks given to this thread; None without
    cdef bint leads                # the role was handed to this thread, or it polls
    cdef bint runs                 # it runs a task given to it, and looks for no other
    cdef bint over                 # it waits no longer
    cdef Sleep sleep               # whether it sleeps
    cdef int bell                  # by which it sleeps, see transport/_wait.h

    cdef int wake(self) except -1


cdef class Job:
    """A task that is compiled, and sets its own activity."""

    cdef int perform(self) except -1


cdef class CrewCore(Desk):
    cdef readonly str name         # of the worker
    cdef readonly Poller poller    # polled by whoever leads
    cdef public Activity base_activity     # what a task that is no Job begins with; or None
    cdef public double wake_at     # when on_tick is due (monotonic s)
    cdef readonly int busy         # tasks that run now
    cdef object on_events          # takes in a list of events and removes them from it
    cdef object on_tick            # called with the time; returns when to call it next
    cdef readonly Leadership leadership
    cdef unsigned long leader_thread       # who leads; 0 for nobody
    cdef Future awaited            # what the leading thread waits for; None without
    cdef bint takes_in             # the leader is behind the poll, see takes_in_here
    cdef bint resident_leads       # a serving thread leads
    cdef list unread               # events that were polled and not taken in; None without
    cdef readonly object backlog   # deque of tasks for serving threads
    cdef readonly dict followers   # the Waiters that sleep, oldest first -> None
    cdef object ready              # deque of those among them that are READY
    cdef public double turn_grace_s        # most that ready threads wait for a turn nobody takes
    cdef double stretch_s          # how long a thread takes from being roused to its next wait
    cdef dict innermost            # chain -> the Waiter that may run its tasks
    cdef public bint watched       # a thread watches
    cdef public bint summoned      # or is on its way to

    cdef Waiter enter(self, object chain)
    cdef int leave(self, Waiter waiter) except -1
    cdef Waiter find(self, object chain)
    cdef int wait_once(
        self, Waiter waiter, Future future, double deadline, object connection=*
    ) except -1
    cdef int exit(self, Waiter waiter) except -1
    cdef int run_own(self, Waiter waiter) except -1
    cdef int lead(
        self, Waiter waiter, Future future, double deadline, object connection=*
    ) except -1
    cdef int lead_resident(self) except -1
    cdef int poll_once(self, double deadline) except -1
    cdef int tick(self) except -1
    cdef int follow(self, Waiter waiter, Future future, double deadline) except -1
    cdef bint leads_after_all(self, Waiter waiter) except -1
    cdef bint sleep(self, Waiter waiter, double deadline) except -1
    cdef int get_up(self, Waiter waiter) except -1
    cdef bint takes_in_here(self) noexcept
    cdef bint take_turns(self) except -1
    cdef bint somebody_comes(self) except -1
    cdef int note_stretch(self) except -1
    cpdef int step_aside(self) except -1
    cpdef int rouse_ready(self) except -1
    cdef int *rouse_later(self, Waiter waiter) noexcept
    cdef int hand_on(self) except -1
    cdef int unfollow(self, Waiter waiter, bint keep_role) except -1
    cdef int pass_on(self) except -1
    cdef int set_pace(self, bint turns) except -1
    cdef int accept(self, object task, object chain) except -1
    cdef int give(self, Waiter waiter, object task) except -1
    cdef int enqueue(self, object task) except -1
    cdef int call_hands(self) except -1
    cdef int ensure_watcher(self) except -1
    cdef object take(self)
    cdef int run(self, object task) except -1
    cpdef bint polls_here(self) except -1
