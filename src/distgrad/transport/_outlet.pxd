"""Outlet: a socket, and what waits to be sent on it.

Any thread may send. What belongs to whom is in the comments; ``_stream.pyx`` has the
invariants.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.uio cimport iovec

from distgrad.transport._poller cimport Pollable
from distgrad.transport._poller cimport Poller as PollerType

cdef enum:
    GATHER = 64               # most pieces of memory of one sendmsg
    HOLD_GIL = 16 * 1024      # up to here a system call is too short to give the GIL away


cdef class Write:
    """Memory that waits to be sent: one message, or the payload of one."""

    cdef Py_buffer *views          # one exported buffer a part
    cdef iovec *pieces             # what is left of each
    cdef int first                 # first piece that is not sent whole
    cdef int count                 # pieces
    cdef int num_views             # buffers to release
    cdef bint done                 # everything was handed over
    cdef object message            # the Outgoing whose arrays these are; None if there are none
    cdef char *copy                # what was left of them when their owner took them back; or NULL
    cdef Py_ssize_t copy_nbytes

    cdef size_t advance(self, size_t nbytes) noexcept
    cdef bint own(self) except -1
    cdef int release_views(self) except -1


cdef class Outlet(Pollable):
    cdef PollerType poller
    cdef int fd                    # closed by the polling thread or a later writer; then -1
    cdef bint ended                # no more input or output; set by the polling thread only
    cdef object queue              # deque of Write, oldest first
    cdef uint64_t taken            # bytes that the kernel or the ring took so far
    cdef bint writing              # a thread is between taking from the queue and sendmsg's return
    cdef bint awaited              # somebody asked whether the queue is empty, and it was not
    cdef size_t turn               # most bytes of one drain, the rest is the poller's; 0: all
    cdef uint32_t wanted           # what to ask epoll for besides EPOLLOUT
    cdef uint32_t asked            # what epoll was asked for
    cdef bint watched              # it is in the epoll set

    cdef int enter(self, PollerType poller, int fd) except -1
    cdef int leave_poller(self) except -1
    cdef Py_ssize_t put(self, const iovec *pieces, int count) noexcept nogil
    cdef int drain(self) except -1
    cdef int gather(self, iovec *pieces, size_t *total) except -1
    cdef int sent(self, size_t nbytes) except -1
    # Whether nothing is queued; if not, `poll` returns when that changes.
    cdef bint is_empty(self) except -1
    # Read the arrays of a message no more; return the bytes of all copies, -1 if out of memory.
    cdef Py_ssize_t let_go(self, object message) except -2
    cdef int arm(self) except -1
    cdef int shut(self) except -1
    # The socket cannot be written.
    cdef int broke(self, int code) except -1
    # Close the descriptor: the input has ended and nobody is writing.
    cdef int release(self) except -1


cdef object failure(str what, int code)
