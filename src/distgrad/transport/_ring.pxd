"""The memory that two processes share for one connection; docs/transports.md has the table.

R1  `tail` has one writer, the producer; `head` and `returned` one, the consumer. Both count
    bytes for ever; the peer's is bounded again each time it is read.
R2  Nothing in shared memory is read twice: bytes are copied out before they are looked at.
R3  `asleep` is set before the consumer stops looking, then it looks once more; the producer
    moves its index, then looks at `asleep`. Between the two stands a full fence on both
    sides, so a bell is never missed.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec

cdef enum:
    RING = 512 * 1024     # bytes of one direction; a power of two
    STEP = 64 * 1024      # most bytes copied before the other side may see them
    SLABS = 1024          # slabs that one side can lend
    BELL = 0x01           # on the socket: look at the ring
    CHUNK = 0x02          # same, with the descriptor of a chunk

# Values of `asleep`.
cdef enum:
    AWAKE = 0             # the consumer looks by itself
    ASLEEP = 1            # it wants a bell
    GONE = 2              # it will not look again; the bell finds its socket closed

# News of a ring, in the place of epoll's bits.
cdef enum:
    RING_IN = 1 << 16     # bytes to read
    RING_OUT = 1 << 17    # room for what is queued

# One direction, in shared memory; each field has a cache line of its own.
cdef struct Direction:
    uint64_t tail                # producer: bytes written so far
    uint8_t gap_a[56]
    uint32_t starving            # producer: wants to know of room
    uint8_t gap_b[60]
    uint64_t head                # consumer: bytes read so far
    uint8_t gap_c[56]
    uint32_t asleep              # consumer: AWAKE, ASLEEP or GONE
    uint8_t gap_d[60]
    uint32_t returned[SLABS]     # consumer: loan of each slab of the producer that it let go of

# What one side knows of its two rings; private memory.
cdef struct RingEnd:
    Direction *to_peer
    Direction *from_peer
    char *to_data                # RING bytes
    char *from_data
    uint64_t tail                # of to_peer
    uint64_t seen                # head of to_peer when last looked at
    uint64_t head                # of from_peer
    uint64_t token               # of the connection in its poller
    int fd                       # the socket, for bells
    bint starved                 # something is queued that waits for room
    bint attended                # the poller looks at it without a bell


cdef class Ring:
    cdef char *memory            # the mapping; NULL until mapped
    cdef RingEnd end

cdef uint32_t ring_news(RingEnd *end) noexcept nogil
cdef Py_ssize_t ring_write(RingEnd *end, const iovec *pieces, int count) noexcept nogil
cdef Py_ssize_t ring_read(RingEnd *end, const iovec *pieces, int count) noexcept nogil
cdef bint ring_starve(RingEnd *end, bint starved) noexcept nogil
cdef void ring_doze(RingEnd *end) noexcept nogil
cdef void ring_rouse(RingEnd *end) noexcept nogil
cdef void ring_leave(RingEnd *end) noexcept nogil
