# cython: auto_pickle=False, autotestdict=False
"""The activity of a thread or task: one context variable."""

from contextvars import ContextVar

from cpython.contextvars cimport PyContextVar_Set, get_value
from libc.math cimport INFINITY

cimport cython


@cython.final
@cython.freelist(16)
cdef class Activity:
    """The worker of a thread or task, and the call that it serves.

    Parameters
    ----------
    worker
        The current worker.
    chain
        Id of the chain of nested synchronous calls, 0 outside a call.
    deadline
        When the served call's caller gives up (`time.monotonic` seconds), or None.
    """

    def __init__(self, worker, chain=0, deadline=None):
        self.worker = worker
        self.chain = chain
        self.until = INFINITY if deadline is None else deadline

    @property
    def deadline(self):
        """When the served call's caller gives up (`time.monotonic` seconds), or None."""
        return None if self.until == INFINITY else self.until


#: The activity of the current thread or task; unset in threads that never touched rpc.
activity = ContextVar("distgrad_activity")

cdef object _variable = activity
cdef Activity _elsewhere = None


cdef Activity current_activity():
    cdef Activity now = get_value(_variable, None)
    return now if now is not None else _elsewhere


def set_elsewhere(Activity now):
    """Set the activity of threads that have none of their own; None for nothing."""
    global _elsewhere
    _elsewhere = now


cdef int enter_activity(Activity now) except -1:
    PyContextVar_Set(_variable, now)
    return 0
