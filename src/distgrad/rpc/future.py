"""Futures: values that arrive later.

Invariants
    1. A future completes at most once; `_state` goes from PENDING to one of the others.
    2. Whoever waits does so through the agent of its worker, which polls meanwhile; a
       future without a worker is waited for with a plain lock.
    3. Callbacks never run on a thread that polls, unless they are the library's own.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
import warnings
from collections.abc import Callable, Generator, Hashable, Iterable
from typing import TYPE_CHECKING, Any

from distgrad.errors import DistgradError, RpcTimeoutError
from distgrad.rpc.activity import worker_or_none

if TYPE_CHECKING:
    from distgrad.rpc.agent import Agent

__all__ = ["Future", "collect_all", "wait_all"]

PENDING, DONE, FAILED = 0, 1, 2

# Guards the step from PENDING; short, and never held while anything else runs.
_completion = threading.Lock()


class Future:
    """The result of a call that may not have finished.

    Futures come from `rpc_async`, or are made by hand and completed with `set_result`
    (see `functions.async_execution`). They can be waited for by any thread, any number
    of times, or awaited from asyncio.

    Parameters
    ----------
    chain
        Names the chain of work that completes this future: work of that chain which
        arrives while a thread waits here is run by the waiting thread.
    """

    __slots__ = (
        "__weakref__",
        "_agent",
        "_callbacks",
        "_observed",
        "_state",
        "_value",
        "_waiters",
        "chain",
    )

    def __init__(self, *, chain: Hashable = None, agent: Agent | None = None) -> None:
        self._state = PENDING
        self._value: Any = None
        self._callbacks: list[tuple[Callable[[Future], Any], bool]] | None = None
        self._waiters: list[Any] | None = None
        self._observed = False
        self.chain = chain
        if agent is None:
            worker = worker_or_none()
            agent = None if worker is None else worker.agent
        self._agent = agent

    # --- looking ---------------------------------------------------------------------

    def done(self) -> bool:
        """Return whether the result or the failure is there."""
        return self._state != PENDING

    def wait(self, timeout: float | None = None) -> Any:
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
        if self._state == PENDING:
            deadline = None if timeout is None else time.monotonic() + timeout
            self._wait_until(deadline)
            if self._state == PENDING:
                raise RpcTimeoutError(
                    f"cannot wait for {self!r}: nothing arrived within {timeout:g} s",
                    hint="wait again, or with a longer timeout",
                )
        self._observed = True
        if self._state == FAILED:
            raise self._value
        return self._value

    result = wait
    value = wait

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return the failure, or None where there is a value."""
        if self._state == PENDING:
            self._wait_until(None if timeout is None else time.monotonic() + timeout)
            if self._state == PENDING:
                raise RpcTimeoutError(f"cannot wait for {self!r}: nothing within {timeout:g} s")
        self._observed = True
        return self._value if self._state == FAILED else None

    def _wait_until(self, deadline: float | None) -> None:
        if self._agent is not None and not self._agent.closed:
            self._agent.wait(self, deadline)
            return
        gate = threading.Lock()
        gate.acquire()
        if self._add_waiter(gate.release):
            gate.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic()))

    def _add_waiter(self, wake: Callable[[], None]) -> bool:
        """Have ``wake`` called on completion; False if that has happened already."""
        with _completion:
            if self._state != PENDING:
                return False
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(wake)
            return True

    def _drop_waiter(self, wake: Callable[[], None]) -> None:
        with _completion:
            if self._waiters is not None and wake in self._waiters:
                self._waiters.remove(wake)

    # --- completing ------------------------------------------------------------------

    def set_result(self, value: Any) -> None:
        """Complete the future with a value.

        Raises
        ------
        DistgradError
            If it is complete already.
        """
        self._complete_once(DONE, value)

    def set_exception(self, error: BaseException) -> None:
        """Complete the future with a failure."""
        if not isinstance(error, BaseException):
            raise TypeError(f"cannot set exception {error!r}: it is no exception")
        self._complete_once(FAILED, error)

    def cancel(self) -> bool:
        """Give up on the result; False if it is there already."""
        error = asyncio.CancelledError(f"{self!r} was cancelled")
        cancelled = self._try_complete(FAILED, error)
        self._observed = self._observed or cancelled
        return cancelled

    def _complete_once(self, state: int, value: Any) -> None:
        if not self._try_complete(state, value):
            raise DistgradError(f"cannot complete {self!r}: it is complete already")

    def _try_complete(self, state: int, value: Any) -> bool:
        with _completion:
            if self._state != PENDING:
                return False
            self._value = value
            self._state = state
            waiters, self._waiters = self._waiters, None
            callbacks, self._callbacks = self._callbacks, None
        if self._agent is not None:
            self._agent.crew.rouse(self)
        if waiters:
            for wake in waiters:
                wake()
        if callbacks:
            for callback, inline in callbacks:
                self._call_back(callback, inline)
        return True

    # --- callbacks -------------------------------------------------------------------

    def add_done_callback(self, callback: Callable[[Future], Any], *, inline: bool = False) -> None:
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
        with _completion:
            if self._state == PENDING:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append((_in_this_context(callback, inline), inline))
                return
        _run_callback(callback, self)

    def then(self, callback: Callable[[Future], Any]) -> Future:
        """Return a future for ``callback(self)``, run when this one is complete."""
        if not callable(callback):
            raise TypeError(f"cannot chain {callback!r}: it is not callable")
        child = Future(chain=self.chain, agent=self._agent)

        def run(parent: Future) -> None:
            try:
                child.set_result(callback(parent))
            except BaseException as error:
                child.set_exception(error)

        self.add_done_callback(run)
        return child

    def _call_back(self, callback: Callable[[Future], Any], inline: bool) -> None:
        if inline or self._agent is None or self._agent.closed:
            _run_callback(callback, self)
        else:
            self._agent.submit(lambda: _run_callback(callback, self), self.chain)

    def __await__(self) -> Generator[Any, None, Any]:
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def completed(_: Future) -> None:
            loop.call_soon_threadsafe(wake)

        self.add_done_callback(completed, inline=True)
        yield from waiter.__await__()
        return self.wait()

    def __repr__(self) -> str:
        state = ("pending", "done", "failed")[self._state]
        return f"<{type(self).__name__} {state} at {id(self):#x}>"

    def __del__(self) -> None:
        if getattr(self, "_state", PENDING) == FAILED and not self._observed:
            warnings.warn(
                f"a failed future was never looked at: {type(self._value).__name__}: "
                f"{str(self._value).splitlines()[0] if str(self._value) else ''}",
                RuntimeWarning,
                stacklevel=2,
            )


def _in_this_context(callback: Callable[[Future], Any], inline: bool) -> Callable[[Future], Any]:
    """Bind a callback to the context variables of the thread that registers it."""
    if inline:
        return callback
    context = contextvars.copy_context()
    return lambda future: context.copy().run(callback, future)


def _run_callback(callback: Callable[[Future], Any], future: Future) -> None:
    try:
        callback(future)
    except Exception:
        logging.getLogger("distgrad").exception("a callback of %r failed", future)


def wait_all(futures: Iterable[Future], timeout: float | None = None) -> list[Any]:
    """Wait for all futures and return their values in order; the first failure raises."""
    deadline = None if timeout is None else time.monotonic() + timeout
    return [
        f.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        for f in list(futures)
    ]


def collect_all(futures: Iterable[Future]) -> Future:
    """Return a future of the list of futures, complete when all of them are."""
    members = list(futures)
    gathered = Future()
    if not members:
        gathered.set_result(members)
        return gathered
    left = [len(members)]

    def one_done(_: Future) -> None:
        with _completion:
            left[0] -= 1
            last = left[0] == 0
        if last:
            gathered.set_result(members)

    for member in members:
        member.add_done_callback(one_done, inline=True)
    return gathered
