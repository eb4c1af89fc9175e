# cython: auto_pickle=False, autotestdict=False
"""Two byte rings in shared memory, one a direction; ``_ring.pxd`` is the map.

A ring stands in for the stream of a socket: bytes in order, no more. Nobody ever waits in
here. The socket stays: its end is the end of the connection, and a byte on it wakes a peer.
"""

from libc.errno cimport EAGAIN, EPIPE, EPROTO
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.uio cimport iovec

cimport cython

cdef extern from "transport/_shared.h" nogil:
    uint64_t load64 "distgrad_load64"(uint64_t *at)
    void store64 "distgrad_store64"(uint64_t *at, uint64_t value)
    uint32_t load32 "distgrad_load32"(uint32_t *at)
    void store32 "distgrad_store32"(uint32_t *at, uint32_t value)
    bint swap32 "distgrad_swap32"(uint32_t *at, uint32_t expected, uint32_t value)
    void fence "distgrad_fence"()
    int signal "distgrad_signal"(int fd, char byte, int passed)
    void *map_file "distgrad_map"(int fd, uint64_t least, uint64_t most, uint64_t *nbytes)

cdef extern from "<sys/mman.h>" nogil:
    int munmap(void *data, size_t nbytes)

cdef extern from "<poll.h>" nogil:
    short POLLHUP, POLLERR
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout_ms)

cdef extern from * nogil:
    """
    #ifndef POLLRDHUP
    #define POLLRDHUP 0x2000
    #endif
    """
    short POLLRDHUP

cdef enum:
    PAGE = 4096
    CONTROL = 2 * PAGE                                 # a Direction, rounded up
    NBYTES = PAGE + 2 * CONTROL + 2 * RING             # of the memory file
    NOTE = 32                                          # bytes of a note

RING_FILE_NBYTES = NBYTES
NOTE_NBYTES = NOTE


@cython.final
@cython.no_gc
cdef class Ring:
    """One side's view of the memory file of a connection.

    Parameters
    ----------
    fd
        Of the file; stays the caller's, and may be closed once this is made.
    number
        0 on the side that made the file, 1 on the other.

    Raises
    ------
    OSError
        The file is not what it has to be, or cannot be mapped.
    """

    def __cinit__(self, int fd, int number):
        cdef uint64_t nbytes = 0
        cdef char *data
        self.memory = <char*>map_file(fd, NBYTES, NBYTES, &nbytes)
        if self.memory == NULL:
            raise OSError("cannot map the memory file of a connection")
        memset(&self.end, 0, sizeof(self.end))
        number &= 1
        data = self.memory + PAGE + 2 * CONTROL
        self.end.to_peer = <Direction*>(self.memory + PAGE + number * CONTROL)
        self.end.from_peer = <Direction*>(self.memory + PAGE + (1 - number) * CONTROL)
        self.end.to_data = data + number * RING
        self.end.from_data = data + (1 - number) * RING
        self.end.fd = -1
        store32(&self.end.from_peer.asleep, ASLEEP)

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, NBYTES)

    def leave_note(self, int place, bytes note not None):
        """Write 32 bytes for the other side, at place 0 or 1."""
        cdef const char *data = note
        if len(note) != NOTE:
            raise ValueError(f"cannot leave a note of {len(note)} bytes: expected {NOTE}")
        memcpy(self.memory + (place & 1) * NOTE, data, NOTE)
        fence()

    def read_note(self, int place):
        """Return the 32 bytes at place 0 or 1."""
        fence()
        return (self.memory + (place & 1) * NOTE)[:NOTE]


cdef inline void ring_bell(RingEnd *end) noexcept nogil:
    """Wake the peer if it does not look by itself (R3)."""
    cdef uint32_t asleep
    fence()
    asleep = load32(&end.to_peer.asleep)
    if asleep == AWAKE:
        return
    if asleep == GONE or swap32(&end.to_peer.asleep, ASLEEP, AWAKE):
        signal(end.fd, BELL, -1)      # if the socket is full, bells enough are on their way


cdef inline bint hung_up(int fd) noexcept nogil:
    cdef pollfd ending
    ending.fd = fd
    ending.events = POLLRDHUP
    ending.revents = 0
    return poll(&ending, 1, 0) > 0


cdef uint32_t ring_news(RingEnd *end) noexcept nogil:
    """Tell what there is to do, as bits."""
    cdef uint32_t what = 0
    if load64(&end.from_peer.tail) != end.head:
        what |= RING_IN
    if end.starved and RING - (end.tail - load64(&end.to_peer.head)) >= RING // 2:
        what |= RING_OUT
    return what


cdef Py_ssize_t ring_write(RingEnd *end, const iovec *pieces, int count) noexcept nogil:
    """Copy bytes in and show them to the peer.

    Returns how many there was room for, or -errno: EAGAIN for none, EPIPE if the peer has
    gone, EPROTO if it has scribbled over its index.
    """
    cdef uint64_t start = end.tail, room, at, nbytes, done
    cdef char *data
    cdef int i
    # Not afterwards: a peer may read this message, answer it, and leave before we look.
    if load32(&end.to_peer.asleep) == GONE and hung_up(end.fd):
        return -EPIPE
    for i in range(count):
        data = <char*>pieces[i].iov_base
        done = 0
        while done < pieces[i].iov_len:
            nbytes = min(<uint64_t>pieces[i].iov_len - done, <uint64_t>STEP)
            room = RING - (end.tail - end.seen)
            if room < nbytes:
                end.seen = load64(&end.to_peer.head)
                room = RING - (end.tail - end.seen)
                if room > RING:
                    return -EPROTO
                nbytes = min(nbytes, room)
                if nbytes == 0:
                    break
            at = end.tail & (RING - 1)
            nbytes = min(nbytes, RING - at)
            memcpy(end.to_data + at, data + done, nbytes)
            end.tail += nbytes
            done += nbytes
            if end.tail - start >= STEP:
                store64(&end.to_peer.tail, end.tail)
        if done < pieces[i].iov_len:
            break
    if end.tail == start:
        return -EPIPE if hung_up(end.fd) else -EAGAIN
    store64(&end.to_peer.tail, end.tail)
    ring_bell(end)
    return <Py_ssize_t>(end.tail - start)


cdef Py_ssize_t ring_read(RingEnd *end, const iovec *pieces, int count) noexcept nogil:
    """Copy bytes out, and show the room to a peer that wants it.

    Returns how many, or -errno: EAGAIN for none, EPROTO if the peer has scribbled over its
    index.
    """
    cdef uint64_t start = end.head, there, at, nbytes, done
    cdef char *data
    cdef int i
    there = load64(&end.from_peer.tail) - end.head
    if there == 0:
        return -EAGAIN
    if there > RING:
        return -EPROTO
    for i in range(count):
        data = <char*>pieces[i].iov_base
        done = 0
        while done < pieces[i].iov_len and there > 0:
            at = end.head & (RING - 1)
            nbytes = min(min(<uint64_t>pieces[i].iov_len - done, there), <uint64_t>STEP)
            nbytes = min(nbytes, RING - at)
            memcpy(data + done, end.from_data + at, nbytes)
            end.head += nbytes
            done += nbytes
            there -= nbytes
            store64(&end.from_peer.head, end.head)
    fence()
    if load32(&end.from_peer.starving):
        if RING - (load64(&end.from_peer.tail) - end.head) >= RING // 2:
            ring_bell(end)
    return <Py_ssize_t>(end.head - start)


cdef bint ring_starve(RingEnd *end, bint starved) noexcept nogil:
    """Say whether something waits for room; return whether there is room already."""
    if not starved:
        if end.starved:
            end.starved = False
            store32(&end.to_peer.starving, 0)
        return False
    end.starved = True
    store32(&end.to_peer.starving, 1)
    fence()
    return (ring_news(end) & RING_OUT) != 0


cdef void ring_doze(RingEnd *end) noexcept nogil:
    """Ask for a bell. The caller puts a fence behind it and looks for news once more."""
    store32(&end.from_peer.asleep, ASLEEP)


cdef void ring_rouse(RingEnd *end) noexcept nogil:
    """Ask for no bell: from now on this side looks by itself."""
    store32(&end.from_peer.asleep, AWAKE)


cdef void ring_leave(RingEnd *end) noexcept nogil:
    """Let the peer find out at its next message that nobody reads."""
    store32(&end.from_peer.asleep, GONE)
    end.starved = False
