# Types for the compiled build of tombstones.py; the module also runs as plain Python.

cimport cython


cdef class Tombstones:
    cdef dict _forgotten            # creator -> highest id
    cdef dict _times                # id -> when it was added
    cdef object _order              # deque of ids, oldest first

    @cython.locals(times=dict)
    cpdef add(self, identifier)
    cpdef _forget(self, identifier)
    cpdef doubtful(self, identifier)
