# cython: auto_pickle=False, autotestdict=False
"""The lock of contexts and of their table."""

cimport cython

cdef extern from "pythread.h" nogil:
    void *PyThread_allocate_lock() noexcept
    void PyThread_free_lock(void *lock) noexcept
    int PyThread_acquire_lock(void *lock, int wait) noexcept
    void PyThread_release_lock(void *lock) noexcept


@cython.final
cdef class Lock:
    """A lock that is held for a few steps and never while other code runs.

    Not re-entrant. A signal does not end the wait for it.
    """

    def __cinit__(self):
        self.handle = PyThread_allocate_lock()
        if self.handle == NULL:
            raise MemoryError("cannot create a lock")

    def __dealloc__(self):
        if self.handle != NULL:
            PyThread_free_lock(self.handle)

    cpdef void acquire(self) noexcept:
        """Take the lock, waiting without the GIL if it is taken."""
        if not PyThread_acquire_lock(self.handle, 0):
            with nogil:
                PyThread_acquire_lock(self.handle, 1)

    cpdef void release(self) noexcept:
        """Give the lock back; the caller has it."""
        PyThread_release_lock(self.handle)
