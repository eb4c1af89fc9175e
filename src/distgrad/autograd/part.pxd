# Types for the compiled build of part.py; the module also runs as plain Python.

cimport cython

from distgrad.autograd._lock cimport Lock
from distgrad.autograd.pass_table cimport PassTable
from distgrad.autograd.protocol cimport BackwardPass


cdef class Run(BackwardPass):
    cdef public bint begun          # the snapshot is taken
    cdef public bint busy           # a thread drains the queue or is about to
    cdef public list events         # (method, arguments), oldest first; under the part's lock
    cdef public object roots        # what the graph starts from, at the root worker
    cdef public object done         # called with the outcome, at the root worker
    cdef public object error        # the exception that failed the pass here
    cdef public Part part           # whose pass it is, once there is something to do

    @cython.locals(part=Part)
    cpdef build(self)


cdef class Part:
    cdef public object host         # Host
    cdef public object context_id
    cdef readonly Lock lock         # guards the rest and the queues of all passes
    cdef public dict sends          # message id -> node
    cdef public dict recvs          # message id -> node
    cdef public set known           # workers that messages of the context were sent to
    cdef public set _doubted        # ids of sends that may never have been recorded; or None
    cdef public bint released
    cdef public PassTable table
    cpdef record_send(self, node)
    cpdef record_recv(self, node)

    @cython.locals(run=Run)
    cpdef Run start(self, pass_id, int flags, roots, done)

    @cython.locals(run=Run)
    cpdef bint receive(self, sender, message) except -1

    @cython.locals(run=Run)
    cpdef release(self, error=*)

    @cython.locals(run=Run)
    cpdef _tell_begun(self, str method, tuple args)
    cpdef _queue(self, Run run, str method, tuple args)

    cpdef resume(self, Run run)

    @cython.locals(events=list, snapshot=tuple, over=bint)
    cpdef drain(self, Run run)
    cpdef tuple _snapshot(self, Run run)

    @cython.locals(method=str, args=tuple, outbox=list)
    cpdef _step(self, Run run, tuple snapshot, list events)
    cpdef _break(self, Run run, error)
    cpdef _post(self, to, message)
