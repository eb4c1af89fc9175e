# Types for the compiled build of closure.py; the module also runs as plain Python.

cimport cython


cdef class Closure:
    cdef public set reached     # worker ids that take part
    cdef public set missing     # those of them that have not reported
    cdef public bint partial    # a report of one of them names a worker that was left out
    cdef public dict reports    # worker id -> ids of its peers, ~id where one was left out

    @cython.locals(start=Py_ssize_t, end=Py_ssize_t, count=Py_ssize_t)
    cpdef take(self, tuple reports)

    @cython.locals(reports=dict, reached=set, missing=set, todo=list)
    cpdef report(self, sender, tuple peers)
    cpdef set left_out(self)
    cpdef set workers(self)


cpdef tuple report_of(worker, tuple peers)
