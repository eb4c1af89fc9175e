# A lock for compiled code: taking a free one is a call in C. A with statement on threading.Lock
# looks up and binds two methods there, a thousand instructions; a pass takes some forty locks.

cdef class Lock:
    cdef void *handle
    cpdef void acquire(self) noexcept
    cpdef void release(self) noexcept
