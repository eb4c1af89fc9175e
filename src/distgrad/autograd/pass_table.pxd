# Types for the compiled build of pass_table.py; the module also runs as plain Python.

cimport cython

from distgrad.autograd.protocol cimport BackwardPass


cdef class PassTable:
    cdef public object worker       # id of this worker
    cdef public object make         # makes a pass from worker, pass id and flags
    cdef public dict passes         # pass id -> pass, those that are not over
    cdef public dict _over          # pass id -> why it failed, or None; oldest first
    cdef public dict _early         # pass id -> sends that late nones came for too early
    cdef public dict _owed          # peer -> ends that were not sent yet
    cdef public bint owes           # somebody must be told that a pass is over
    cpdef BackwardPass open(self, pass_id, int flags)

    @cython.locals(flags=int)
    cpdef BackwardPass route(self, message)
    cpdef answer(self, message)
    cpdef early(self, pass_id)
    cpdef close(self, BackwardPass finished)
    cpdef ends_for(self, peer)
    cpdef all_ends(self)
    cpdef _remember(self, pass_id, cause)
