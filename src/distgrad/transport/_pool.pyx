# cython: auto_pickle=False, autotestdict=False
"""Warm, aligned receive buffers; ``_pool.pxd`` is the map.

P1  A block is in exactly one place: one live slab, or one free list.
P2  ``idle`` never exceeds ``config.pool_bytes`` after a slab was freed.
P3  The fields of a pool change only under the GIL, or its critical section where
    there is none; nothing in such a section calls Python.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF
from libc.stdlib cimport free

from distgrad.config import config

cimport cython

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **out, size_t alignment, size_t size)

cdef extern from "<sys/mman.h>" nogil:
    int MADV_HUGEPAGE
    int madvise(void *data, size_t nbytes, int advice)

cdef enum:
    ALIGNMENT = 64
    PAGE = 4096
    HUGE_PAGE = 2 * 1024 * 1024
    HUGE = 2 * HUGE_PAGE      # blocks from here on are made of such pages


cdef inline int class_of(Py_ssize_t nbytes) noexcept nogil:
    cdef int size_class = 0
    while size_class < CLASSES and (<Py_ssize_t>1 << (SMALLEST_CLASS + size_class)) < nbytes:
        size_class += 1
    return size_class


cdef inline Py_ssize_t class_bytes(int size_class) noexcept nogil:
    return <Py_ssize_t>1 << (SMALLEST_CLASS + size_class)


cdef int make_block(void **out, Py_ssize_t nbytes) noexcept:
    """Get memory from the system: large blocks in large pages, where the kernel has some.

    Their first touch costs a tenth, and to give them back far less.
    """
    cdef int failed
    if nbytes < HUGE:
        return posix_memalign(out, ALIGNMENT if nbytes <= PAGE else PAGE, nbytes)
    failed = posix_memalign(out, HUGE_PAGE, nbytes)
    if not failed:
        madvise(out[0], nbytes, MADV_HUGEPAGE)
    return failed


cdef void release(Block *blocks) noexcept:
    """Give blocks back to the system: gigabytes of pages take milliseconds."""
    cdef Block *block
    if blocks == NULL:
        return
    with nogil:
        while blocks != NULL:
            block = blocks
            blocks = block.next
            free(block)


@cython.final
cdef class SlabPool:
    """A cache of memory for received payloads.

    `take` is safe in any thread. At most ``config.pool_bytes`` stay idle; beyond that
    the blocks of the sizes that were not asked for the longest go back to the system.
    """

    cpdef Slab take(self, Py_ssize_t nbytes):
        """Lend a slab of ``nbytes`` bytes, 64-byte aligned; its content is arbitrary.

        The memory comes back when the slab and every buffer on it are freed.
        """
        if nbytes < 0 or nbytes > class_bytes(CLASSES - 1):
            raise ValueError(f"cannot take a slab of {nbytes} bytes: out of range")
        cdef int size_class = class_of(nbytes)
        cdef Block *block
        cdef void *fresh = NULL
        with cython.critical_section(self):
            self.clock += 1
            self.used[size_class] = self.clock
            block = self.free[size_class]
            if block != NULL:
                self.free[size_class] = block.next
                self.idle -= class_bytes(size_class)
            self.lent += class_bytes(size_class)
        if block == NULL:
            if make_block(&fresh, class_bytes(size_class)):
                self.lent -= class_bytes(size_class)
                raise MemoryError(f"cannot take a slab of {nbytes} bytes: out of memory")
            block = <Block*>fresh
        cdef Slab slab = Slab.__new__(Slab)
        slab.pool = self
        slab.data = <char*>block
        slab.nbytes = nbytes
        slab.size_class = size_class
        slab.warm = 0 if fresh != NULL and nbytes >= HUGE else nbytes
        return slab

    cdef void _give_back(self, char *data, int size_class) noexcept:
        cdef Block *block = <Block*>data
        cdef Block *surplus
        cdef Py_ssize_t limit = 0
        try:
            limit = config.pool_bytes
        except Exception:      # a broken setting: keep nothing
            limit = 0
        with cython.critical_section(self):
            block.next = self.free[size_class]
            self.free[size_class] = block
            self.idle += class_bytes(size_class)
            self.lent -= class_bytes(size_class)
            surplus = self._evict(limit)
        release(surplus)

    cdef Block *_evict(self, Py_ssize_t limit) noexcept:
        """Take blocks out until what is idle is within the limit; return them as a list."""
        cdef int oldest, i
        cdef Block *block
        cdef Block *surplus = NULL
        while self.idle > limit:
            oldest = -1
            for i in range(CLASSES):
                if self.free[i] != NULL and (oldest < 0 or self.used[i] < self.used[oldest]):
                    oldest = i
            block = self.free[oldest]
            self.free[oldest] = block.next
            self.idle -= class_bytes(oldest)
            block.next = surplus
            surplus = block
        return surplus

    def __dealloc__(self):
        release(self._evict(0))

    @property
    def idle_bytes(self):
        """Bytes that are kept warm and lent to nobody."""
        return self.idle

    @property
    def lent_bytes(self):
        """Bytes of the slabs that are alive, by size class."""
        return self.lent


@cython.final
@cython.no_gc     # no cycle can pass through it, and __dealloc__ needs `pool`
cdef class Slab:
    """Writable, aligned memory lent by a `SlabPool`; exports the buffer protocol."""

    def __init__(self, *args, **kwargs):
        raise TypeError("cannot make a Slab: take it from a SlabPool")

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.nbytes, 0, flags)
        Py_DECREF(None)  # Cython's first content of view.obj, which FillInfo overwrites

    def __len__(self):
        return self.nbytes

    def __dealloc__(self):
        if self.data != NULL:
            self.pool._give_back(self.data, self.size_class)


def touch(Slab slab not None, Py_ssize_t start, Py_ssize_t nbytes):
    """Have the system give pages to a part of a slab; its content is lost."""
    if start < 0 or nbytes < 0 or nbytes > slab.nbytes - start:
        raise ValueError(f"cannot touch bytes {start} to {start + nbytes} of {slab.nbytes}")
    cdef char *data = slab.data + start
    cdef Py_ssize_t i = 0
    with nogil:
        while i < nbytes:
            data[i] = 0
            i += PAGE


# Memory is a property of the process, not of a worker: all its workers share one pool.
shared = SlabPool()


def shared_pool():
    """Return the pool that the transports of this process use."""
    return shared
