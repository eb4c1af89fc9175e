# Types for the compiled build of context.py; the module also runs as plain Python.

from distgrad.autograd._current cimport CurrentPart
from distgrad.autograd.part cimport Part, Run

cdef CurrentPart current


cdef class ContextPart(Part):
    cdef public object gradients    # GradientTable: of the leaves of this worker
    cdef public list roots          # weak references to those of the last pass started here
    cpdef resume(self, Run run)
    cpdef drain(self, Run run)
