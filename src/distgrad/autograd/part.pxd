# Types for the compiled build of part.py; the module also runs as plain Python.

from distgrad.autograd.protocol cimport BackwardPass


cdef class Run(BackwardPass):
    cdef public bint begun          # the snapshot is taken
    cdef public bint busy           # a thread drains the queue or is about to
    cdef public list events         # (method, arguments), oldest first; under the part's lock
    cdef public object roots        # what the graph starts from, at the root worker
    cdef public object done         # called with the outcome, at the root worker
    cdef public object error        # the exception that failed the pass here


cdef class Part:
    cdef public object host         # Host
    cdef public object context_id
    cdef public object lock         # guards the rest and the queues of all passes
    cdef public dict sends          # message id -> node
    cdef public dict recvs          # message id -> node
    cdef public set known           # workers that messages of the context were sent to
    cdef public set _doubted        # ids of sends that may never have been recorded
    cdef public bint released
    cdef public object table        # PassTable
    cpdef _snapshot(self, Run run)
    cpdef _step(self, Run run, snapshot, events)
