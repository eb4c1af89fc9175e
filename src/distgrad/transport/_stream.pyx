# cython: auto_pickle=False, autotestdict=False
"""StreamConnection; ``_stream.pxd`` is the map, ``base.py`` the contract.

S1  The input side of a connection, its end and its file descriptor belong to the polling
    thread. Other threads only shut the socket down; the descriptor is closed when neither
    the polling thread nor a sender is in a system call on it, so its number cannot be
    taken by another file meanwhile.
S6  With a ring, all bytes of messages go through it. The socket brings bells, chunks, and
    the end.
S7  Messages are delivered in the order of their headers. A message behind one that lacks its
    payload is held, unless its flags say that it may overtake. While more than HELD bytes are
    held, nothing is read from the socket: the payload comes over the other one.
"""

from collections import deque

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove
from posix.uio cimport iovec, readv
from posix.unistd cimport close

from distgrad._codec cimport HEADER_NBYTES, OVERTAKES, Outgoing, make_frame, read_header
from distgrad.transport._arena cimport LENDABLE, LOAN_MARK, Arena, Arrivals, LoanRecord
from distgrad.transport._lane cimport APART, APART_MARK, RECORD, Arriving, Lane, LaneOwner
from distgrad.transport._outlet cimport HOLD_GIL, Outlet, Write, failure
from distgrad.transport._poller cimport Poller as PollerType
from distgrad.transport._pool cimport Slab, shared
from distgrad.transport._ring cimport (
    BELL, CHUNK, RING, RING_IN, RING_OUT, Ring, ring_leave, ring_read
)

from distgrad.errors import ProtocolError, TransportError
from distgrad.transport.base import Connection

cimport cython

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    Py_ssize_t recv(int fd, void *data, size_t nbytes, int flags)

cdef extern from "<poll.h>" nogil:
    short POLLOUT
    cdef struct pollfd:
        int fd
        short events
    int poll(pollfd *fds, unsigned long count, int timeout_ms)

cdef extern from "transport/_shared.h" nogil:
    Py_ssize_t hear "distgrad_hear"(int fd, char *data, size_t nbytes, int *passed)
    void copy_past_caches "distgrad_copy_past_caches"(char *to, const char *data, size_t nbytes)

cdef extern from "transport/_wait.h":
    double now_s "distgrad_now"() noexcept nogil

cdef double CLOSE_FLUSH_S = 1.0        # what close gives the peer to take what is queued
cdef Py_ssize_t NOTHING = -EAGAIN      # nothing to read now


cdef enum:
    PAST_CACHES = 8 * 1024 * 1024      # arrays from here on are copied past the caches
    HELD = 64 * 1024 * 1024            # most bytes of messages that wait for a payload
    HELD_MESSAGE = 512                 # what one of them takes up beside its bytes, about

cdef bytes APART_RECORD = bytes([APART_MARK]) + bytes(RECORD - 1)


@cython.final
cdef class StreamConnection(LaneOwner):
    """A connection over a connected stream socket; takes the descriptor over.

    Made after the handshake; from then on the events come out of ``poller``. With a
    ``ring`` the messages go through the memory that it shares with the peer. With a ``lane``,
    the descriptor of a second socket, large payloads go apart from the messages.
    """

    def __cinit__(
        self, PollerType poller not None, int fd, *, str scheme, str peer_address, object identity,
        Ring ring=None, int lane=-1
    ):
        self.scheme = scheme
        self.peer_address = peer_address
        self.identity = identity
        self.held = deque()
        self.buffer = <char*>malloc(BUFFER)
        if self.buffer == NULL:
            raise MemoryError("cannot make a connection: out of memory")
        if poller.closed:
            raise TransportError("cannot make a connection: the poller is closed")
        if ring is not None:
            self.memory = ring
            self.arrivals = Arrivals()
            self.ring = &ring.end
            self.ring.fd = fd
        self.wanted = EPOLLIN
        if lane >= 0:      # first: as soon as the socket is polled, it may announce a payload
            self.lane = Lane(poller, self, lane)
        try:
            self.enter(poller, fd)
        except BaseException:
            if self.lane is not None:
                self.lane.disown()
            raise
        if ring is not None:
            self.ring.token = self.token

    def __init__(self, *args, **kwargs):
        pass

    def __dealloc__(self):
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
        if message.payload_nbytes >= APART and self.lane is not None:
            return self.send_apart(message)
        write = Write(message.parts(), 0, message)
        if self.ring != NULL and message.payload_nbytes >= LENDABLE:
            write = self.lend(message, write)
        self.queue.append(write)
        self.drain()
        if self.error is not None and not write.done:
            raise self.refusal()
        return write.done

    cdef bint send_small(self, Outgoing message) except -1:
        """Send one block at once; nobody else is writing and the queue is empty."""
        cdef iovec piece
        cdef Py_ssize_t result
        cdef Write write
        piece.iov_base = message.head
        piece.iov_len = message.head_nbytes
        result = self.put(&piece, 1)
        if result == message.head_nbytes:
            return True
        if result < 0 and result != -EAGAIN and result != -EINTR:
            self.broke(<int>-result)
            raise self.refusal()
        write = Write([message], result if result > 0 else 0)
        self.queue.append(write)
        self.drain()
        return write.done

    cdef bint send_apart(self, Outgoing message) except -1:
        """Send the message here and its payload over the lane."""
        cdef Lane lane = self.lane
        cdef Write head = Write([APART_RECORD, message], 0)
        cdef Write payload = Write(message.parts()[1:], 0, message)
        self.queue.append(head)         # no other thread comes between the two
        lane.queue.append(payload)
        self.drain()
        lane.drain()
        if self.error is not None and not (head.done and payload.done):
            raise self.refusal()
        return head.done and payload.done

    cdef Write lend(self, Outgoing message, Write parts):
        """Copy a payload into the arena and return what says so to the peer.

        Returns ``parts``, the message as it is, where the arena has no room.
        """
        cdef LoanRecord record
        cdef char *data
        cdef size_t total = 0
        cdef int slab, i
        for i in range(1, parts.count):
            total += parts.pieces[i].iov_len
        if self.arena is None:
            self.arena = Arena(self.memory, self.fd)
        slab = self.arena.take(total, &record)
        if slab < 0:
            return parts
        data = self.arena.slots[slab].data
        with nogil:
            for i in range(1, parts.count):
                if parts.pieces[i].iov_len >= PAST_CACHES:
                    copy_past_caches(data, <char*>parts.pieces[i].iov_base, parts.pieces[i].iov_len)
                else:
                    memcpy(data, parts.pieces[i].iov_base, parts.pieces[i].iov_len)
                data += parts.pieces[i].iov_len
        return Write([(<char*>&record)[:sizeof(record)], message], 0)

    cdef int broke(self, int code) except -1:
        """Note that the socket cannot be written; the polling thread will see it end."""
        if self.error is None:
            self.error = failure(f"send to {self.peer_address}", code)
        self.clear_queues()
        self.arm()
        return self.shut()

    cdef int clear_queues(self) except -1:
        """Drop what is queued, but for what a thread is writing just now: it reads from there."""
        if not self.writing:
            self.queue.clear()
        if self.lane is not None and not self.lane.writing:
            self.lane.queue.clear()
        return 0

    def refusal(self):
        """Return why a message cannot be sent."""
        if self.error is not None:
            return TransportError(str(self.error))
        return TransportError(f"cannot send to {self.peer_address}: the connection is closed")

    def flushed(self):
        """Whether nothing of earlier sends is queued on this side."""
        return (self.lane is None or self.lane.is_empty()) and self.is_empty()

    def waiting(self):
        """Return how many messages of earlier sends are queued on this side."""
        cdef Py_ssize_t apart = 0 if self.lane is None else len(self.lane.queue)
        return max(<Py_ssize_t>len(self.queue), apart)      # most have something in both

    def progress(self):
        """Return a number that grows as the peer takes what is queued."""
        return (<Outlet>self).taken + (self.lane.taken if self.lane is not None else 0)

    def detach(self, Outgoing message not None):
        """Read the arrays of a message no more; see `base.Connection.detach`."""
        cdef Py_ssize_t nbytes = self.let_go(message), apart = 0
        if self.lane is not None:
            apart = self.lane.let_go(message)
        return nbytes + apart if nbytes >= 0 and apart >= 0 else None

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
            if self.lane is not None:
                self.lane.drain()
                if not self.queue:
                    writable.fd = self.lane.fd
            writable.events = POLLOUT if self.ring == NULL else 0
            if not self.flushed():
                with nogil:
                    poll(&writable, 1, 10 if self.ring == NULL else 1)
        self.shut()

    def abort(self):
        """End at once and drop what is queued."""
        self.closing = True
        self.clear_queues()
        self.shut()

    cdef int shut(self) except -1:
        if self.lane is not None:
            self.lane.shut()
        return Outlet.shut(self)

    # --- input: the polling thread --------------------------------------------------------

    cdef bint serve(self, uint32_t what, list events) except -1:
        """Do what epoll's or the ring's bits ask for; return whether bytes came."""
        cdef Py_ssize_t result
        if what & (EPOLLOUT | RING_OUT):
            self.drain()
        if self.last_words is not None:
            return False
        if self.ring != NULL:
            if what & ~(EPOLLOUT | RING_IN | RING_OUT) and not self.listen(events):
                return False
            self.poller.attend(self.ring)
        elif not what & ~EPOLLOUT:
            return False
        elif what & (EPOLLERR | EPOLLHUP):
            self.full = False       # the peer has gone: there is not much left to read
        if self.missing > HOLD_GIL:
            with nogil:
                result = self.receive()
        else:
            result = self.receive()
        if result == NOTHING:
            return False
        self.received(result, events)
        return result > 0 and not self.ended

    cdef bint listen(self, list events) except -1:
        """Take what the socket of a connection with a ring brings; return whether it lives."""
        cdef Py_ssize_t result
        try:
            result = self.hear_bells()
        except Exception as error:
            self.finish(events, error)
            return False
        if result > 0 or result == NOTHING:
            self.drain()
            return True
        if result == -ECONNRESET:
            result = 0            # it left bells unheard, as it may
        self.read_rest(events)
        self.finish(events, self.end_reason(result))
        return False

    cdef int read_rest(self, list events) except -1:
        """Report what the peer wrote before it went."""
        for _ in range(2 * RING // BUFFER):
            if self.ended or self.receive() <= 0:
                break
            self.parse(events)
        return 0

    cdef Py_ssize_t hear_bells(self) except? -2:
        """Read the socket of a connection with a ring once, and take in what it passes."""
        cdef char bells[256]
        cdef int passed, i
        cdef Py_ssize_t result = hear(self.fd, bells, sizeof(bells), &passed)
        if passed >= 0:
            try:
                self.arrivals.adopt(passed)
            finally:
                close(passed)
        for i in range(<int>max(result, 0)):
            if bells[i] != BELL and bells[i] != CHUNK:
                raise ProtocolError(f"cannot receive: byte {bells[i]} on the socket is no bell")
        return result

    cdef int received(self, Py_ssize_t result, list events) except -1:
        if result > 0:
            return self.parse(events)
        if self.held and not self.closing:
            if result < 0 and self.error is None:
                self.error = self.end_reason(result)
            return self.wait_for_lane()
        return self.finish(events, self.end_reason(result))

    cdef Py_ssize_t receive(self) noexcept nogil:
        """Read what the kernel has, up to TURN bytes.

        Returns the number of bytes, 0 at the end of the stream, or -errno. What is
        missing of a meta block or payload goes to its place directly, and what follows
        it in the stream to the buffer, in one system call.
        """
        cdef iovec pieces[2]
        cdef Py_ssize_t result, total = 0
        if self.full:
            return NOTHING
        while True:
            pieces[1].iov_base = self.buffer + self.end
            pieces[1].iov_len = BUFFER - self.end
            pieces[0].iov_base = self.target
            pieces[0].iov_len = self.missing
            if self.ring != NULL:
                result = ring_read(self.ring, pieces, 2)
                if result < 0:
                    return total if total > 0 else result
            elif self.missing == 0:
                result = recv(self.fd, pieces[1].iov_base, pieces[1].iov_len, MSG_DONTWAIT)
            else:
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
            self.payload = None
            self.apart = False
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
        cdef Slab slab
        while self.missing == 0:
            if self.stage == IN_HEADER:
                if self.end - self.start < HEADER_NBYTES:
                    return 0
                if self.ring != NULL and <unsigned char>self.buffer[self.start] == LOAN_MARK:
                    self.accept_loan()
                    continue
                if <unsigned char>self.buffer[self.start] == APART_MARK:
                    self.accept_apart()
                    continue
                read_header(<unsigned char*>self.buffer + self.start, &self.header)
                self.start += HEADER_NBYTES
                self.stage = IN_META
                self.meta = PyBytes_FromStringAndSize(NULL, self.header.meta_nbytes)
                self.expect(PyBytes_AS_STRING(self.meta), self.header.meta_nbytes)
            elif self.stage == IN_META and self.payload is not None:
                if self.payload_nbytes != self.header.payload_nbytes:
                    raise ProtocolError("cannot take a loan: the message has another payload")
                self.stage = IN_PAYLOAD
            elif self.stage == IN_META and self.header.payload_nbytes > 0 and not self.apart:
                self.stage = IN_PAYLOAD
                slab = shared.take(self.header.payload_nbytes)
                self.payload = slab
                self.expect(slab.data, self.header.payload_nbytes)
            else:
                self.stage = IN_HEADER
                self.deliver(events)
                self.meta = None
                self.payload = None
                self.apart = False
        return 0

    cdef int deliver(self, list events) except -1:
        """Report the message that has come, or keep it until it is its turn (S7)."""
        cdef Arriving message
        if not self.apart and (not self.held or self.header.flags & OVERTAKES):
            events.append((self, make_frame(&self.header, self.meta, self.payload)))
            return 0
        message = Arriving.__new__(Arriving)
        message.header = self.header
        message.meta = self.meta
        message.payload = self.payload
        message.complete = not self.apart
        message.nbytes = HELD_MESSAGE + self.header.meta_nbytes
        if message.complete:
            message.nbytes += self.header.payload_nbytes
        self.held.append(message)
        self.hold(message.nbytes)
        if not self.apart:
            return 0
        if not self.header.payload_nbytes:
            raise ProtocolError("cannot receive: a payload is announced that has no bytes")
        return self.lane.expect(message)

    cdef int hold(self, Py_ssize_t nbytes) except -1:
        """Count bytes that are held, or no longer; read while they are not too many (S7)."""
        self.held_nbytes += nbytes
        self.full = self.held_nbytes > HELD
        self.wanted = 0 if self.full else EPOLLIN
        return self.arm()

    cdef int on_payload(self, list events) except -1:
        """Report the held messages that are complete, up to the first that is not."""
        cdef Arriving message
        try:
            while self.held and (<Arriving>self.held[0]).complete:
                message = self.held.popleft()
                self.hold(-message.nbytes)
                frame = make_frame(&message.header, message.meta, message.payload)
                if not self.closing:
                    events.append((self, frame))
        except Exception as error:
            self.finish(events, error)
        if self.last_words is not None and not self.held:
            self.finish(events, self.end_reason(0))
        return 0

    cdef int on_lane_end(self, list events, Py_ssize_t result) except -1:
        if self.last_words is None:
            self.read_rest(events)      # there may be some that overtake
        return self.finish(events, self.end_reason(result))

    cdef int wait_for_lane(self) except -1:
        """Put the end off: payloads that were sent before it are on their way."""
        if self.last_words is None:
            self.await_lane()
        if self.poller.hot is self:
            self.poller.hot = None
        return self.leave_poller()

    cdef int await_lane(self) except -1:
        self.brought = (len(self.held), self.lane.missing)
        self.lane.look_after(1)     # a few bytes within that time count
        self.last_words = self.poller.call_later(CLOSE_FLUSH_S, self.give_up)
        return 0

    def give_up(self):
        """End although payloads are missing, unless the lane still brings bytes."""
        cdef list events = []
        if self.brought != (len(self.held), self.lane.missing):
            self.await_lane()
            return
        self.finish(events, self.end_reason(0))
        for connection, item in events:
            self.poller.post(connection, item)

    cdef int accept_apart(self) except -1:
        """Note that the payload of the next message comes over the lane."""
        if self.lane is None or self.apart:
            raise ProtocolError("cannot receive: there is no lane, or two records of one message")
        self.start += RECORD
        self.apart = True
        return 0

    cdef int accept_loan(self) except -1:
        """Take over the payload that lies in the peer's arena; its message follows."""
        cdef LoanRecord record
        memcpy(&record, self.buffer + self.start, sizeof(record))
        self.start += sizeof(record)
        if self.payload is not None:
            raise ProtocolError("cannot take a loan: the one before belongs to no message")
        while not self.arrivals.knows(record.chunk):      # passed before the record was written
            if self.hear_bells() <= 0:
                break
        self.payload = self.arrivals.claim(&record, self.memory)
        self.payload_nbytes = record.nbytes
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
        if (
            self.stage != IN_HEADER or self.end > 0 or self.held
            or self.payload is not None or self.apart
        ):
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
        self.leave_poller()
        if self.ring != NULL:
            self.poller.neglect(self.ring)
            ring_leave(self.ring)
        if self.last_words is not None:
            self.last_words.cancel()
        if self.lane is not None:
            self.lane.finish()
        self.held.clear()
        self.meta = None
        self.payload = None
        self.missing = 0
        if not self.writing:
            self.release()
        events.append((self, reason))
        return 0

    cdef int release(self) except -1:
        Outlet.release(self)
        if self.ring != NULL:
            self.ring.fd = -1
        if self.arena is not None:
            self.arena.fd = -1
        return 0

    cdef int drop(self) except -1:
        self.closing = True
        self.shut()
        return self.finish([], None)

    cdef int forget(self) except -1:
        self.closing = True
        return Outlet.forget(self)


Connection.register(StreamConnection)
