# cython: auto_pickle=False, autotestdict=False
"""Poller and StreamConnection; ``_stream.pxd`` is the map, ``base.py`` the contract.

S1  The input side of a connection, its end and its file descriptor belong to the polling
    thread. Other threads only shut the socket down; the descriptor is closed when neither
    the polling thread nor a sender is in a system call on it, so its number cannot be
    taken by another file meanwhile.
S2  `writing` and `queue` change under the GIL only. Who sets `writing` sends until the queue
    is empty or the kernel is full; whoever finds it set leaves the message in the queue.
S3  A message is in the queue, or sent whole, or lost with the connection: the polling
    thread has EPOLLOUT armed whenever the queue holds something and nobody is writing.
S4  Going to sleep: set `sleeping`, then look at `woken`. Waking: set `woken`, then look at
    `sleeping`. Both sequentially consistent, so a wake is never lost.
S5  After a fork the child closes its copies and touches nothing that it shares.
"""

import heapq
import math
import os
import threading
import weakref
from collections import deque

from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetObject, PyErr_WriteUnraisable
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset
from posix.uio cimport iovec, readv
from posix.unistd cimport close, read
from posix.unistd cimport write as write_fd

from distgrad._codec cimport HEADER_NBYTES, Outgoing, make_frame, read_header
from distgrad.transport._pool cimport shared

from distgrad.config import config
from distgrad.errors import TransportError
from distgrad.transport.base import Connection

cimport cython

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLIN, EPOLLOUT
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll_fd, epoll_event *events, int most, int timeout_ms)

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    Py_ssize_t recv(int fd, void *data, size_t nbytes, int flags)
    Py_ssize_t send(int fd, const void *data, size_t nbytes, int flags)
    Py_ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)

cdef extern from "<poll.h>" nogil:
    short POLLOUT
    cdef struct pollfd:
        int fd
        short events
    int poll(pollfd *fds, unsigned long count, int timeout_ms)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "transport/_wait.h":
    void set_flag "distgrad_set"(volatile int *flag, int value) noexcept nogil
    int get_flag "distgrad_get"(volatile int *flag) noexcept nogil
    double now_s "distgrad_now"() noexcept nogil
    int epoll_wait_s "distgrad_epoll_wait"(
        int fd, epoll_event *events, int most, double timeout_s
    ) noexcept nogil

cdef enum:
    WAKE_TOKEN = 0      # of wake_fd in the epoll set
    MAX_INTERVAL = 8    # most direct reads from one look at all sockets to the next
    YIELD_TURNS = 4    # direct reads from one sched_yield to the next
    WAKES = 3          # a wait this many spins long may have been a short one with two wake-ups

cdef extern from "pythread.h" nogil:
    unsigned long PyThread_get_thread_ident()

cdef double LONGEST_S = 3600.0         # of one epoll_wait
cdef double SIGNAL_SLICE_S = 0.2       # same in the main thread, where signals are looked for
cdef double CLOSE_FLUSH_S = 1.0        # what close gives the peer to take what is queued
cdef Py_ssize_t NOTHING = -EAGAIN      # nothing to read now

# Only for the child of a fork, which must let go of every descriptor it inherited.
_pollers = weakref.WeakSet()


# Python runs signal handlers in this thread only.
cdef unsigned long main_ident = threading.main_thread().ident


def _forget_in_child():
    global main_ident
    main_ident = PyThread_get_thread_ident()
    for poller in list(_pollers):
        (<Poller>poller).forget()


os.register_at_fork(after_in_child=_forget_in_child)


cdef object failure(str what, int code):
    return TransportError(f"cannot {what}: {os.strerror(code)}")


@cython.final
cdef class Watch:
    """A descriptor with a callback in the epoll set of a poller."""


@cython.final
cdef class Timer:
    """A callback that a poller runs at a time; made by `Poller.call_later`."""

    def cancel(self):
        """Do not run the callback. Idempotent; any thread."""
        self.callback = None


@cython.final
cdef class Poller:
    """Waits for the events of many connections; the only place of distgrad that does.

    `poll` belongs to one thread at a time; every other method to any thread.
    """

    def __cinit__(self):
        self.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.epoll_fd < 0 or self.wake_fd < 0:
            raise failure("make a poller", errno)
        self.posted = deque()
        self.entries = {}
        self.watches = {}
        self.timers = []
        self.enrolled = weakref.WeakSet()
        self.next_timer = math.inf
        self.last_token = WAKE_TOKEN
        self.cpus = len(os.sched_getaffinity(0))
        self.budget_s = 1e-6 * config.spin_us
        self.interval = 1
        self.control(EPOLL_CTL_ADD, self.wake_fd, EPOLLIN, WAKE_TOKEN)
        _pollers.add(self)

    def __dealloc__(self):
        if self.epoll_fd >= 0:
            close(self.epoll_fd)
        if self.wake_fd >= 0:
            close(self.wake_fd)

    # --- any thread -----------------------------------------------------------------------

    @property
    def sleeping(self):
        """Whether the polling thread blocks in the kernel just now."""
        return bool(get_flag(&self.sleeping))

    def wake(self):
        """Make `poll` return: the one that runs now, or else the next one.

        Costs a system call only if the polling thread blocks in the kernel.
        """
        self.ring()

    def post(self, connection, item):
        """Let `poll` return the event ``(connection, item)``, in the order of the posts."""
        if self.closed:
            raise TransportError("cannot post an event: the poller is closed")
        self.posted.append((connection, item))
        self.ring()

    def call(self, callback):
        """Run ``callback()`` in the polling thread, after what was posted before."""
        self.post(None, callback)

    def call_later(self, double delay_s, callback):
        """Run ``callback()`` in the polling thread in ``delay_s`` seconds; return its `Timer`."""
        cdef Timer timer = Timer()
        timer.callback = callback
        self.last_token += 1
        heapq.heappush(self.timers, (now_s() + delay_s, self.last_token, timer))
        if self.timers[0][2] is timer:
            self.next_timer = self.timers[0][0]
            if not self.polling or get_flag(&self.sleeping):
                self.ring()
        return timer

    def watch(self, int fd, on_readable):
        """Run ``on_readable()`` in the polling thread whenever ``fd`` is readable.

        The caller keeps ``fd`` open until `unwatch`.
        """
        cdef Watch watch = Watch()
        if fd in self.watches:
            raise ValueError(f"cannot watch file descriptor {fd}: it is watched already")
        self.last_token += 1
        watch.fd = fd
        watch.token = self.last_token
        watch.on_readable = on_readable
        self.control(EPOLL_CTL_ADD, fd, EPOLLIN, watch.token)
        self.entries[watch.token] = self.watches[fd] = watch

    def unwatch(self, int fd):
        """End `watch`; harmless if ``fd`` is not watched."""
        cdef Watch watch = self.watches.pop(fd, None)
        if watch is None:
            return
        del self.entries[watch.token]
        self.control(EPOLL_CTL_DEL, fd, 0, watch.token)

    def enroll(self, connection):
        """Abort ``connection`` when this poller is closed; for connections without a socket."""
        if self.closed:
            raise TransportError("cannot make a connection: the poller is closed")
        self.enrolled.add(connection)

    def close(self):
        """Abort all connections and stop polling for good. Idempotent; any thread.

        A `poll` that runs returns; a later one raises. No further event is reported.
        """
        self.closed = True
        self.ring()
        if not self.polling:
            self.teardown()

    # --- the polling thread ---------------------------------------------------------------

    def poll(self, double timeout_s, bint spin):
        """Wait for events and return them.

        Parameters
        ----------
        timeout_s
            Longest wait in seconds; 0 only looks, ``math.inf`` waits for ever.
        spin
            Whether to poll for up to ``config.spin_us`` before blocking. How long adapts:
            to the whole of it when events come that soon, towards nothing when they do not.

        Returns
        -------
        list of (Connection, Frame or Exception or None)
            A frame is a message. An exception or None is the end of the connection: why,
            or None for an orderly end; it comes once a connection. The list is empty
            after the time-out, `wake`, a signal, or if only callbacks ran.

        Raises
        ------
        TransportError
            The poller is closed.
        KeyboardInterrupt
            And whatever else a Python signal handler or a callback raises that is not
            an `Exception`. No event is lost.
        """
        cdef list events = []
        if self.closed:
            raise TransportError("cannot poll: the poller is closed")
        if self.polling:
            raise RuntimeError("cannot poll: another thread is polling")
        self.polling = True
        self.called = False
        self.most_s = config.spin_us * 1e-6 if spin and self.cpus > 1 else 0.0
        try:
            self.fill(events, now_s() + timeout_s)
        except BaseException:
            self.posted.extendleft(reversed(events))
            self.ring()
            raise
        finally:
            self.polling = False
            if self.closed:
                self.teardown()
        return events

    cdef int fill(self, list events, double deadline) except -1:
        """Wait until there is an event, or a reason to return without one."""
        cdef double until
        cdef bint woken, has_hot
        cdef StreamConnection hot
        while True:
            woken = get_flag(&self.woken)
            if woken:
                set_flag(&self.woken, 0)
                self.take_posted(events)
            if self.next_timer < math.inf:
                self.run_timers()
            hot = self.hot
            has_hot = hot is not None
            until = min(deadline, self.next_timer)
            if events or woken or self.called:
                until = 0.0
            elif PyThread_get_thread_ident() == main_ident:
                until = min(until, now_s() + SIGNAL_SLICE_S)
            with nogil:
                self.wait(hot, has_hot, until)
            if self.closed:
                return 0
            self.serve_hot(events)
            self.serve_ready(events)
            if events or woken or self.called:
                return 0
            PyErr_CheckSignals()
            if now_s() >= deadline and not get_flag(&self.woken):
                return 0

    cdef void wait(self, StreamConnection hot, bint has_hot, double until) noexcept nogil:
        """Wait until a socket is ready, the hot one was read, somebody wakes, or ``until``."""
        cdef double start = now_s(), now = start, limit
        cdef int round_ = 0
        self.hot_result = NOTHING
        self.num_ready = 0
        limit = min(start + min(self.budget_s, self.most_s), until)
        if until <= start:
            self.turn = MAX_INTERVAL       # the only look: at all connections
        while True:
            if self.spin_round(hot, has_hot):
                if now - start <= self.most_s and self.most_s > 0.0:
                    self.budget_s = self.most_s
                return
            now = now_s()
            if self.hot_result > 0:        # part of a long message: the rest is on its way
                self.hot_result = NOTHING
                limit += now - start
                start = now
            if now >= limit or get_flag(&self.woken):
                break
            round_ += 1
            if round_ % YIELD_TURNS == 0:
                sched_yield()
        if now >= until or get_flag(&self.woken):
            return
        if self.most_s > 0.0:
            self.budget_s = self.budget_s * 0.5 if self.budget_s > 1e-6 else 0.0
        self.block(now, until)
        # Both sides may be asleep, and each wake-up adds to the wait: judged by the bare spin
        # limit, two workers that once fell asleep would never find back to spinning.
        if self.num_ready > 0 and now_s() - start <= WAKES * self.most_s:
            self.budget_s = self.most_s

    cdef bint spin_round(self, StreamConnection hot, bint has_hot) noexcept nogil:
        """Look once at the hot connection or at all; return whether there is something to do.

        Looking at all costs more, so it happens only every `interval` rounds; `interval`
        grows while the hot connection is the one that has news.
        """
        if has_hot:
            self.hot_result = hot.receive()
            if self.hot_result != NOTHING and (hot.missing == 0 or self.hot_result <= 0):
                if self.interval < MAX_INTERVAL:
                    self.interval += 1
                self.turn += 1
                if self.turn >= MAX_INTERVAL:
                    self.turn = 0
                    self.num_ready = epoll_wait(self.epoll_fd, self.ready, READY, 0)
                return True
            self.turn += 1
            if self.turn < self.interval:
                return False
        self.turn = 0
        self.num_ready = epoll_wait(self.epoll_fd, self.ready, READY, 0)
        if self.num_ready <= 0:
            return False
        self.interval = 1
        return True

    cdef void block(self, double now, double until) noexcept nogil:
        """Sleep in the kernel until a socket is ready, somebody wakes, or ``until``."""
        set_flag(&self.sleeping, 1)
        if not get_flag(&self.woken):
            self.num_ready = epoll_wait_s(
                self.epoll_fd, self.ready, READY, min(until - now, LONGEST_S)
            )
        set_flag(&self.sleeping, 0)

    cdef void ring(self) noexcept nogil:
        cdef uint64_t one = 1
        set_flag(&self.woken, 1)
        if get_flag(&self.sleeping):
            write_fd(self.wake_fd, &one, sizeof(one))

    cdef int take_posted(self, list events) except -1:
        """Move what was posted into ``events``, running the callbacks among it."""
        for _ in range(len(self.posted)):
            connection, item = self.posted.popleft()
            if connection is None:
                self.run(item)
            else:
                events.append((connection, item))
        return 0

    cdef int run_timers(self) except -1:
        cdef Timer timer
        cdef double now = now_s()
        while self.timers and self.timers[0][0] <= now:
            timer = heapq.heappop(self.timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                self.run(callback)
        self.next_timer = self.timers[0][0] if self.timers else math.inf
        return 0

    cdef int run(self, object callback) except -1:
        self.called = True
        try:
            callback()
        except Exception as error:      # a callback has no caller who could take it
            PyErr_SetObject(type(error), error)
            PyErr_WriteUnraisable(callback)
        return 0

    cdef int serve_hot(self, list events) except -1:
        cdef StreamConnection hot = self.hot
        if self.hot_result == NOTHING or hot is None:
            return 0
        if self.hot_result > 0:
            hot.parse(events)
        else:
            hot.finish(events, hot.end_reason(self.hot_result))
        return 0

    cdef int serve_ready(self, list events) except -1:
        cdef uint64_t count
        cdef int i
        cdef object entry
        for i in range(self.num_ready):
            if self.closed:
                return 0
            if self.ready[i].data.u64 == WAKE_TOKEN:
                read(self.wake_fd, &count, sizeof(count))
                continue
            entry = self.entries.get(self.ready[i].data.u64)
            if isinstance(entry, StreamConnection):
                self.serve_connection(entry, self.ready[i].events, events)
            elif entry is not None:
                self.run((<Watch>entry).on_readable)
        return 0

    cdef int serve_connection(
        self, StreamConnection connection, uint32_t what, list events
    ) except -1:
        cdef Py_ssize_t result
        if what & EPOLLOUT:
            connection.drain()
        if not what & ~EPOLLOUT:
            return 0
        if connection.missing > HOLD_GIL:
            with nogil:
                result = connection.receive()
        else:
            result = connection.receive()
        if result > 0:
            self.hot = connection
            connection.parse(events)
        elif result != NOTHING:
            connection.finish(events, connection.end_reason(result))
        return 0

    cdef int control(self, int operation, int fd, uint32_t events, uint64_t token) except -1:
        """Change the epoll set; nothing to do once the poller is closed."""
        cdef epoll_event event
        event.events = events
        event.data.u64 = token
        if self.epoll_fd >= 0 and epoll_ctl(self.epoll_fd, operation, fd, &event) < 0:
            raise failure(f"watch file descriptor {fd}", errno)
        return 0

    cdef int teardown(self) except -1:
        """Let go of everything; the poller is closed and nobody polls."""
        cdef StreamConnection connection
        if self.epoll_fd < 0:
            return 0
        for entry in list(self.entries.values()):
            if isinstance(entry, StreamConnection):
                connection = entry
                connection.closing = True
                connection.shut()
                connection.finish([], None)
        for enrolled in list(self.enrolled):
            enrolled.abort()
        close(self.epoll_fd)
        self.epoll_fd = -1
        return self.clear()

    cdef int forget(self) except -1:
        """In the child of a fork: close the copies of all descriptors, and only them."""
        cdef StreamConnection connection
        self.closed = True
        for entry in list(self.entries.values()):
            if isinstance(entry, StreamConnection):
                connection = entry
                connection.closing = connection.ended = True
                if connection.fd >= 0:
                    close(connection.fd)
                connection.fd = -1
        for fd in (self.epoll_fd, self.wake_fd):
            if fd >= 0:
                close(fd)
        self.epoll_fd = self.wake_fd = -1
        return self.clear()

    cdef int clear(self) except -1:
        self.entries.clear()
        self.watches.clear()
        self.posted.clear()
        self.timers.clear()
        self.next_timer = math.inf
        self.hot = None
        return 0


@cython.final
cdef class Write:
    """One message in the queue of a connection."""

    def __cinit__(self, list parts not None, Py_ssize_t skip):
        cdef Py_ssize_t n = len(parts)
        self.views = <Py_buffer*>malloc(n * sizeof(Py_buffer))
        self.pieces = <iovec*>malloc(n * sizeof(iovec))
        if self.views == NULL or self.pieces == NULL:
            raise MemoryError("cannot queue a message: out of memory")
        for part in parts:
            PyObject_GetBuffer(part, &self.views[self.num_views], PyBUF_ANY_CONTIGUOUS)
            self.pieces[self.num_views].iov_base = self.views[self.num_views].buf
            self.pieces[self.num_views].iov_len = self.views[self.num_views].len
            self.num_views += 1
        self.count = <int>n
        self.advance(skip)

    cdef size_t advance(self, size_t nbytes) noexcept:
        """Note that bytes were sent; return how many of them were not of this message."""
        cdef iovec *piece
        while self.first < self.count:
            piece = &self.pieces[self.first]
            if nbytes < piece.iov_len:
                piece.iov_base = <char*>piece.iov_base + nbytes
                piece.iov_len -= nbytes
                return 0
            nbytes -= piece.iov_len
            self.first += 1
        self.done = True
        return nbytes

    def __dealloc__(self):
        cdef int i
        for i in range(self.num_views):
            PyBuffer_Release(&self.views[i])
        free(self.views)
        free(self.pieces)


@cython.final
cdef class StreamConnection:
    """A connection over a connected stream socket; takes the descriptor over.

    Made after the handshake; from then on the events come out of ``poller``.
    """

    def __cinit__(
        self, Poller poller not None, int fd, *, str scheme, str peer_address, object identity
    ):
        self.fd = -1
        self.poller = poller
        self.scheme = scheme
        self.peer_address = peer_address
        self.identity = identity
        self.queue = deque()
        self.buffer = <char*>malloc(BUFFER)
        if self.buffer == NULL:
            raise MemoryError("cannot make a connection: out of memory")
        if poller.closed:
            raise TransportError("cannot make a connection: the poller is closed")
        os.set_blocking(fd, False)
        poller.last_token += 1
        self.token = poller.last_token
        poller.entries[self.token] = self
        self.fd = fd
        try:
            poller.control(EPOLL_CTL_ADD, fd, EPOLLIN, self.token)
        except TransportError:
            self.fd = -1      # the caller still owns it
            del poller.entries[self.token]
            raise

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)
        free(self.buffer)

    def __repr__(self):
        state = "closed" if self.closing or self.ended else "open"
        return f"<{self.scheme} connection to {self.peer_address}, {state}>"

    @property
    def closed(self):
        """Whether this side has closed the connection or has seen its end."""
        return self.closing or self.ended or self.error is not None

    # --- output: any thread ---------------------------------------------------------------

    cpdef bint send(self, Outgoing message) except -1:
        """Send a message; see `distgrad.transport.base.Connection.send`."""
        cdef Write write
        if self.closing or self.ended or self.error is not None:
            raise self.refusal()
        message.seal()
        if (
            message.payload_nbytes == 0
            and message.head_nbytes <= HOLD_GIL
            and not self.writing
            and not self.queue
        ):
            return self.send_small(message)
        write = Write(message.parts(), 0)
        self.queue.append(write)
        self.drain()
        if self.error is not None and not write.done:
            raise self.refusal()
        return write.done

    cdef bint send_small(self, Outgoing message) except -1:
        """Send one block at once; nobody else is writing and the queue is empty."""
        cdef Py_ssize_t result = send(
            self.fd, message.head, message.head_nbytes, MSG_NOSIGNAL | MSG_DONTWAIT
        )
        if result == message.head_nbytes:
            return True
        if result < 0 and errno != EAGAIN and errno != EINTR:
            self.broke(errno)
            raise self.refusal()
        self.queue.append(Write([message], result if result > 0 else 0))
        self.arm()
        return False

    cdef int drain(self) except -1:
        """Send from the queue until it is empty or the kernel is full (S2)."""
        cdef iovec pieces[GATHER]
        cdef msghdr message
        cdef size_t total
        cdef Py_ssize_t result = 0
        cdef int code = 0
        if self.writing:
            return 0
        self.writing = True
        memset(&message, 0, sizeof(message))
        message.msg_iov = pieces
        while self.queue and not self.ended:
            message.msg_iovlen = self.gather(pieces, &total)
            if total > HOLD_GIL:
                with nogil:
                    result = sendmsg(self.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                    code = errno
            else:
                result = sendmsg(self.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                code = errno
            if result >= 0:
                self.sent(result)
            if result < <Py_ssize_t>total and (result >= 0 or code != EINTR):
                break
        self.writing = False
        if self.ended:
            return self.release()
        if result < 0 and code != EAGAIN:
            return self.broke(code)
        return self.arm()

    cdef int gather(self, iovec *pieces, size_t *total) except -1:
        """List what is queued, up to GATHER pieces; return how many."""
        cdef Write write
        cdef int count = 0, i
        total[0] = 0
        for item in self.queue:
            write = item
            for i in range(write.first, write.count):
                if count == GATHER:
                    return count
                pieces[count] = write.pieces[i]
                total[0] += pieces[count].iov_len
                count += 1
        return count

    cdef int sent(self, size_t nbytes) except -1:
        cdef Write write
        while self.queue:
            write = self.queue[0]
            nbytes = write.advance(nbytes)
            if not write.done:
                return 0
            self.queue.popleft()
        return 0

    cdef int arm(self) except -1:
        """Ask for EPOLLOUT while something is queued, and only then (S3)."""
        cdef bint wanted = len(self.queue) > 0
        if wanted != self.armed and not self.ended:
            self.armed = wanted
            self.poller.control(
                EPOLL_CTL_MOD, self.fd, EPOLLIN | (EPOLLOUT if wanted else 0), self.token
            )
        return 0

    cdef int broke(self, int code) except -1:
        """Note that the socket cannot be written; the polling thread will see it end."""
        if self.error is None:
            self.error = failure(f"send to {self.peer_address}", code)
        self.queue.clear()
        self.arm()
        return self.shut()

    def refusal(self):
        """Return why a message cannot be sent."""
        fact = self.error if self.error is not None else "the connection is closed"
        return TransportError(f"cannot send to {self.peer_address}: {fact}")

    def flushed(self):
        """Whether nothing of earlier sends is queued on this side."""
        return not self.queue and not self.writing

    # --- ending: any thread ---------------------------------------------------------------

    def close(self):
        """Flush for a second at most, then end; see `base.Connection.close`."""
        cdef double deadline = now_s() + CLOSE_FLUSH_S
        cdef pollfd writable
        if self.closing or self.ended:
            return
        self.closing = True
        while not self.flushed() and not self.ended and self.error is None and now_s() < deadline:
            self.drain()
            writable.fd = self.fd
            writable.events = POLLOUT
            if not self.flushed():
                with nogil:
                    poll(&writable, 1, 10)
        self.shut()

    def abort(self):
        """End at once and drop what is queued."""
        self.closing = True
        if not self.writing:
            self.queue.clear()
        self.shut()

    cdef int shut(self) except -1:
        """End both directions, which wakes the polling thread; it closes the descriptor."""
        if self.fd >= 0:
            shutdown(self.fd, SHUT_RDWR)
        return 0

    # --- input: the polling thread --------------------------------------------------------

    cdef Py_ssize_t receive(self) noexcept nogil:
        """Read what the kernel has, up to TURN bytes.

        Returns the number of bytes, 0 at the end of the stream, or -errno. What is
        missing of a meta block or payload goes to its place directly, and what follows
        it in the stream to the buffer, in one system call.
        """
        cdef iovec pieces[2]
        cdef Py_ssize_t result, total = 0
        while True:
            pieces[1].iov_base = self.buffer + self.end
            pieces[1].iov_len = BUFFER - self.end
            if self.missing == 0:
                result = recv(self.fd, pieces[1].iov_base, pieces[1].iov_len, MSG_DONTWAIT)
            else:
                pieces[0].iov_base = self.target
                pieces[0].iov_len = self.missing
                result = readv(self.fd, pieces, 2)
            if result < 0 and errno == EINTR:
                continue
            if result <= 0:
                return total if total > 0 else -errno if result < 0 else 0
            total += result
            if result < self.missing:
                self.target += result
                self.missing -= result
                if total < TURN:
                    continue
                return total
            self.end += result - self.missing
            self.missing = 0
            return total

    cdef int parse(self, list events) except -1:
        """Turn what has arrived into events; a fault ends the connection."""
        if self.closing:
            self.start = self.end = 0       # nobody wants it, but the end must be found
            self.missing = 0
            self.stage = IN_HEADER
            return 0
        if self.missing > 0:
            return 0
        try:
            self.parse_messages(events)
        except Exception as error:
            self.finish(events, error)
            return 0
        if self.start > 0:
            self.end -= self.start
            memmove(self.buffer, self.buffer + self.start, self.end)
            self.start = 0
        return 0

    cdef int parse_messages(self, list events) except -1:
        while self.missing == 0:
            if self.stage == IN_HEADER:
                if self.end - self.start < HEADER_NBYTES:
                    return 0
                read_header(<unsigned char*>self.buffer + self.start, &self.header)
                self.start += HEADER_NBYTES
                self.stage = IN_META
                self.meta = PyBytes_FromStringAndSize(NULL, self.header.meta_nbytes)
                self.expect(PyBytes_AS_STRING(self.meta), self.header.meta_nbytes)
            elif self.stage == IN_META and self.header.payload_nbytes > 0:
                self.stage = IN_PAYLOAD
                self.payload = shared.take(self.header.payload_nbytes)
                self.expect(self.payload.data, self.header.payload_nbytes)
            else:
                self.stage = IN_HEADER
                events.append((self, make_frame(&self.header, self.meta, self.payload)))
                self.meta = None
                self.payload = None
        return 0

    cdef int expect(self, void *target, Py_ssize_t nbytes) except -1:
        """Fill ``target`` from the buffer, and let `receive` bring what is missing."""
        cdef Py_ssize_t here = min(nbytes, self.end - self.start)
        memcpy(target, self.buffer + self.start, here)
        self.start += here
        self.target = <char*>target + here
        self.missing = nbytes - here
        return 0

    cdef object end_reason(self, Py_ssize_t result):
        """Say why the input ended: None if in order."""
        if self.closing:
            return None
        if self.error is not None:
            return self.error
        if result < 0:
            return failure(f"receive from {self.peer_address}", <int>-result)
        if self.stage != IN_HEADER or self.end > 0:
            return TransportError(
                f"cannot receive from {self.peer_address}: it ended in the middle of a message"
            )
        return None

    cdef int finish(self, list events, object reason) except -1:
        """Report the end, once, and let go of the socket (S1)."""
        if self.ended:
            return 0
        self.ended = True
        self.poller.entries.pop(self.token, None)
        if self.poller.hot is self:
            self.poller.hot = None
        self.poller.control(EPOLL_CTL_DEL, self.fd, 0, self.token)
        self.meta = None
        self.payload = None
        self.missing = 0
        if not self.writing:
            self.release()
        events.append((self, reason))
        return 0

    cdef int release(self) except -1:
        """Close the descriptor: the input has ended and nobody is writing."""
        self.queue.clear()
        if self.fd >= 0:
            close(self.fd)
        self.fd = -1
        return 0


Connection.register(StreamConnection)
