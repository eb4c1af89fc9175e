# cython: auto_pickle=False, autotestdict=False
"""Payloads in shared memory; ``_arena.pxd`` is the map."""

import fcntl
import os
import weakref

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from distgrad.transport._ring cimport CHUNK, SLABS, Ring

from distgrad.config import config
from distgrad.errors import ProtocolError

cimport cython

cdef extern from "transport/_shared.h" nogil:
    uint32_t load32 "distgrad_load32"(uint32_t *at)
    void store32 "distgrad_store32"(uint32_t *at, uint32_t value)
    int signal "distgrad_signal"(int fd, char byte, int passed)
    void *map_file "distgrad_map"(int fd, uint64_t least, uint64_t most, uint64_t *nbytes)
    int populate "distgrad_populate"(char *data, uint64_t nbytes)
    int detach "distgrad_detach"(char *data, uint64_t nbytes)

cdef extern from "<sys/mman.h>" nogil:
    int MADV_REMOVE
    int madvise(void *data, size_t nbytes, int advice)
    int munmap(void *data, size_t nbytes)

cdef enum:
    PAGE = 4096
    SMALLEST = 64 * 1024               # slab
    CARVED = 4 * 1024 * 1024           # chunks of smaller slabs hold as many as fit into this

cdef uint64_t LARGEST = 256 << 20      # slab; larger payloads go through the ring
cdef uint64_t LENT = 256 << 20         # nothing is lent while more than this is
cdef uint64_t MAPPED = 1 << 30         # most bytes of the chunks of one side
cdef uint64_t clock = 0                # counts loans
cdef uint64_t warm = 0                 # bytes with pages in all arenas of this process

# Idle slabs of all arenas share one budget: memory is a property of the process.
_arenas = weakref.WeakSet()


cdef uint64_t slab_bytes(uint64_t nbytes) noexcept:
    cdef uint64_t size = SMALLEST
    while size < nbytes:
        size *= 2
    return size


@cython.final
@cython.no_gc
cdef class Chunk:
    """A mapped memory file."""

    def __dealloc__(self):
        if self.data != NULL:
            munmap(self.data, self.nbytes)


cdef Chunk map_chunk(int fd, uint64_t most):
    """Map a memory file, or return None if it is not one to rely on."""
    cdef Chunk chunk = Chunk.__new__(Chunk)
    chunk.data = <char*>map_file(fd, SMALLEST, most, &chunk.nbytes)
    return chunk if chunk.data != NULL else None


def memory_file(str name not None, nbytes):
    """Return the descriptor of a new memory file that can neither shrink nor grow.

    Raises
    ------
    OSError
        The kernel or a sandbox does not allow it.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


@cython.final
cdef class Arena:
    """What one side lends; made for a connection whose socket is ``fd``."""

    def __cinit__(self, Ring ring not None, int fd):
        self.ring = ring
        self.fd = fd
        self.chunks = []
        _arenas.add(self)

    def __dealloc__(self):
        global warm
        cdef int i
        for i in range(self.count):
            warm -= self.slots[i].warm

    cdef int take(self, uint64_t nbytes, LoanRecord *record) except -2:
        """Find a slab for a payload and note the loan; return its number, -1 for none."""
        global clock
        cdef int slab
        cdef Slot *slot
        self.collect()
        if nbytes > LARGEST or self.lent > LENT:
            return -1
        slab = self.fit(nbytes, 4 * slab_bytes(nbytes))
        if slab < 0 and self.grow(slab_bytes(nbytes)):
            slab = self.fit(nbytes, slab_bytes(nbytes))
        if slab < 0:
            slab = self.fit(nbytes, LARGEST)
        if slab < 0 or not self.warm_up(&self.slots[slab], nbytes):
            return -1
        slot = &self.slots[slab]
        clock += 1
        slot.used = clock
        slot.lent = True
        slot.number = slot.number + 1 if slot.number < 0xFFFFFFFF else 1
        self.lent += slot.nbytes
        memset(record, 0, sizeof(LoanRecord))
        record.mark = LOAN_MARK
        record.slab = slab
        record.number = slot.number
        record.chunk = slot.chunk
        record.offset = slot.data - (<Chunk>self.chunks[slot.chunk]).data
        record.nbytes = nbytes
        return slab

    cdef int fit(self, uint64_t nbytes, uint64_t most) noexcept:
        """Return the smallest idle slab that is large enough, the warmest of these; or -1."""
        cdef int i, best = -1
        cdef Slot *slot
        for i in range(self.count):
            slot = &self.slots[i]
            if slot.lent or slot.busy or slot.nbytes < nbytes or slot.nbytes > most:
                continue
            if best < 0 or slot.nbytes < self.slots[best].nbytes or (
                slot.nbytes == self.slots[best].nbytes and slot.warm > self.slots[best].warm
            ):
                best = i
        return best

    cdef void collect(self) noexcept:
        """Take back what the peer has let go of."""
        cdef int i
        cdef Slot *slot
        for i in range(self.count):
            slot = &self.slots[i]
            if slot.lent and load32(&self.ring.end.to_peer.returned[i]) == slot.number:
                slot.lent = False
                self.lent -= slot.nbytes

    cdef bint grow(self, uint64_t nbytes) except -1:
        """Make a chunk of slabs of ``nbytes`` and pass it on; return whether that went well."""
        cdef uint64_t total = max(nbytes, <uint64_t>CARVED)
        if not self.has_room(nbytes, total):
            return False
        try:
            fd = memory_file("distgrad-arena", total)
        except OSError:        # no descriptor or no memory left: the ring will do
            return False
        try:
            return self.add(map_chunk(fd, total), fd, nbytes, total)
        finally:
            os.close(fd)

    cdef bint has_room(self, uint64_t nbytes, uint64_t total) noexcept:
        return (
            self.fd >= 0
            and len(self.chunks) < CHUNKS
            and self.mapped + total <= MAPPED
            and self.count + total // nbytes <= SLABS
        )

    cdef bint add(self, Chunk chunk, int fd, uint64_t nbytes, uint64_t total) except -1:
        """Pass a chunk on and cut it up, in one go: the peer counts chunks as they come."""
        cdef uint64_t at
        cdef Slot *slot
        if chunk is None or not self.has_room(nbytes, total) or signal(self.fd, CHUNK, fd) < 0:
            return False
        for at in range(0, total, nbytes):
            slot = &self.slots[self.count]
            memset(slot, 0, sizeof(Slot))
            slot.data = chunk.data + at
            slot.nbytes = nbytes
            slot.chunk = <uint32_t>len(self.chunks)
            self.count += 1
        self.chunks.append(chunk)
        self.mapped += total
        return True

    cdef bint warm_up(self, Slot *slot, uint64_t nbytes) except -1:
        """Give pages to the start of a slab; return False if there is no memory."""
        global warm
        cdef uint64_t wanted = (nbytes + PAGE - 1) & ~<uint64_t>(PAGE - 1)
        cdef uint64_t had = slot.warm
        cdef int failed
        if wanted <= had:
            return True
        slot.busy = True
        slot.warm = wanted
        warm += wanted - had
        if warm > <uint64_t>config.pool_bytes:
            cool_down()
        with nogil:
            failed = populate(slot.data + had, wanted - had)
        slot.busy = False
        if failed:
            slot.warm = had
            warm -= wanted - had
            return False
        return True

    cdef void cool(self) noexcept:
        """Give the pages of idle slabs back to the system."""
        global warm
        cdef int i
        cdef Slot *slot
        self.collect()
        for i in range(self.count):
            slot = &self.slots[i]
            if slot.lent or slot.busy or not slot.warm:
                continue
            if madvise(slot.data, slot.warm, MADV_REMOVE) == 0:
                warm -= slot.warm
                slot.warm = 0


cdef int cool_down() except -1:
    """Keep at most ``config.pool_bytes`` of idle slabs: the arenas used longest ago go first."""
    cdef Arena arena
    cdef uint64_t limit = config.pool_bytes
    cdef uint64_t idle = 0
    arenas = list(_arenas)
    for one in arenas:
        idle += idle_bytes(one)
    for one in sorted(arenas, key=_last_use):
        if idle <= limit:
            return 0
        arena = one
        idle -= idle_bytes(arena)
        arena.cool()
    return 0


cdef uint64_t idle_bytes(Arena arena) noexcept:
    cdef uint64_t idle = 0
    cdef int i
    arena.collect()
    for i in range(arena.count):
        if not arena.slots[i].lent and not arena.slots[i].busy:
            idle += arena.slots[i].warm
    return idle


def _last_use(Arena arena not None):
    """Return when an arena was last lent from, counted in loans."""
    cdef uint64_t used = 0
    cdef int i
    for i in range(arena.count):
        used = max(used, arena.slots[i].used)
    return used


@cython.final
cdef class Arrivals:
    """What the peer of a connection lends."""

    def __cinit__(self):
        self.chunks = []

    cdef int adopt(self, int fd) except -1:
        """Map a chunk that the peer passed; the descriptor stays the caller's."""
        cdef Chunk chunk
        if len(self.chunks) >= CHUNKS or self.mapped >= MAPPED:
            raise ProtocolError("cannot take a chunk of shared memory: the peer passed too many")
        chunk = map_chunk(fd, MAPPED - self.mapped)
        if chunk is None:
            raise ProtocolError("cannot take a chunk of shared memory: it cannot be relied on")
        self.chunks.append(chunk)
        self.mapped += chunk.nbytes
        return 0

    cdef bint knows(self, uint32_t chunk) noexcept:
        return chunk < <uint64_t>len(self.chunks)

    cdef Loan claim(self, const LoanRecord *record, Ring ring):
        """Take over the payload that a record names."""
        cdef Chunk chunk
        cdef Loan loan
        if record.slab >= SLABS or record.number == 0 or record.offset % PAGE:
            raise ProtocolError("cannot take a loan: the record is malformed")
        if record.chunk >= <uint64_t>len(self.chunks):
            raise ProtocolError(f"cannot take a loan: chunk {record.chunk} is not known")
        chunk = self.chunks[record.chunk]
        if record.offset > chunk.nbytes or record.nbytes > chunk.nbytes - record.offset:
            raise ProtocolError("cannot take a loan: it reaches beyond its chunk")
        loan = Loan.__new__(Loan)
        loan.chunk = chunk
        loan.ring = ring
        loan.slab = record.slab
        loan.link.data = chunk.data + record.offset
        loan.link.nbytes = record.nbytes
        loan.link.number = record.number
        loan.link.next = loans.next
        loan.link.previous = &loans
        loans.next.previous = &loan.link
        loans.next = &loan.link
        return loan


@cython.final
@cython.no_gc      # nothing it holds can lead back to it, and __dealloc__ needs `ring`
cdef class Loan:
    """Writable memory lent by the peer; goes back when the last array on it is freed."""

    def __init__(self, *args, **kwargs):
        raise TypeError("cannot make a Loan: it comes with a message")

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.link.data, self.link.nbytes, 0, flags)
        Py_DECREF(None)  # Cython's first content of view.obj, which FillInfo overwrites

    def __len__(self):
        return self.link.nbytes

    def __dealloc__(self):
        if self.link.next == NULL:
            return
        self.link.previous.next = self.link.next
        self.link.next.previous = self.link.previous
        if self.link.number:
            store32(&self.ring.end.from_peer.returned[self.slab], self.link.number)


# All loans of this process, in a circle. Only for the child of a fork: what it inherited must
# become its own, as the parent will give the slabs back.
cdef Link loans
loans.next = loans.previous = &loans


def _keep_in_child():
    cdef Link *link = loans.next
    while link != &loans:
        detach(link.data, (link.nbytes + PAGE - 1) & ~<uint64_t>(PAGE - 1))
        link.number = 0
        link = link.next


os.register_at_fork(after_in_child=_keep_in_child)
