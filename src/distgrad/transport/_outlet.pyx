# cython: auto_pickle=False, autotestdict=False
"""Outlet: sending without waiting; ``_outlet.pxd`` is the map.

S2  `writing` and `queue` change under the GIL only. Who sets `writing` sends until the queue
    is empty, its turn is over, or the kernel (the ring) is full; whoever finds it set leaves
    the message in the queue.
S3  A message is in the queue, or sent whole, or lost with the connection: whenever the queue
    holds something and nobody is writing, EPOLLOUT is armed or the ring is starved.
"""

import os
from collections import deque

from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.uio cimport iovec
from posix.unistd cimport close

from distgrad.transport._ring cimport ring_starve, ring_write

from distgrad.errors import TransportError

cimport cython

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLOUT
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    Py_ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef object failure(str what, int code):
    return TransportError(f"cannot {what}: {os.strerror(code)}")


@cython.final
cdef class Write:
    """What `Outlet` queues."""

    def __cinit__(self, list parts not None, Py_ssize_t skip, message=None):
        self.message = message
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

    cdef bint own(self) except -1:
        """Copy what is left, and let go of the arrays; False if out of memory."""
        cdef char *place
        cdef int i
        cdef Py_ssize_t nbytes = 0
        for i in range(self.first, self.count):
            nbytes += self.pieces[i].iov_len
        self.copy = place = <char*>malloc(nbytes)
        if place == NULL:
            return False
        self.copy_nbytes = nbytes
        with nogil:
            for i in range(self.first, self.count):
                memcpy(place, self.pieces[i].iov_base, self.pieces[i].iov_len)
                self.pieces[i].iov_base = place
                place += self.pieces[i].iov_len
        self.release_views()
        self.message = None
        return True

    cdef int release_views(self) except -1:
        while self.num_views:
            self.num_views -= 1
            PyBuffer_Release(&self.views[self.num_views])
        return 0

    def __dealloc__(self):
        self.release_views()
        free(self.views)
        free(self.pieces)
        free(self.copy)


cdef class Outlet(Pollable):
    """What a `StreamConnection` and its `Lane` have in common."""

    def __cinit__(self):
        self.fd = -1
        self.queue = deque()

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    cdef int enter(self, PollerType poller, int fd) except -1:
        """Take a descriptor over and have it polled; if that fails it stays the caller's."""
        os.set_blocking(fd, False)
        self.poller = poller
        poller.last_token += 1
        self.token = poller.last_token
        poller.control(EPOLL_CTL_ADD, fd, self.wanted, self.token)
        self.asked = self.wanted
        poller.entries[self.token] = self
        self.fd = fd
        self.watched = True
        return 0

    cdef int leave_poller(self) except -1:
        """Hear of the socket no more; idempotent."""
        if self.watched:
            self.watched = False
            self.poller.control(EPOLL_CTL_DEL, self.fd, 0, self.token)
        return 0

    cdef Py_ssize_t put(self, const iovec *pieces, int count) noexcept nogil:
        """Hand bytes to the kernel or the ring; return how many, or -errno."""
        cdef msghdr message
        cdef Py_ssize_t result
        if self.ring != NULL:
            return ring_write(self.ring, pieces, count)
        memset(&message, 0, sizeof(message))
        message.msg_iov = <iovec*>pieces
        message.msg_iovlen = count
        result = sendmsg(self.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        return result if result >= 0 else -errno

    cdef int drain(self) except -1:
        """Send from the queue until it is empty, the turn is over or the kernel is full (S2)."""
        cdef iovec pieces[GATHER]
        cdef size_t total
        cdef Py_ssize_t result = 0
        cdef int count
        if self.writing:
            return 0
        self.writing = True
        while self.queue and not self.ended:
            count = self.gather(pieces, &total)
            if total > HOLD_GIL:
                with nogil:
                    result = self.put(pieces, count)
            else:
                result = self.put(pieces, count)
            if result >= 0:
                self.taken += result
                self.sent(result)
            if result < <Py_ssize_t>total and result != -EINTR:
                if self.ring == NULL or (result < 0 and result != -EAGAIN):
                    break
                if not ring_starve(self.ring, True):
                    break
            if self.turn:
                break
        self.writing = False
        if self.awaited and not self.queue:
            self.awaited = False
            self.poller.ring()
        if self.ended:
            return self.release()
        if result < 0 and result != -EAGAIN and result != -EINTR:
            return self.broke(<int>-result)
        return self.arm()

    cdef int gather(self, iovec *pieces, size_t *total) except -1:
        """List what is queued, up to GATHER pieces and a turn; return how many."""
        cdef Write write
        cdef int count = 0, i
        total[0] = 0
        for item in self.queue:
            write = item
            for i in range(write.first, write.count):
                if count == GATHER:
                    return count
                pieces[count] = write.pieces[i]
                if self.turn and pieces[count].iov_len > self.turn - total[0]:
                    pieces[count].iov_len = self.turn - total[0]
                total[0] += pieces[count].iov_len
                count += 1
                if self.turn and total[0] == self.turn:
                    return count
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

    cdef bint is_empty(self) except -1:
        if not self.queue and not self.writing:
            return True
        self.awaited = True
        return False

    cdef Py_ssize_t let_go(self, object message) except -2:
        """See ``_outlet.pxd``; waits while another thread is in a system call with the arrays."""
        cdef Write write
        cdef Py_ssize_t nbytes = 0
        while self.writing:
            with nogil:
                sched_yield()
        self.writing = True         # S2: whoever sends meanwhile leaves it in the queue
        try:
            for write in list(self.queue):
                if write.message is message and not write.own():
                    return -1
                nbytes += write.copy_nbytes
        finally:
            self.writing = False
            self.drain()
        return nbytes

    cdef int arm(self) except -1:
        """Ask for EPOLLOUT while something is queued, and only then (S3)."""
        cdef uint32_t events = self.wanted
        if self.ring != NULL:
            if not self.queue:
                ring_starve(self.ring, False)
        elif self.queue:
            events |= EPOLLOUT
        if events != self.asked and self.watched:
            self.asked = events
            self.poller.control(EPOLL_CTL_MOD, self.fd, events, self.token)
        return 0

    cdef int shut(self) except -1:
        """End both directions, which wakes the polling thread; it closes the descriptor."""
        if self.fd >= 0:
            shutdown(self.fd, SHUT_RDWR)
        return 0

    cdef int broke(self, int code) except -1:
        return 0

    cdef int release(self) except -1:
        self.queue.clear()
        if self.fd >= 0:
            close(self.fd)
        self.fd = -1
        return 0

    cdef int forget(self) except -1:
        self.ended = True
        if self.fd >= 0:
            close(self.fd)
        self.fd = -1
        return 0
