"""StreamConnection: the hot path of every message.

Any thread may send; the input belongs to the thread that polls. What belongs to whom is in
the comments.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.uio cimport iovec

from distgrad._codec cimport FrameHeader, Outgoing
from distgrad.transport._arena cimport Arena, Arrivals
from distgrad.transport._poller cimport Pollable
from distgrad.transport._poller cimport Poller as PollerType
from distgrad.transport._ring cimport Ring

cdef enum:
    GATHER = 64               # most pieces of memory of one sendmsg
    BUFFER = 64 * 1024        # read buffer of a connection
    TURN = 4 * 1024 * 1024    # most bytes read from one connection before the others' turn
    HOLD_GIL = 16 * 1024      # up to here a system call is too short to give the GIL away


# What the input of a connection is in the middle of.
cdef enum Stage:
    IN_HEADER
    IN_META
    IN_PAYLOAD


cdef class Write:
    """Memory that waits to be sent: one message."""

    cdef Py_buffer *views          # one exported buffer a part
    cdef iovec *pieces             # what is left of each
    cdef int first                 # first piece that is not sent whole
    cdef int count                 # pieces
    cdef int num_views             # buffers to release
    cdef bint done                 # everything was handed over

    cdef size_t advance(self, size_t nbytes) noexcept


cdef class StreamConnection(Pollable):
    """One socket; a virtual subclass of `distgrad.transport.base.Connection`."""

    cdef readonly str scheme
    cdef readonly str peer_address
    cdef readonly object identity
    cdef public object peer
    cdef PollerType poller
    cdef int fd                    # closed by the polling thread or a later writer; then -1
    # --- shared memory, where there is some
    cdef Ring memory               # what `ring` points into; or None
    cdef Arena arena               # what this side lends; made when first needed
    cdef Arrivals arrivals         # what the peer lends; or None
    # --- ending
    cdef bint closing              # this side closed: no more sends, input is thrown away
    cdef bint ended                # the end was reported; set by the polling thread only
    cdef Exception error           # what a sender ran into; reported when the input ends
    # --- output
    cdef object queue              # deque of Write, oldest first
    cdef bint writing              # a thread is between taking from the queue and sendmsg's return
    cdef bint armed                # the epoll set asks for EPOLLOUT
    # --- input, of the polling thread
    cdef char *buffer              # BUFFER bytes
    cdef Py_ssize_t start          # first byte of the buffer that was not looked at
    cdef Py_ssize_t end            # end of what was read into it
    cdef Stage stage
    cdef FrameHeader header        # of the message that is arriving
    cdef bytes meta                # its meta block
    cdef object payload            # its payload: a Slab, or a Loan that came before the header
    cdef uint64_t payload_nbytes   # of that loan
    cdef char *target              # where the rest of meta or payload goes

    cpdef bint send(self, Outgoing message) except -1
    cdef bint send_small(self, Outgoing message) except -1
    cdef int drain(self) except -1
    cdef int gather(self, iovec *pieces, size_t *total) except -1
    cdef int sent(self, size_t nbytes) except -1
    cdef int broke(self, int code) except -1
    cdef int arm(self) except -1
    cdef int shut(self) except -1
    cdef Write lend(self, Outgoing message, Write parts)
    cdef Py_ssize_t put(self, const iovec *pieces, int count) noexcept nogil
    cdef bint listen(self, list events) except -1
    cdef Py_ssize_t hear_bells(self) except? -2
    cdef int accept_loan(self) except -1
    cdef int parse(self, list events) except -1
    cdef int parse_messages(self, list events) except -1
    cdef int expect(self, void *target, Py_ssize_t nbytes) except -1
    cdef object end_reason(self, Py_ssize_t result)
    cdef int finish(self, list events, object reason) except -1
    cdef int release(self) except -1
