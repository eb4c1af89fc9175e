"""Futures and the requests that wait for an answer, at C level.

All fields change under the GIL, and no step from one valid state to the next calls out:
that takes the place of locks.
"""

cdef enum State:
    IS_PENDING = 0
    IS_DONE = 1
    IS_FAILED = 2


cdef class Desk:
    """What a future asks of the worker that it belongs to; implemented by the crew."""

    cdef public bint closed        # the worker was shut down: nobody polls any more

    # Block until the future is done or `deadline` (monotonic s) has passed.
    cdef int wait_for(self, Future future, double deadline) except -1
    # The future has completed: wake the leader if it waits for it.
    cdef int rouse(self, Future future) except -1


cdef class Future:
    cdef object __weakref__
    cdef readonly State _state     # set once, after _value
    cdef public bint _observed     # somebody has seen how it ended
    cdef object value_             # the value or the failure
    cdef object origin             # the traceback that the failure came with, or None
    cdef list callbacks            # (callback, inline), in order; None without
    cdef list waiters              # what to call on completion, see wait_until; None without
    cdef Desk desk                 # who waits for it and runs its callbacks; None by itself
    cdef public object chain       # the chain of work that completes it; None is none

    cpdef bint _try_complete(self, int state, value) except -1
    cdef int wait_until(self, double deadline) except -1
    cdef bint add_waiter(self, wake) except -1
    cdef int drop_waiter(self, wake) except -1
    cdef int call_back(self, callback, bint inline) except -1
    cdef object outcome(self)


cdef class RpcFuture(Future):
    cdef PendingRequests pending   # the table it is entered in
    cdef readonly int peer         # id of the worker that was asked
    cdef readonly object request_id    # names the request on the wire
    cdef readonly object context_id    # what autograd recorded with the request; 0 is none
    cdef readonly object message_id
    cdef readonly double timeout   # seconds that were allowed
    cdef readonly double deadline  # when to give up (monotonic s), inf for never
    cdef readonly str what         # names the request in errors


cdef class PendingRequests:
    cdef dict requests             # request id -> RpcFuture
    cdef object forget             # told of each request that is given up
    cdef object name_of            # names a worker by its id

    cdef RpcFuture find(self, object request_id, int peer)
    cdef bint take(self, RpcFuture future) except -1
