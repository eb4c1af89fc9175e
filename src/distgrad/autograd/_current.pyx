# cython: auto_pickle=False, autotestdict=False
"""The autograd context of the current thread or task."""

from contextvars import ContextVar

from cpython.contextvars cimport PyContextVar_Set, get_value

cimport cython


@cython.final
cdef class CurrentPart:
    """A context variable: the part of its worker that belongs to the current context, or None."""

    def __cinit__(self):
        self.variable = ContextVar("distgrad_autograd_context")

    cpdef get(self):
        """Return the part, or None outside of contexts."""
        return get_value(self.variable, None)

    cpdef set(self, part):
        """Make a part, or None, the current one."""
        PyContextVar_Set(self.variable, part)


current = CurrentPart()
