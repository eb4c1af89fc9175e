"""Poller: who waits for the events of many connections.

A poller is an epoll set with an eventfd to wake it, and a few rings in shared memory that
it looks at directly. One thread at a time polls; any thread may wake, post and close. What
belongs to whom is in the comments.
"""

from libc.stdint cimport uint32_t, uint64_t

from distgrad.transport._ring cimport RingEnd

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data

cdef enum:
    READY = 64                # most epoll events of one turn
    ATTENDED = 16             # most rings that are looked at without a bell


cdef class Pollable:
    """What a poller sees of a connection; `StreamConnection` is the one kind there is."""

    cdef object __weakref__
    cdef uint64_t token            # names it in the epoll set
    cdef Py_ssize_t missing        # bytes until there is something to look at; 0: none
    cdef RingEnd *ring             # NULL: its bytes come through the socket

    # Read what is there: number of bytes, 0 at the end of the stream, or -errno.
    cdef Py_ssize_t receive(self) noexcept nogil
    # Deal with what `receive` returned.
    cdef int received(self, Py_ssize_t result, list events) except -1
    # Deal with epoll's or the ring's bits; return whether bytes of messages came.
    cdef bint serve(self, uint32_t what, list events) except -1
    # The poller is closed: end at once, without an event.
    cdef int drop(self) except -1
    # In the child of a fork: close the copies of descriptors, and only them.
    cdef int forget(self) except -1


cdef class Poller:
    """See ``_poller.pyi`` for what its methods promise."""

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
    cdef dict entries              # token -> Pollable or Watch; keeps them alive
    cdef dict watches              # fd -> Watch
    cdef object enrolled           # WeakSet of connections without a socket
    cdef list timers               # heap of (time_s, number, Timer)
    cdef double next_timer         # time of the first of them (monotonic s); inf without
    cdef uint64_t last_token       # tokens and timer numbers are never used twice
    # --- of the polling thread
    cdef Pollable hot              # gave the last message: read directly, without epoll; or None
    cdef Py_ssize_t hot_result     # what reading it gave, see Pollable.receive
    cdef epoll_event ready[READY]
    cdef int num_ready
    cdef RingEnd *attended[ATTENDED]   # rings that are looked at; the others ring a bell
    cdef int num_attended
    cdef int victim                # next of them to make room
    cdef list overlooked           # tokens of rings that had news when their bell was armed
    cdef bint called               # a callback ran in this poll
    cdef bint spun                 # this poll waited for its news, and not in the kernel
    cdef double most_s             # longest spin: config.spin_us; 0 if this poll must not
    cdef double budget_s           # how long a spin is worth while now, from experience
    cdef double calm_until         # no spin before (monotonic s): the processors are busy
    cdef double calm_s             # how long that was, the last time
    cdef int cpus                  # CPUs of this process
    cdef int interval              # turns from one epoll_wait(0) to the next while spinning
    cdef int turn                  # counts up to interval
    cdef int patience              # rounds of looking at rings from one sched_yield to the next
    cdef int streak                # messages from rings since all sockets were looked at

    cdef void ring(self) noexcept nogil
    cdef int control(self, int operation, int fd, uint32_t events, uint64_t token) except -1
    cdef int attend(self, RingEnd *end) except -1
    cdef void neglect(self, RingEnd *end) noexcept
    cdef void wait(self, Pollable hot, bint has_hot, double until) noexcept nogil
    cdef void calm_down(self, double now) noexcept nogil
    cdef bint spin_round(self, Pollable hot, bint has_hot) noexcept nogil
    cdef bint look_at_rings(self, Pollable hot, bint has_hot) noexcept nogil
    cdef void look_at_sockets(self) noexcept nogil
    cdef void block(self, double now, double until) noexcept nogil
    cdef bint doze(self) noexcept nogil
    cdef int fill(self, list events, double deadline) except -1
    cdef int take_posted(self, list events) except -1
    cdef int serve_ready(self, list events) except -1
    cdef int serve_entry(self, uint64_t token, uint32_t what, list events) except -1
    cdef int serve_overlooked(self, list events) except -1
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
