# cython: auto_pickle=False, autotestdict=False
"""Futures: values that arrive later; and the table of requests that wait for their answer.

F1  A future completes at most once: `_state` leaves IS_PENDING once, together with `value_`.
F2  Whoever waits does so through the desk of its worker, which polls meanwhile; a future
    without one is waited for with a plain lock.
F3  Callbacks never run on a thread that polls, unless they are the library's own.
F4  Every pending request ends, once: by its answer, its deadline, the loss of its peer, or
    the end of this worker. Whoever takes it out of the table completes its future.
"""

import asyncio
import contextvars
import logging
import threading
import warnings

from libc.math cimport INFINITY

from distgrad.errors import DistgradError, RpcTimeoutError
from distgrad.rpc.activity import worker_or_none

cimport cython

cdef extern from "transport/_wait.h":
    double now_s "distgrad_now"() noexcept nogil

PENDING, DONE, FAILED = IS_PENDING, IS_DONE, IS_FAILED

cdef object _log = logging.getLogger("distgrad")
cdef object _copy_context = contextvars.copy_context


cdef class Desk:
    """Waits on behalf of futures."""

    cdef int wait_for(self, Future future, double deadline) except -1:
        raise NotImplementedError

    cdef int rouse(self, Future future) except -1:
        raise NotImplementedError


cdef class Future:
    """The result of a call that may not have finished.

    Futures come from `rpc_async`, or are made by hand and completed with `set_result`
    (see `functions.async_execution`). They can be waited for by any thread, any number
    of times, or awaited from asyncio, on any event loop. Like asyncio's own, a future is
    cancelled with a task that awaits it; `asyncio.shield` prevents that.

    Parameters
    ----------
    chain
        Names the chain of work that completes this future: work of that chain which
        arrives while a thread waits here is run by the waiting thread.
    """

    def __init__(self, *, chain=None, agent=None):
        self.chain = chain
        if agent is None:
            worker = worker_or_none()
            agent = None if worker is None else worker.agent
        self.desk = None if agent is None else agent.crew

    # --- looking ---------------------------------------------------------------------

    def done(self):
        """Return whether the result or the failure is there."""
        return self._state != IS_PENDING

    def wait(self, timeout=None):
        """Block until the future completes and return its value.

        The waiting thread polls the worker's connections itself, so that the answer
        reaches it without a hand-off.

        Parameters
        ----------
        timeout
            Seconds to wait; None waits as long as it takes (every call has a deadline of
            its own).

        Raises
        ------
        RpcTimeoutError
            If the time is over. The future stays usable.
        Exception
            Whatever the future failed with.
        """
        if self._state == IS_PENDING:
            self.wait_until(_moment(timeout))
            if self._state == IS_PENDING:
                raise _overdue(self, timeout)
        return self.outcome()

    def result(self, timeout=None):
        """See `wait`."""
        return self.wait(timeout)

    def value(self, timeout=None):
        """See `wait`."""
        return self.wait(timeout)

    def exception(self, timeout=None):
        """Wait, and return the failure, or None where there is a value."""
        if self._state == IS_PENDING:
            self.wait_until(_moment(timeout))
            if self._state == IS_PENDING:
                raise _overdue(self, timeout)
        self._observed = True
        return self.value_ if self._state == IS_FAILED else None

    cdef object outcome(self):
        self._observed = True
        if self._state == IS_FAILED:
            # With the traceback that it came with: who looks often would make it ever longer.
            raise self.value_.with_traceback(self.origin)
        return self.value_

    cdef int wait_until(self, double deadline) except -1:
        if self.desk is not None and not self.desk.closed:
            return self.desk.wait_for(self, deadline)
        gate = threading.Lock()
        gate.acquire()
        if self.add_waiter(gate.release):
            try:
                gate.acquire(
                    timeout=-1 if deadline == INFINITY else max(0.0, deadline - now_s())
                )
            finally:
                self.drop_waiter(gate.release)
        return 0

    cdef bint add_waiter(self, wake) except -1:
        """Have ``wake`` called on completion; False if that has happened already."""
        if self.waiters is None:
            waiters = []
            if self.waiters is None:
                self.waiters = waiters
        if self._state != IS_PENDING:
            return False
        self.waiters.append(wake)
        return True

    cdef int drop_waiter(self, wake) except -1:
        if self.waiters is not None and wake in self.waiters:
            self.waiters.remove(wake)
        return 0

    # --- completing ------------------------------------------------------------------

    def set_result(self, value):
        """Complete the future with a value.

        Raises
        ------
        DistgradError
            If it is complete already.
        """
        if not self._try_complete(IS_DONE, value):
            raise _complete_already(self)

    def set_exception(self, error):
        """Complete the future with a failure."""
        if not isinstance(error, BaseException):
            raise TypeError(f"cannot set exception {error!r}: it is no exception")
        if not self._try_complete(IS_FAILED, error):
            raise _complete_already(self)

    def cancel(self):
        """Give up on the result; False if it is there already."""
        if self._state != IS_PENDING:
            return False
        if not self._try_complete(IS_FAILED, asyncio.CancelledError(f"{self!r} was cancelled")):
            return False
        self._observed = True
        return True

    cpdef bint _try_complete(self, int state, value) except -1:
        """Complete the future unless it is complete; return whether it was not."""
        if self._state != IS_PENDING:
            return False
        self.value_ = value
        if state == IS_FAILED:
            self.origin = value.__traceback__
        self._state = <State>state
        cdef list waiters = self.waiters, callbacks = self.callbacks
        self.waiters = self.callbacks = None
        if self.desk is not None:
            self.desk.rouse(self)
        if waiters is not None:
            for wake in waiters:
                wake()
        if callbacks is not None:
            for callback, inline in callbacks:
                self.call_back(callback, inline)
        return True

    # --- callbacks -------------------------------------------------------------------

    def add_done_callback(self, callback, *, bint inline=False):
        """Call ``callback(self)`` once the future is complete.

        Parameters
        ----------
        callback
            Runs on a serving thread of the worker, or at once if the future is complete.
            An exception it raises is logged.
        inline
            Run on the completing thread itself. Only for callbacks that neither block
            nor call out.
        """
        if not callable(callback):
            raise TypeError(f"cannot call {callback!r} back: it is not callable")
        if self._state == IS_PENDING:
            entry = (callback if inline else _in_this_context(callback), inline)
            callbacks = []
            if self._state == IS_PENDING:
                if self.callbacks is None:
                    self.callbacks = callbacks
                self.callbacks.append(entry)
                return
        _run_callback(callback, self)

    def then(self, callback):
        """Return a future for ``callback(self)``, run when this one is complete."""
        if not callable(callback):
            raise TypeError(f"cannot chain {callback!r}: it is not callable")
        cdef Future child = Future.__new__(Future)
        child.chain = self.chain
        child.desk = self.desk

        def run(parent):
            try:
                value = callback(parent)
            except BaseException as error:
                child._try_complete(IS_FAILED, error)
            else:
                child._try_complete(IS_DONE, value)

        self.add_done_callback(run)
        return child

    cdef int call_back(self, callback, bint inline) except -1:
        if inline or self.desk is None or self.desk.closed:
            _run_callback(callback, self)
        else:
            self.desk.submit(lambda: _run_callback(callback, self), self.chain)
        return 0

    def __await__(self):
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake():
            if not waiter.done():
                waiter.set_result(None)

        def completed(_):
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake)

        self.add_done_callback(completed, inline=True)
        try:
            yield from waiter.__await__()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.outcome()

    def __repr__(self):
        state = ("pending", "done", "failed")[self._state]
        return f"<{type(self).__name__} {state} at {id(self):#x}>"

    def __del__(self):
        if self._state == IS_FAILED and not self._observed:
            lines = str(self.value_).splitlines()
            warnings.warn(
                f"a failed future was never looked at: {type(self.value_).__name__}: "
                f"{lines[0] if lines else ''}",
                RuntimeWarning,
                stacklevel=2,
            )


cdef double _moment(timeout) except? -1:
    """Return when a wait is over (monotonic s)."""
    cdef double seconds
    if timeout is None:
        return INFINITY
    try:
        seconds = timeout
    except TypeError:
        raise TypeError(f"cannot wait for timeout={timeout!r}: expected seconds or None") from None
    if seconds != seconds:
        raise ValueError(f"cannot wait for timeout={timeout!r}: it is no time")
    return now_s() + seconds


cdef object _overdue(Future future, timeout):
    return RpcTimeoutError(
        f"cannot wait for {future!r}: nothing arrived within {timeout:g} s",
        hint="wait again, or with a longer timeout",
    )


cdef object _complete_already(Future future):
    return DistgradError(f"cannot complete {future!r}: it is complete already")


def _in_this_context(callback):
    """Bind a callback to the context variables of the thread that registers it."""
    context = _copy_context()
    return lambda future: context.copy().run(callback, future)


cdef int _run_callback(callback, Future future) except -1:
    try:
        callback(future)
    except Exception:
        _log.exception("a callback of %r failed", future)
    return 0


# --- requests ----------------------------------------------------------------------------


@cython.final
cdef class RpcFuture(Future):
    """The answer of another worker to one request; made by `Agent.request`."""

    def __init__(self):
        raise TypeError("cannot create an RpcFuture: use rpc_async()")

    cdef int wait_until(self, double deadline) except -1:
        if self.desk is not None and self.desk.closed and self._state == IS_PENDING:
            # The end of a worker fails its requests, but not in the child of a fork.
            raise DistgradError(
                f"cannot wait for {self.what}: its worker was shut down, or is that of the "
                "process which this one was forked from"
            )
        return Future.wait_until(self, deadline)

    def cancel(self):
        """Give up on the answer; the callee drops the request if it has not started."""
        if not Future.cancel(self):
            return False
        self.pending.forget(self)
        return True


@cython.final
cdef class PendingRequests:
    """The requests of one worker that wait for their answer.

    Parameters
    ----------
    forget
        Called with each request that is given up, to tell the callee.
    name_of
        Names a worker by its id.
    """

    def __init__(self, forget, name_of):
        self.forget = forget
        self.name_of = name_of
        self.requests = {}

    def __len__(self):
        return len(self.requests)

    cdef RpcFuture find(self, object request_id, int peer):
        """Return the request if it is pending and ``peer`` is who was asked."""
        cdef RpcFuture future = self.requests.get(request_id)
        return future if future is not None and future.peer == peer else None

    cdef bint take(self, RpcFuture future) except -1:
        """Take a request out; False if it has ended already."""
        return self.requests.pop(future.request_id, None) is not None

    def withdraw(self, RpcFuture future not None):
        """Take a request out; False if it has ended already."""
        return self.take(future)

    def expire(self, double now):
        """Fail what is overdue; return when the next request will be."""
        cdef RpcFuture future
        cdef double soonest = INFINITY
        for future in list(self.requests.values()):
            if future.deadline <= now:
                self._time_out(future)
            elif future.deadline < soonest:
                soonest = future.deadline
        return soonest

    def _time_out(self, RpcFuture future):
        self.forget(future)
        error = RpcTimeoutError(
            f"cannot finish {future.what} on worker {self.name_of(future.peer)!r}: "
            f"no answer within {future.timeout:g} s",
            hint="pass a longer timeout (seconds), or 0 for none",
        )
        future._try_complete(IS_FAILED, error)

    def lose(self, int peer, why):
        """Fail all requests to a peer that is lost."""
        cdef RpcFuture future
        for future in list(self.requests.values()):
            if future.peer == peer and self.take(future):
                error = type(why)(f"cannot finish {future.what}: {why}")
                future._try_complete(IS_FAILED, error)

    def end(self):
        """Fail everything: the worker was shut down."""
        cdef RpcFuture future
        for future in list(self.requests.values()):
            if self.take(future):
                error = DistgradError(f"cannot finish {future.what}: the worker was shut down")
                future._try_complete(IS_FAILED, error)
                future._observed = True
