# Who polls.  Exactly one thread of a worker polls its connections at a time: the leader.
#
# Invariants
#   1. `held` is set by try_lead and cleared by leave only, both with the GIL.
#   2. A free role is noticed: either a thread takes it at once, or the watcher does
#      after one whole grace period in which nobody took it, or was on the way to; but after
#      5 ms in any case, for threads on their way may rouse each other.
#   3. Tasks that wait for a whole grace period without any being taken rouse the watcher.
#   4. The watcher never looks while the leader sleeps in the kernel (an idle worker
#      burns nothing); whoever leaves the role then rings the bell.
#   5. All looks together cost little, and so do all delays: while the watcher is not needed and
#      the worker not idle, it looks ever more rarely: 2 and 3 hold later by a sixteenth of that
#      time or `longest_s`, whichever is less. A timer that wakes a thread costs 4 µs of a
#      processor, and 20 to 50 on a virtual machine.

from distgrad.transport._poller cimport Poller

cdef class Leadership:
    cdef:
        Poller poller                # whose sleep the watcher looks at
        int bell                     # by which the watcher sleeps, see transport/_wait.h
        volatile int held            # a thread leads
        volatile int dormant         # the watcher sleeps without a time limit
        volatile int rung            # the bell was rung for work, not for a change of leader
        volatile int closed          # no more watching
        volatile int work            # tasks wait for a serving thread
        volatile int coming          # threads that were roused and do not run yet
        volatile double freed_at     # when the role was left or a thread arrived (monotonic s)
        volatile double left_at      # when the role was left
        volatile double taken_at     # when a task was last taken, or came while there was none
        double calm_since            # when the watcher was last needed
        public double grace_s        # how long the role may lie free
        public double longest_s      # between two looks
        readonly unsigned long looks  # of the watcher so far

    cpdef bint try_lead(self) noexcept
    cpdef void leave(self) noexcept
    cdef void expect(self) noexcept
    cdef void note_arrived(self) noexcept
    cpdef void ring(self) noexcept
    cdef void note_work(self) noexcept
    cdef void note_taken(self, bint more) noexcept
    cdef double _due(self) noexcept nogil
    cdef void _sleep(self) noexcept nogil
    cdef void _pause(self, double until_s) noexcept nogil
