# Types for the compiled build of engine.py; the module also runs as plain Python.

cimport cython

from distgrad._codec cimport Frame
from distgrad.autograd._lock cimport Lock
from distgrad.autograd.context cimport ContextPart
from distgrad.autograd.part cimport Part, Run
from distgrad.autograd.tombstones cimport Tombstones
from distgrad.rpc._exchange cimport Exchange


cdef class Engine:
    cdef public object worker           # Worker
    cdef public object worker_id
    cdef public object lost             # workers that are gone, kept by the links of the worker
    cdef public dict parts              # context id -> ContextPart
    cdef public object message_ids      # counters; an id names its maker in the upper 16 bits
    cdef public object _context_ids
    cdef public object _pass_ids
    cdef public object _newest          # id of the context made last
    cdef public Tombstones _released    # ids of contexts that are finished
    cdef public Lock _lock              # guards parts and _released where both change
    cdef Exchange _agent                # sends, and runs what is scheduled
    cpdef new_context(self)
    cpdef open(self, ContextPart part)
    cpdef ContextPart part(self, context_id)

    @cython.locals(part=ContextPart)
    cpdef ContextPart _meet(self, context_id)
    cpdef ContextPart existing(self, context_id)

    @cython.locals(part=ContextPart)
    cpdef release(self, context_id, sender=*, error=*)
    cpdef leave(self, context_id)
    cpdef _post(self, to, body, context_id)
    cpdef post(self, Part part, to, message)
    cpdef schedule(self, Part part, Run run)

    @cython.locals(owner=ContextPart)
    cpdef build(self, Part part, Run run, sends)

    @cython.locals(part=ContextPart)
    cpdef _on_pass_message(self, worker, sender, Frame frame, body)
