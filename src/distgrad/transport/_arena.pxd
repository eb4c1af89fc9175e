"""Payloads in shared memory: the sender copies one in, the receiver owns it until it lets go.

A chunk is a memory file that both sides map once; it is cut into slabs of one size, a power
of two. A loan is a slab whose content is on its way to, or belongs to, the receiver.

A1  A slab is idle, being filled, or lent. The sender writes to it in the second state only.
A2  Each loan of a slab has another number (never 0). The receiver writes that number to the
    slab's word in the ring's memory to give it back; anything else there means nothing.
A3  The receiver trusts no word of the sender: place and length are bounded by what it has
    mapped. The content of a payload may change under its hands if the sender is hostile.
A4  The fields of an arena change only under the GIL.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from distgrad.transport._ring cimport SLABS, Ring

cdef enum:
    LENDABLE = 32 * 1024 + 1               # payloads from here on are lent, not streamed
    LOAN_MARK = 0xFF                       # first byte of a loan record, where frames have theirs
    CHUNKS = 128                           # most chunks of one side

# Stands in the ring before the header of the frame whose payload it names: 64 bytes.
cdef struct LoanRecord:
    uint8_t mark           # LOAN_MARK
    uint8_t gap[3]         # 0
    uint32_t slab          # word of `returned` that gives it back
    uint32_t number        # what to write there
    uint32_t chunk         # in the order in which chunks were passed
    uint64_t offset        # of the payload in the chunk
    uint64_t nbytes        # of the payload
    uint8_t rest[32]       # 0

cdef struct Slot:          # a slab, as its owner sees it
    char *data
    uint64_t nbytes
    uint64_t warm          # first bytes that have pages
    uint64_t used          # `clock` when it was lent last
    uint32_t chunk
    uint32_t number        # of the current or last loan
    bint lent
    bint busy              # pages are being given to it

cdef struct Link:          # of the circle of all loans; lives in its Loan
    Link *previous
    Link *next             # NULL: not in it
    char *data
    uint64_t nbytes
    uint32_t number        # of the loan; 0: nothing to give back


cdef class Chunk:
    """One mapping; gone with its last user."""

    cdef char *data
    cdef uint64_t nbytes


cdef class Arena:
    """The slabs that one side lends to its peer."""

    cdef object __weakref__
    cdef Ring ring
    cdef int fd                    # the socket, for new chunks; -1 once it is closed
    cdef list chunks               # of Chunk; its index is the number the peer knows it by
    cdef Slot slots[SLABS]
    cdef int count                 # of slots
    cdef uint64_t mapped           # bytes of the chunks
    cdef uint64_t lent             # bytes of the slabs that are lent

    cdef int take(self, uint64_t nbytes, LoanRecord *record) except -2
    cdef int fit(self, uint64_t nbytes, uint64_t most) noexcept
    cdef void collect(self) noexcept
    cdef bint grow(self, uint64_t nbytes) except -1
    cdef bint has_room(self, uint64_t nbytes, uint64_t total) noexcept
    cdef bint add(self, Chunk chunk, int fd, uint64_t nbytes, uint64_t total) except -1
    cdef bint warm_up(self, Slot *slot, uint64_t nbytes) except -1
    cdef void cool(self) noexcept


cdef class Arrivals:
    """The chunks that the peer passed."""

    cdef list chunks
    cdef uint64_t mapped

    cdef int adopt(self, int fd) except -1
    cdef bint knows(self, uint32_t chunk) noexcept
    cdef Loan claim(self, const LoanRecord *record, Ring ring)


cdef class Loan:
    """A payload that arrived in a slab of the peer; exports it as a writable buffer."""

    cdef Chunk chunk               # keeps the mapping
    cdef Ring ring                 # keeps the word
    cdef uint32_t slab
    cdef Link link
