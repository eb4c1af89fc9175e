"""StreamConnection: the hot path of every message.

Any thread may send; the input belongs to the thread that polls. What belongs to whom is in
the comments.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.uio cimport iovec

from distgrad._codec cimport FrameHeader, Outgoing
from distgrad.transport._arena cimport Arena, Arrivals
from distgrad.transport._lane cimport Arriving, Lane, LaneOwner
from distgrad.transport._outlet cimport Write
from distgrad.transport._ring cimport Ring

cdef enum:
    BUFFER = 64 * 1024        # read buffer of a connection
    TURN = 4 * 1024 * 1024    # most bytes read from one connection before the others' turn


# What the input of a connection is in the middle of.
cdef enum Stage:
    IN_HEADER
    IN_META
    IN_PAYLOAD


cdef class StreamConnection(LaneOwner):
    """One peer; a virtual subclass of `distgrad.transport.base.Connection`."""

    cdef readonly str scheme
    cdef readonly str peer_address
    cdef readonly object identity
    cdef public object peer
    # --- shared memory, where there is some
    cdef Ring memory               # what `ring` points into; or None
    cdef Arena arena               # what this side lends; made when first needed
    cdef Arrivals arrivals         # what the peer lends; or None
    # --- ending
    cdef bint closing              # this side closed: no more sends, input is thrown away
    cdef Exception error           # what a sender ran into; reported when the input ends
    # --- large payloads apart from the messages
    cdef Lane lane                 # their socket; or None
    cdef object held               # deque of Arriving: in order, the first lacks its payload
    cdef Py_ssize_t held_nbytes    # what they take up
    cdef bint full                 # that is too much: read on when the lane has brought the next
    cdef bint apart                # the payload of the next message comes over the lane
    cdef object last_words         # Timer while the socket has ended and the lane has not; or None
    cdef tuple brought             # what the lane had brought when it was set
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
    cdef bint send_apart(self, Outgoing message) except -1
    cdef Write lend(self, Outgoing message, Write parts)
    cdef bint listen(self, list events) except -1
    cdef int read_rest(self, list events) except -1
    cdef Py_ssize_t hear_bells(self) except? -2
    cdef int accept_loan(self) except -1
    cdef int accept_apart(self) except -1
    cdef int deliver(self, list events) except -1
    cdef int hold(self, Py_ssize_t nbytes) except -1
    cdef int wait_for_lane(self) except -1
    cdef int await_lane(self) except -1
    cdef int clear_queues(self) except -1
    cdef int parse(self, list events) except -1
    cdef int parse_messages(self, list events) except -1
    cdef int expect(self, void *target, Py_ssize_t nbytes) except -1
    cdef object end_reason(self, Py_ssize_t result)
    cdef int finish(self, list events, object reason) except -1
