# cython: auto_pickle=False, autotestdict=False
"""Lane: large payloads on a socket of their own; ``_lane.pxd`` is the map.

L1  A lane is read only while a message waits for its payload, and only into that payload:
    memory is taken when its first byte may come, not when it is announced.
L2  In one turn of the poller a lane moves at most TURN bytes each way, and it is never the
    connection that the poller reads directly: the other sockets have their turn in between,
    and so have threads that wait for the processor.
L3  Nothing is read into fresh memory: another thread touches it first, a bounded piece ahead,
    since a page may take milliseconds. The fields of a lane belong to the polling thread.
L4  A lane ends with its connection, and a fault of it, or its end in the middle of something,
    ends the connection. While nothing is due either way, an end that shows is no news: the
    lane is not watched then, and what it has brought is read when its message is known.
L5  The poller is woken for a 64th of a payload, for PIECE of a large one, and for its last bytes:
    where programs compete for the processors, each wake-up may cost a turn of another.
"""

from collections import deque

from libc.errno cimport EAGAIN, EINTR, ENOMEM, errno
from libc.stdint cimport uint32_t

from distgrad.transport._outlet cimport Outlet
from distgrad.transport._poller cimport Poller as PollerType
from distgrad.transport._pool cimport shared

from distgrad.transport.warming import warmer

cimport cython

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLIN, EPOLLOUT
    int EPOLL_CTL_ADD

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, SOL_SOCKET, SO_RCVLOWAT
    int setsockopt(int fd, int level, int name, const void *value, unsigned int nbytes)
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

    cdef int on_lane_end(self, list events, Py_ssize_t result) except -1:
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

    cdef int arm(self) except -1:
        """Watch again where something is due (L4)."""
        if not self.watched and not self.ended and (self.wanted or self.queue):
            self.poller.control(EPOLL_CTL_ADD, self.fd, 0, self.token)
            self.watched = True
            self.asked = 0
        return Outlet.arm(self)

    # --- input: the polling thread --------------------------------------------------------

    cdef int expect(self, Arriving message) except -1:
        """Read the payload of a message, after those of the messages before it."""
        self.coming.append(message)
        return self.begin() if len(self.coming) == 1 else 0

    cdef int begin(self) except -1:
        """Make ready for the next payload, or stop reading if none is due (L1)."""
        cdef Arriving message
        self.slab = None
        self.room = 0
        if self.coming:
            message = self.coming[0]
            self.slab = shared.take(message.header.payload_nbytes)
            message.payload = self.slab
            self.target = self.slab.data
            self.missing = message.header.payload_nbytes
            self.room = self.slab.warm
            self.look_after(min(self.missing // 64, PIECE))
        return self.make_room()

    cdef int make_room(self) except -1:
        """Have the memory touched that comes next; read only where that is done (L3)."""
        cdef Py_ssize_t start
        if self.missing > self.room and self.room < AHEAD and not self.ordered:
            start = self.target + self.room - self.slab.data
            self.ordered = min(self.missing - self.room, PART)
            warmer.order(self.slab, start, self.ordered, self.touched)
        self.wanted = EPOLLIN if self.room > 0 else 0
        return self.arm()

    def touched(self):
        """Tell the polling thread that memory is ready."""
        self.poller.call(self.take_room)

    def take_room(self):
        """Read on, into memory that is ready now."""
        if not self.ended:
            self.room += self.ordered
            self.ordered = 0
            self.make_room()

    cdef bint serve(self, uint32_t what, list events) except -1:
        cdef Arriving message
        cdef Py_ssize_t result
        if what & EPOLLOUT:
            self.drain()
            with nogil:
                self.give_way()
        if self.ended or not what & ~EPOLLOUT:
            return False
        if self.missing == 0:      # nothing is due, and the peer has closed it
            if not self.queue:
                self.leave_poller()
            return False
        with nogil:
            result = self.receive()
            self.give_way()
        if result <= 0 and result != NOTHING:
            self.owner.on_lane_end(events, result)
        elif self.missing == 0:
            message = self.coming.popleft()
            message.complete = True
            self.owner.on_payload(events)
            try:
                self.begin()
            except MemoryError:
                self.owner.on_lane_end(events, -ENOMEM)
        elif self.room < AHEAD:
            self.make_room()
        if self.missing and self.missing < self.enough:
            self.look_after(self.missing)
        return False

    cdef int look_after(self, Py_ssize_t nbytes) except -1:
        """Have the poller look once so many bytes are there, no more than are missing (L5)."""
        cdef int value = <int>nbytes
        if nbytes != self.enough and setsockopt(
            self.fd, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof(value)
        ) == 0:
            self.enough = nbytes
        return 0

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
        while self.room > 0 and total < TURN:
            result = recv(self.fd, self.target, min(self.room, TURN - total), MSG_DONTWAIT)
            if result < 0 and errno == EINTR:
                continue
            if result <= 0:
                return total if total > 0 else -errno if result < 0 else 0
            total += result
            self.target += result
            self.missing -= result
            self.room -= result
        return total if total > 0 else NOTHING

    cdef int disown(self) except -1:
        """Give the descriptor back to the caller: there is no connection."""
        self.poller.entries.pop(self.token, None)
        self.leave_poller()
        self.fd = -1
        return 0

    cdef int finish(self) except -1:
        """End: read and write no more."""
        if self.ended:
            return 0
        self.ended = True
        self.missing = 0
        self.owner = None
        self.coming.clear()
        self.slab = None
        self.room = 0
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
