# Who polls.  Exactly one thread of a worker polls its connections at a time: the leader.
#
# Invariants
#   1. `held` is set by try_lead and cleared by leave only, both with the GIL.
#   2. A free role is noticed: either a thread takes it at once, or the watcher does
#      after one whole grace period in which nobody took it.
#   3. Tasks that wait for a whole grace period without any being taken rouse the watcher.
#   4. The watcher never ticks while the leader sleeps in the kernel (an idle worker
#      burns nothing); whoever leaves the role then rings the bell.

from distgrad.transport._poller cimport Poller

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass
    int sem_init(sem_t *sem, int pshared, unsigned int value)
    int sem_destroy(sem_t *sem)
    int sem_post(sem_t *sem)
    int sem_wait(sem_t *sem)

cdef class Leadership:
    cdef:
        Poller poller                # whose sleep the watcher looks at
        sem_t bell                   # rung to wake the watcher
        volatile int held            # a thread leads
        volatile int dormant         # the watcher sleeps without a time limit
        volatile int rung            # the bell was rung for work, not for a change of leader
        volatile int closed          # no more watching
        volatile unsigned long epoch  # grows when the role is taken; tells a tick that all is well
        public double grace_s        # how long the role may lie free; read at every tick
        public volatile int work     # tasks wait for a serving thread
        public unsigned long taken   # tasks taken so far; tells a tick that they move on

    cpdef bint try_lead(self) noexcept
    cpdef void leave(self) noexcept
    cdef void excuse(self) noexcept
    cpdef void ring(self) noexcept
    cdef int _tick(self) noexcept nogil
    cdef void _sleep(self) noexcept nogil
