# cython: auto_pickle=False, autotestdict=False
"""Lane: large payloads on a socket of their own; ``_lane.pxd`` is the map.

L1  A lane is read only while a message waits for its payload, and only into that payload:
    memory is taken when its first byte may come, not when it is announced.
L2  In one turn of the poller a lane moves at most TURN bytes each way, and it is never the
    connection that the poller reads directly: the other sockets have their turn in between,
    and so have threads that wait for the processor.
L3  A lane ends with its connection, and a fault of it ends the connection.
"""

from collections import deque

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t

from distgrad.transport._outlet cimport Outlet, failure
from distgrad.transport._poller cimport Poller as PollerType
from distgrad.transport._pool cimport Slab, shared

from distgrad.errors import TransportError

cimport cython

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLIN, EPOLLOUT

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    Py_ssize_t recv(int fd, void *data, size_t nbytes, int flags)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "transport/_wait.h":
    double now_s "distgrad_now"() noexcept nogil

cdef double CROWDED_S = 1e-3           # a yield longer than this went to another program
cdef double CROWDED_PAUSE_S = 0.05     # then none is tried for that long

cdef enum:
    TURN = 512 * 1024

cdef Py_ssize_t NOTHING = -EAGAIN


@cython.final
cdef class Arriving:
    """See ``_lane.pxd``."""


cdef class LaneOwner(Outlet):
    """A connection, as its lane sees it."""

    cdef int on_payload(self, list events) except -1:
        return 0

    cdef int on_lane_end(self, list events, object reason) except -1:
        return 0


@cython.final
cdef class Lane(Outlet):
    """The second socket of ``owner``; takes the descriptor over."""

    def __cinit__(self, PollerType poller not None, LaneOwner owner not None, int fd):
        self.owner = owner
        self.coming = deque()
        self.turn = TURN
        self.enter(poller, fd)

    def __init__(self, *args, **kwargs):
        pass

    # --- output: any thread ---------------------------------------------------------------

    cdef int broke(self, int code) except -1:
        return self.owner.broke(code) if self.owner is not None else 0

    # --- input: the polling thread --------------------------------------------------------

    cdef int expect(self, Arriving message) except -1:
        """Read the payload of a message, after those of the messages before it."""
        self.coming.append(message)
        return self.begin() if len(self.coming) == 1 else 0

    cdef int begin(self) except -1:
        """Make room for the next payload, or stop reading if none is due (L1)."""
        cdef Arriving message
        cdef Slab slab
        if self.coming:
            message = self.coming[0]
            slab = shared.take(message.header.payload_nbytes)
            message.payload = slab
            self.target = slab.data
            self.missing = message.header.payload_nbytes
        self.wanted = EPOLLIN if self.coming else 0
        return self.arm()

    cdef bint serve(self, uint32_t what, list events) except -1:
        cdef Arriving message
        cdef Py_ssize_t result
        if what & EPOLLOUT:
            self.drain()
            with nogil:
                self.give_way()
        if self.ended or not what & ~EPOLLOUT:
            return False
        if self.missing == 0:      # nothing is due: the peer has closed it
            self.finish()
            return False
        with nogil:
            result = self.receive()
            self.give_way()
        if result <= 0 and result != NOTHING:
            reason = failure("receive", <int>-result) if result < 0 else TransportError(
                "cannot receive: it ended in the middle of a message"
            )
            self.owner.on_lane_end(events, reason)
        elif self.missing == 0:
            message = self.coming.popleft()
            message.complete = True
            self.owner.on_payload(events)
            try:
                self.begin()
            except MemoryError as error:
                self.owner.on_lane_end(events, error)
        return False

    cdef void give_way(self) noexcept nogil:
        """Let the thread of a small call run; but not programs that never stop, turn by turn."""
        cdef double start = now_s()
        if start < self.next_way:
            return
        sched_yield()
        if now_s() - start > CROWDED_S:
            self.next_way = start + CROWDED_PAUSE_S

    cdef Py_ssize_t receive(self) noexcept nogil:
        """Read a turn's bytes of the payload that is due; see `Pollable.receive`."""
        cdef Py_ssize_t result, total = 0
        while self.missing > 0 and total < TURN:
            result = recv(self.fd, self.target, min(self.missing, TURN - total), MSG_DONTWAIT)
            if result < 0 and errno == EINTR:
                continue
            if result <= 0:
                return total if total > 0 else -errno if result < 0 else 0
            total += result
            self.target += result
            self.missing -= result
        return total

    cdef int finish(self) except -1:
        """End: read and write no more."""
        if self.ended:
            return 0
        self.ended = True
        self.missing = 0
        self.owner = None
        self.coming.clear()
        self.poller.entries.pop(self.token, None)
        self.leave_poller()
        self.shut()
        if not self.writing:
            self.release()
        return 0

    cdef int drop(self) except -1:
        return self.finish()

    cdef int forget(self) except -1:
        self.owner = None
        return Outlet.forget(self)
