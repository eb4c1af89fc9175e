"""Warm receive buffers.

First touch of fresh memory costs several times a copy, so the memory of a received
payload goes back to a free list, by size class, when its last array is freed.
"""

cdef enum:
    SMALLEST_CLASS = 12   # log2 of the smallest block: 4 KiB
    CLASSES = 36          # number of classes; each is twice the one before


cdef struct Block:
    Block *next      # in the free list; lives in the first bytes of the idle block


cdef class SlabPool:
    cdef Block *free[CLASSES]                 # idle blocks of each class, last freed first
    cdef unsigned long long used[CLASSES]     # `clock` when the class was last asked for
    cdef unsigned long long clock             # counts takes
    cdef Py_ssize_t idle                      # bytes in the free lists
    cdef Py_ssize_t lent                      # bytes of the slabs that live

    cpdef Slab take(self, Py_ssize_t nbytes)
    cdef void _give_back(self, char *data, int size_class) noexcept
    cdef Block *_evict(self, Py_ssize_t limit) noexcept


cdef class Slab:
    cdef SlabPool pool       # gets the memory back
    cdef char *data          # 64-byte aligned
    cdef Py_ssize_t nbytes   # what was asked for; the block may be larger
    cdef int size_class
    cdef Py_ssize_t warm     # bytes from the start that had been touched when it was taken


cdef SlabPool shared
