"""The poll role of a worker, and the watch over it (leader/follower)."""

from libc.errno cimport EINTR, errno
from libc.time cimport time_t

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    int CLOCK_REALTIME
    int clock_gettime(int clock, timespec *now)

cdef extern from "<semaphore.h>" nogil:
    int sem_timedwait(sem_t *sem, const timespec *until)

cdef extern from *:
    """
    #define distgrad_fence() __sync_synchronize()
    """
    void distgrad_fence() noexcept nogil

# What one tick of the watcher saw.
cdef enum Tick:
    RANG = 0        # the bell was rung
    IN_USE = 1      # the role was held or changed hands
    FREE = 2        # nobody took the role for a whole grace period
    ASLEEP = 3      # the leader sleeps in the kernel


cdef class Leadership:
    """The right to poll one worker's connections.

    Parameters
    ----------
    poller
        The poller whose polling thread this role names.
    """

    def __cinit__(self, Poller poller not None):
        self.poller = poller
        if sem_init(&self.bell, 0, 0) != 0:
            raise OSError("cannot create a semaphore")

    def __dealloc__(self):
        sem_destroy(&self.bell)

    cpdef bint try_lead(self) noexcept:
        """Take the role if it is free. Never blocks."""
        if self.held:
            return False
        self.held = 1
        self.epoch += 1
        return True

    cpdef void leave(self) noexcept:
        """Give the role up; rings the watcher if it sleeps without a limit."""
        self.held = 0
        distgrad_fence()
        if self.dormant:
            self.dormant = 0
            sem_post(&self.bell)

    cdef void excuse(self) noexcept:
        """Let the role lie free for another grace period: a thread is about to take it."""
        self.epoch += 1

    cpdef void ring(self) noexcept:
        """Wake the watcher: there is work for it."""
        self.rung = 1
        sem_post(&self.bell)

    def close(self) -> None:
        """End watching for good."""
        self.closed = 1
        sem_post(&self.bell)

    def watch(self) -> None:
        """Block until the role lay free for `grace_s` seconds or the bell rings.

        Runs without the GIL, so that a tick never disturbs a thread that computes.
        """
        cdef int seen = IN_USE
        with nogil:
            while not self.closed and seen == IN_USE:
                seen = self._tick()
                if seen == ASLEEP:
                    self._sleep()
                    seen = IN_USE
        self.rung = 0

    cdef void _sleep(self) noexcept nogil:
        # No time limit: the leader polls, and whoever ends that rings the bell.
        self.dormant = 1
        distgrad_fence()
        if self.held and self.poller.sleeping and not self.work and not self.rung:
            while sem_wait(&self.bell) != 0 and errno == EINTR:
                pass
        self.dormant = 0

    cdef int _tick(self) noexcept nogil:
        cdef unsigned long before = self.epoch, taken = self.taken
        cdef timespec until
        if self.rung:
            return RANG
        if self.held and self.poller.sleeping and not self.work:
            return ASLEEP
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_nsec += <long>(self.grace_s * 1e9)
        until.tv_sec += until.tv_nsec // 1000000000
        until.tv_nsec %= 1000000000
        while sem_timedwait(&self.bell, &until) != 0:
            if errno != EINTR:
                if self.work and self.taken == taken:
                    return RANG
                return IN_USE if self.held or self.epoch != before else FREE
        return RANG if self.rung else IN_USE
