# cython: auto_pickle=False, autotestdict=False
"""The poller; ``_poller.pxd`` is the map.

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

from cpython.exc cimport PyErr_CheckSignals, PyErr_SetObject, PyErr_WriteUnraisable
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport close, read
from posix.unistd cimport write as write_fd

from distgrad.transport._ring cimport (
    RING_IN, RING_OUT, RingEnd, ring_doze, ring_news, ring_rouse
)

from distgrad.config import config
from distgrad.errors import TransportError

cimport cython

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLIN
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll_fd, epoll_event *events, int most, int timeout_ms)

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "transport/_shared.h" nogil:
    void fence "distgrad_fence"()
    void pause "distgrad_pause"()

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
    YIELD_TURNS = 4     # direct reads from one sched_yield to the next
    WAKES = 3           # a wait this many spins long may have been a short one with two wake-ups
    RING_LOOKS = 16     # looks at the rings that take about as long as reading a socket
    RING_TURNS = 64     # most messages from rings between two looks at all sockets

cdef extern from "pythread.h" nogil:
    unsigned long PyThread_get_thread_ident()

cdef double CROWDED_S = 2e-6           # a yield longer than this gave the processor away
cdef double BUSY_S = 1e-3              # same, to somebody who computes: no peer that answers
cdef double CALM_S = 20e-6             # how long nobody spins then: once, for the start,
cdef double LONGEST_CALM_S = 0.1       # and at most, if spinning hardly ever pays
cdef double DISMAY = 4.0               # how much longer after every such yield;
cdef double COMFORT = 0.5              # how much shorter after every message that came meanwhile
cdef double LONGEST_S = 3600.0         # of one epoll_wait
cdef double SIGNAL_SLICE_S = 0.2       # same in the main thread, where signals are looked for
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


cdef class Pollable:
    """A connection as its poller sees it; ``_poller.pxd`` tells what the methods promise."""

    def __init__(self, *args, **kwargs):
        raise TypeError("cannot make a Pollable: it is the base of connections")

    cdef Py_ssize_t receive(self) noexcept nogil:
        return 0

    cdef int received(self, Py_ssize_t result, list events) except -1:
        return 0

    cdef bint serve(self, uint32_t what, list events) except -1:
        return False

    cdef int drop(self) except -1:
        return 0

    cdef int forget(self) except -1:
        return 0


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
        self.overlooked = []
        self.enrolled = weakref.WeakSet()
        self.next_timer = math.inf
        self.last_token = WAKE_TOKEN
        self.cpus = len(os.sched_getaffinity(0))
        self.budget_s = 1e-6 * config.spin_us
        self.interval = self.patience = 1
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
            self.ring()        # a thread that spins just now would block past it
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
            to the whole of it when events come that soon, towards nothing when they do not,
            and to nothing for a while where others compute on the same processors.

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
        cdef double now
        if self.closed:
            raise TransportError("cannot poll: the poller is closed")
        if self.polling:
            raise RuntimeError("cannot poll: another thread is polling")
        self.polling = True
        self.called = self.spun = False
        now = now_s()
        spin = spin and self.cpus > 1 and now >= self.calm_until
        self.most_s = config.spin_us * 1e-6 if spin else 0.0
        try:
            self.fill(events, now + timeout_s)
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
        cdef Pollable hot
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
            if events or woken or self.called or self.overlooked:
                until = 0.0
            elif PyThread_get_thread_ident() == main_ident:
                until = min(until, now_s() + SIGNAL_SLICE_S)
            with nogil:
                self.wait(hot, has_hot, until)
            if self.closed:
                return 0
            if hot is not None and self.hot_result != NOTHING:
                hot.received(self.hot_result, events)
            self.serve_ready(events)
            if self.overlooked:
                self.serve_overlooked(events)
            if events and self.spun:
                self.calm_s *= COMFORT
            if events or woken or self.called:
                return 0
            PyErr_CheckSignals()
            if now_s() >= deadline and not get_flag(&self.woken):
                return 0

    cdef void wait(self, Pollable hot, bint has_hot, double until) noexcept nogil:
        """Wait until a socket is ready, the hot one was read, somebody wakes, or ``until``."""
        cdef double start = now_s(), now = start, limit
        cdef int round_ = 0, yields = YIELD_TURNS
        cdef double away
        self.hot_result = NOTHING
        self.num_ready = 0
        if has_hot and hot.ring != NULL:       # an answer may come sooner than a yield returns
            yields = self.patience
        limit = min(start + min(self.budget_s, self.most_s), until)
        if until <= start:
            self.turn = RING_TURNS         # the only look: at all connections
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
            self.spun = True
            round_ += 1
            if round_ % yields == 0:
                sched_yield()
                # If that took long, others want this processor, and perhaps the peer is one.
                away = now_s() - now
                self.patience = 1 if away > CROWDED_S else min(2 * self.patience, 4 * YIELD_TURNS)
                if away > BUSY_S:
                    self.calm_down(now + away)
                    break
        if now >= until or get_flag(&self.woken):
            return
        if self.most_s > 0.0:
            self.budget_s = self.budget_s * 0.5 if self.budget_s > 1e-6 else 0.0
        self.block(now, until)
        # Both sides may be asleep, and each wake-up adds to the wait: judged by the bare spin
        # limit, two workers that once fell asleep would never find back to spinning.
        if self.num_ready > 0 and now_s() - start <= WAKES * self.most_s:
            self.budget_s = self.most_s

    cdef void calm_down(self, double now) noexcept nogil:
        """Spin no more for a while: others compute here.

        Who spins among processes that compute uses up its share of the processor and waits for
        a turn; who sleeps is let in as soon as it is woken. But where a peer with many threads has
        a long turn now and then, spinning pays all the same. So the while grows if there are more
        than one such end to two messages for which nobody slept: 4 * 0.5 * 0.5 = 1. Parts of a
        message do not count: what comes in a thousand parts gains no more than one wake-up.
        """
        self.calm_s = min(max(DISMAY * self.calm_s, CALM_S), LONGEST_CALM_S)
        self.calm_until = now + self.calm_s

    cdef bint spin_round(self, Pollable hot, bint has_hot) noexcept nogil:
        """Look once at the hot connection or at all; return whether there is something to do.

        Looking at all costs more, so it happens only every `interval` rounds; `interval`
        grows while the hot connection is the one that has news.
        """
        if self.num_attended > 0 and self.look_at_rings(hot, has_hot):
            if self.interval < MAX_INTERVAL:
                self.interval += 1
            self.turn = 0
            self.streak += 1
            if self.streak >= RING_TURNS:
                self.look_at_sockets()
            return True
        if has_hot and hot.ring == NULL:
            self.hot_result = hot.receive()
            if self.hot_result != NOTHING and (hot.missing == 0 or self.hot_result <= 0):
                if self.interval < MAX_INTERVAL:
                    self.interval += 1
                self.turn += 1
                if self.turn >= MAX_INTERVAL:
                    self.look_at_sockets()
                return True
        self.turn += 1
        if has_hot and self.turn < self.interval:
            return False
        self.look_at_sockets()
        return self.num_ready > 0

    cdef bint look_at_rings(self, Pollable hot, bint has_hot) noexcept nogil:
        """Look at the attended rings a few times; return whether there is something to do.

        What the hot connection has is read at once, what others have goes to `ready`.
        """
        cdef int looks = RING_LOOKS, i
        cdef uint32_t what
        cdef RingEnd *end
        if self.turn >= RING_TURNS or (has_hot and hot.ring == NULL):
            looks = 1
        while True:
            for i in range(self.num_attended):
                end = self.attended[i]
                what = ring_news(end)
                if what == RING_IN and has_hot and end == hot.ring:
                    self.hot_result = hot.receive()
                    if self.hot_result > 0 and hot.missing > 0:
                        looks = 0          # a part of a long message: it may take a while
                    else:
                        looks = -1
                elif what:
                    self.ready[self.num_ready].events = what
                    self.ready[self.num_ready].data.u64 = end.token
                    self.num_ready += 1
            if looks < 0 or self.num_ready > 0:
                return True
            looks -= 1
            if looks <= 0:
                return False
            pause()

    cdef void look_at_sockets(self) noexcept nogil:
        cdef int found = epoll_wait(
            self.epoll_fd, self.ready + self.num_ready, READY - self.num_ready, 0
        )
        self.turn = self.streak = 0
        if found > 0:
            self.num_ready += found
            self.interval = 1

    cdef void block(self, double now, double until) noexcept nogil:
        """Sleep in the kernel until a socket is ready, somebody wakes, or ``until``."""
        cdef int i
        self.spun = False
        set_flag(&self.sleeping, 1)
        if not get_flag(&self.woken) and self.doze():
            self.num_ready = epoll_wait_s(
                self.epoll_fd, self.ready, READY, min(until - now, LONGEST_S)
            )
        set_flag(&self.sleeping, 0)
        for i in range(self.num_attended):
            ring_rouse(self.attended[i])

    cdef bint doze(self) noexcept nogil:
        """Ask all rings for a bell; return False if one had news before that."""
        cdef int i
        for i in range(self.num_attended):
            ring_doze(self.attended[i])
        fence()
        for i in range(self.num_attended):
            if ring_news(self.attended[i]):
                return False
        return True

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

    cdef int serve_ready(self, list events) except -1:
        cdef uint64_t count
        cdef int i
        for i in range(self.num_ready):
            if self.closed:
                return 0
            if self.ready[i].data.u64 == WAKE_TOKEN:
                read(self.wake_fd, &count, sizeof(count))
            else:
                self.serve_entry(self.ready[i].data.u64, self.ready[i].events, events)
        return 0

    cdef int serve_entry(self, uint64_t token, uint32_t what, list events) except -1:
        cdef object entry = self.entries.get(token)
        if isinstance(entry, Pollable):
            if (<Pollable>entry).serve(what, events):
                self.hot = entry
        elif entry is not None:
            self.run((<Watch>entry).on_readable)
        return 0

    cdef int serve_overlooked(self, list events) except -1:
        cdef list tokens = self.overlooked
        self.overlooked = []
        for token in tokens:
            if self.closed:
                return 0
            self.serve_entry(token, RING_IN | RING_OUT, events)
        return 0

    cdef int attend(self, RingEnd *end) except -1:
        """Look at a ring from now on; the one attended longest has to ring a bell instead."""
        cdef RingEnd *other
        if end.attended:
            return 0
        if self.num_attended < ATTENDED:
            self.attended[self.num_attended] = end
            self.num_attended += 1
        else:
            other = self.attended[self.victim]
            self.attended[self.victim] = end
            self.victim = (self.victim + 1) % ATTENDED
            other.attended = False
            ring_doze(other)
            fence()
            if ring_news(other):
                self.overlooked.append(other.token)
        end.attended = True
        ring_rouse(end)
        return 0

    cdef void neglect(self, RingEnd *end) noexcept:
        """Never look at a ring again."""
        cdef int i
        end.attended = False
        for i in range(self.num_attended):
            if self.attended[i] == end:
                self.num_attended -= 1
                self.attended[i] = self.attended[self.num_attended]
                return

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
        if self.epoll_fd < 0:
            return 0
        for entry in list(self.entries.values()):
            if isinstance(entry, Pollable):
                (<Pollable>entry).drop()
        for enrolled in list(self.enrolled):
            enrolled.abort()
        close(self.epoll_fd)
        self.epoll_fd = -1
        return self.clear()

    cdef int forget(self) except -1:
        """In the child of a fork: close the copies of all descriptors, and only them."""
        self.closed = True
        for entry in list(self.entries.values()):
            if isinstance(entry, Pollable):
                (<Pollable>entry).forget()
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
        self.overlooked.clear()
        self.num_attended = 0
        self.next_timer = math.inf
        self.hot = None
        return 0
