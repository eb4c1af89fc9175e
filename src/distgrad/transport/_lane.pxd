"""Lane: the second socket of a connection, for payloads that are large.

The messages themselves go over the first socket, so that a small one is never behind the
bytes of a large one. On the lane are the payloads alone, in the order of their messages.
"""

from distgrad._codec cimport FrameHeader
from distgrad.transport._outlet cimport Outlet
from distgrad.transport._pool cimport Slab

cdef enum:
    APART = 256 * 1024        # payloads from here on go over the lane
    AHEAD = 16 * 1024 * 1024  # most fresh memory of a payload that is made ready before its bytes
    PART = 4 * 1024 * 1024    # of it at a time
    APART_MARK = 0xFE         # first byte of the record that stands before such a message
    PIECE = 256 * 1024        # most bytes that the poller waits for before it looks again
    RECORD = 64               # bytes of that record; the others are 0


cdef class Arriving:
    """A message that has come but for its payload, or that has to wait for an earlier one."""

    cdef FrameHeader header
    cdef bytes meta
    cdef object payload            # None until its bytes are read
    cdef bint complete
    cdef Py_ssize_t nbytes         # what it takes up while it waits, without what the lane brings


# What a lane needs of its connection.
cdef class LaneOwner(Outlet):
    # A payload has come whole.
    cdef int on_payload(self, list events) except -1
    # No payload will come any more: 0 for the end of the stream, or -errno.
    cdef int on_lane_end(self, list events, Py_ssize_t result) except -1


cdef class Lane(Outlet):
    cdef LaneOwner owner           # None once it has ended
    cdef object coming             # deque of Arriving whose payloads are not here, oldest first
    cdef Slab slab                 # memory of the payload that is being read; or None
    cdef char *target              # where the rest of it goes
    cdef Py_ssize_t room           # bytes from `target` on that have pages
    cdef Py_ssize_t ordered        # bytes behind those that another thread touches now
    cdef Py_ssize_t enough         # bytes to come before the poller looks
    cdef double next_way           # no earlier than then it gives way to other threads

    cdef int expect(self, Arriving message) except -1
    cdef int begin(self) except -1
    cdef int make_room(self) except -1
    cdef int look_after(self, Py_ssize_t nbytes) except -1
    cdef void give_way(self) noexcept nogil
    cdef int disown(self) except -1
    cdef int finish(self) except -1
