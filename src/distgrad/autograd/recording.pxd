# Types for the compiled build of recording.py; the module also runs as plain Python.

cimport cython

from distgrad.autograd._current cimport CurrentPart
from distgrad.autograd.context cimport ContextPart
from distgrad.autograd.engine cimport Engine
from distgrad.autograd.functions cimport RecvRpcBackward

cdef CurrentPart current


cdef class Recorder:
    cdef Engine _engine

    @cython.locals(part=ContextPart)
    cpdef outgoing(self, worker, to_id, list tensors, bint is_response, what)

    @cython.locals(part=ContextPart, node=RecvRpcBackward)
    cpdef incoming(self, worker, from_id, context_id, message_id, list tensors)
    cpdef enter(self, worker, context_id)
