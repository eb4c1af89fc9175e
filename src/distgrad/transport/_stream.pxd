"""Poller and StreamConnection: the hot path of every message.

A poller is an epoll set with an eventfd to wake it. One thread at a time polls; any
thread may send, wake, post and close. What belongs to whom is in the comments.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.uio cimport iovec

from distgrad._codec cimport FrameHeader, Outgoing
from distgrad.transport._pool cimport Slab

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data

cdef enum:
    READY = 64                # most epoll events of one turn
    GATHER = 64               # most pieces of memory of one sendmsg
    BUFFER = 64 * 1024        # read buffer of a connection
    TURN = 4 * 1024 * 1024    # most bytes read from one connection before the others' turn
    HOLD_GIL = 16 * 1024      # up to here a system call is too short to give the GIL away


# What the input of a connection is in the middle of.
cdef enum Stage:
    IN_HEADER
    IN_META
    IN_PAYLOAD


cdef class Poller:
    """See ``_stream.pyi`` for what its methods promise."""

    cdef object __weakref__
    # --- read by other threads, without the GIL
    cdef volatile int sleeping     # a thread blocks in epoll_wait: a wake must write wake_fd
    cdef volatile int woken        # somebody wants poll to return; taken by the polling thread
    cdef int wake_fd               # eventfd in the epoll set; open until the poller is freed
    # --- changed under the GIL
    cdef int epoll_fd              # -1 once closed
    cdef bint closed               # close was called
    cdef bint polling              # a thread is inside poll
    cdef object posted             # deque of (connection or None, item or callback)
    cdef dict entries              # token -> StreamConnection or Watch; keeps them alive
    cdef dict watches              # fd -> Watch
    cdef object enrolled           # WeakSet of connections without a socket
    cdef list timers               # heap of (time_s, number, Timer)
    cdef double next_timer         # time of the first of them (monotonic s); inf without
    cdef uint64_t last_token       # tokens and timer numbers are never used twice
    # --- of the polling thread
    cdef StreamConnection hot      # gave the last message: read directly, without epoll; or None
    cdef Py_ssize_t hot_result     # what reading it gave, see StreamConnection.receive
    cdef epoll_event ready[READY]
    cdef int num_ready
    cdef bint called               # a callback ran in this poll
    cdef double most_s             # longest spin: config.spin_us; 0 if this poll must not
    cdef double budget_s           # how long a spin is worth while now, from experience
    cdef int cpus                  # CPUs of this process
    cdef int interval              # turns from one epoll_wait(0) to the next while spinning
    cdef int turn                  # counts up to interval

    cdef void ring(self) noexcept nogil
    cdef int control(self, int operation, int fd, uint32_t events, uint64_t token) except -1
    cdef void wait(self, StreamConnection hot, bint has_hot, double until) noexcept nogil
    cdef bint spin_round(self, StreamConnection hot, bint has_hot) noexcept nogil
    cdef void block(self, double now, double until) noexcept nogil
    cdef int fill(self, list events, double deadline) except -1
    cdef int take_posted(self, list events) except -1
    cdef int serve_hot(self, list events) except -1
    cdef int serve_ready(self, list events) except -1
    cdef int serve_connection(
        self, StreamConnection connection, uint32_t what, list events
    ) except -1
    cdef int run_timers(self) except -1
    cdef int run(self, object callback) except -1
    cdef int teardown(self) except -1
    cdef int forget(self) except -1
    cdef int clear(self) except -1


cdef class Watch:
    cdef int fd
    cdef uint64_t token
    cdef object on_readable        # called with nothing, in the polling thread


cdef class Timer:
    cdef object callback           # None once cancelled or run


cdef class Write:
    """Memory that waits to be sent: one message."""

    cdef Py_buffer *views          # one exported buffer a part
    cdef iovec *pieces             # what is left of each
    cdef int first                 # first piece that is not sent whole
    cdef int count                 # pieces
    cdef int num_views             # buffers to release
    cdef bint done                 # everything was handed over

    cdef size_t advance(self, size_t nbytes) noexcept


cdef class StreamConnection:
    """One socket; a virtual subclass of `distgrad.transport.base.Connection`."""

    cdef object __weakref__
    cdef readonly str scheme
    cdef readonly str peer_address
    cdef readonly object identity
    cdef public object peer
    cdef Poller poller
    cdef uint64_t token            # names this connection in the epoll set
    cdef int fd                    # closed by the polling thread or a later writer; then -1
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
    cdef Slab payload              # its payload
    cdef char *target              # where the rest of meta or payload goes
    cdef Py_ssize_t missing        # how much of it has not arrived; 0: look at the buffer

    cpdef bint send(self, Outgoing message) except -1
    cdef bint send_small(self, Outgoing message) except -1
    cdef int drain(self) except -1
    cdef int gather(self, iovec *pieces, size_t *total) except -1
    cdef int sent(self, size_t nbytes) except -1
    cdef int broke(self, int code) except -1
    cdef int arm(self) except -1
    cdef int shut(self) except -1
    cdef Py_ssize_t receive(self) noexcept nogil
    cdef int parse(self, list events) except -1
    cdef int parse_messages(self, list events) except -1
    cdef int expect(self, void *target, Py_ssize_t nbytes) except -1
    cdef object end_reason(self, Py_ssize_t result)
    cdef int finish(self, list events, object reason) except -1
    cdef int release(self) except -1
