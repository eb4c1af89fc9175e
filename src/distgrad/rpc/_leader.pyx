"""The poll role of a worker, and the watch over it (leader/follower)."""

from libc.math cimport INFINITY

cdef extern from "transport/_wait.h":
    double now_s "distgrad_now"() noexcept nogil
    void ring_bell "distgrad_ring_bell"(int *bell) noexcept nogil
    int sleep_by_bell "distgrad_sleep_by_bell"(int *bell, double until_s) noexcept nogil

cdef extern from *:
    """
    #define distgrad_fence() __sync_synchronize()
    """
    void distgrad_fence() noexcept nogil

cdef double SHARE = 1.0 / 16.0      # of the time without need that may pass before the next look
cdef double SHORTEST_S = 50e-6      # between two looks, whatever the grace period,
cdef double LONGEST_S = 0.1         # which may become shorter meanwhile
cdef double ON_THE_WAY_S = 5e-3     # a thread may need for a processor and the GIL


cdef class Leadership:
    """The right to poll one worker's connections.

    Parameters
    ----------
    poller
        The poller whose polling thread this role names.
    """

    def __cinit__(self, Poller poller not None):
        self.poller = poller
        self.freed_at = self.left_at = self.calm_since = now_s()

    cpdef bint try_lead(self) noexcept:
        """Take the role if it is free. Never blocks."""
        if self.held:
            return False
        self.held = 1
        return True

    cpdef void leave(self) noexcept:
        """Give the role up; rings the watcher if it sleeps without a limit."""
        self.freed_at = self.left_at = now_s()
        self.held = 0
        distgrad_fence()
        if self.dormant:
            self.dormant = 0
            ring_bell(&self.bell)

    cdef void expect(self) noexcept:
        """Note that a thread was roused, and will see to the role unless it lies free for long."""
        self.coming += 1

    cdef void note_arrived(self) noexcept:
        """Note that a thread that was roused runs; the grace period begins anew."""
        self.coming -= 1
        self.freed_at = now_s()

    cdef void note_work(self) noexcept:
        """Note that a task waits for a serving thread."""
        if not self.work:
            self.taken_at = now_s()
            self.work = 1

    cdef void note_taken(self, bint more) noexcept:
        """Note that a serving thread took one, and whether there are more."""
        self.taken_at = now_s()
        self.work = more

    cpdef void ring(self) noexcept:
        """Wake the watcher: there is work for it."""
        self.rung = 1
        ring_bell(&self.bell)

    def close(self) -> None:
        """End watching for good."""
        self.closed = 1
        ring_bell(&self.bell)

    def watch(self) -> None:
        """Block until the role lay free for `grace_s` seconds or the bell rings.

        Runs without the GIL, so that a look never disturbs a thread that computes.
        """
        cdef double now, due, rest_s
        cdef bint rested = False    # then a role that is free may be so since just now
        with nogil:
            while not self.closed and not self.rung:
                self.looks += 1
                if self.held and self.poller.sleeping and not self.work:
                    self._sleep()
                    continue
                now = now_s()
                due = self._due()
                if due <= now:
                    break
                rest_s = min(SHARE * (now - self.calm_since), self.longest_s)
                rest_s = max(rest_s, self.grace_s, SHORTEST_S)
                rested = due == INFINITY or not (rested or rest_s <= self.grace_s)
                due = now + rest_s if rested else min(due, now + rest_s)
                self._pause(min(due, now + LONGEST_S))
        # While this thread waited for the GIL another may have come: one that had it, but no
        # processor. It was not needed then.
        if not self.rung and (not self.held or self.work):
            self.calm_since = now_s()
        self.rung = 0

    cdef double _due(self) noexcept nogil:
        """Return when the watcher has to step in, if nothing happens until then."""
        cdef double due = INFINITY
        if not self.held:
            due = self.left_at + max(self.grace_s, ON_THE_WAY_S)
            if not self.coming:
                due = min(due, self.freed_at + self.grace_s)
        if self.work:
            due = min(due, self.taken_at + self.grace_s)
        return due

    cdef void _sleep(self) noexcept nogil:
        # No time limit: the leader polls, and whoever ends that rings the bell.
        cdef double began = now_s()
        self.dormant = 1
        distgrad_fence()
        if self.held and self.poller.sleeping and not self.work and not self.rung:
            self._pause(INFINITY)
        self.dormant = 0
        self.calm_since += now_s() - began      # an idle worker says nothing about its tasks

    cdef void _pause(self, double until_s) noexcept nogil:
        """Sleep until the bell is rung, or a time; whoever rings has said why before."""
        sleep_by_bell(&self.bell, until_s)
        self.bell = 0
        distgrad_fence()
