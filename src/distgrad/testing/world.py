"""Whole worlds inside one test, script or notebook."""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distgrad.errors import DistgradError, RpcTimeoutError, WorkerLostError
from distgrad.rpc import extensions
from distgrad.rpc.activity import Activity, activity, discharge
from distgrad.rpc.lifecycle import init_rpc, leave
from distgrad.rpc.options import RpcBackendOptions
from distgrad.rpc.store import MemoryStore
from distgrad.rpc.worker import Worker

__all__ = ["World"]

_FAREWELL_S = 10.0


class World:
    """Run ``n`` workers until the end of a ``with`` block.

    Parameters
    ----------
    n
        How many workers.
    transport
        ``"inproc"`` runs them in this process, each with threads of its own; ``"unix"``
        and ``"tcp"`` fork a process for each.
    names
        Of the workers; by default ``worker0``, ``worker1`` and so on.
    timeout
        Seconds that `run` waits for its results.
    options
        Further fields of `RpcBackendOptions`.

    Examples
    --------
    >>> from distgrad import rpc
    >>> from distgrad.testing import World
    >>> with World(3) as world:
    ...     world.run(lambda rank: rpc.get_worker_info().name)
    ['worker0', 'worker1', 'worker2']
    """

    def __init__(
        self,
        n: int,
        *,
        transport: str = "inproc",
        names: Sequence[str] | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> None:
        if n < 1:
            raise ValueError(f"cannot build a world of {n} workers")
        self.names = list(names) if names is not None else [f"worker{i}" for i in range(n)]
        if len(self.names) != n:
            raise ValueError(f"cannot name {n} workers: {len(self.names)} names were given")
        self.transport = transport
        self.timeout = timeout
        self._members: _Threads | _Processes = (
            _Threads(self.names, options)
            if transport == "inproc"
            else _Processes(self.names, transport, options)
        )

    def __enter__(self) -> Self:
        try:
            self._members.start(self.timeout)
        except BaseException:
            self._members.stop(graceful=False)
            raise
        return self

    def run(self, fn: Callable[..., Any], *args: Any, ranks: Sequence[int] | None = None) -> Any:
        """Run ``fn(rank, *args)`` on every worker at once and return the results in order.

        Parameters
        ----------
        fn
            With processes a function at the top level of a module, since it is named to
            them.
        args
            Passed on to every worker.
        ranks
            Only on these workers.

        Raises
        ------
        Exception
            The first failure, with a note that names the worker and its traceback.
        RpcTimeoutError
            If a worker has not finished in time.
        WorkerLostError
            If a worker's process ended meanwhile.
        """
        chosen = range(len(self.names)) if ranks is None else ranks
        return self._members.run(fn, args, list(chosen), self.timeout)

    def kill(self, rank: int) -> None:
        """End a worker without notice: its process by SIGKILL, or all its connections."""
        self._members.kill(rank)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._members.stop(graceful=error is None)


def _annotated(error: BaseException, name: str, trace: str) -> BaseException:
    error.add_note(f"raised on worker {name!r}:\n{trace}")
    return error


class _Threads:
    """Workers of this process."""

    def __init__(self, names: list[str], options: dict[str, Any]) -> None:
        self._names = names
        self._options = options
        self.workers: list[Worker] = []

    def start(self, timeout: float) -> None:
        store = MemoryStore()
        found: dict[int, Worker] = {}

        def join(rank: int) -> None:
            options = RpcBackendOptions(init_method=store, **self._options)
            found[rank] = init_rpc(self._names[rank], "inproc", rank, len(self._names), options)

        try:
            self._on_threads(join, (), list(range(len(self._names))), timeout)
        finally:
            self.workers = [found[rank] for rank in sorted(found)]

    def run(
        self, fn: Callable[..., Any], args: tuple[Any, ...], ranks: list[int], timeout: float
    ) -> list[Any]:
        def act(rank: int, *args: Any) -> Any:
            activity.set(Activity(self.workers[rank]))
            return fn(rank, *args)

        return self._on_threads(act, args, ranks, timeout)

    def _on_threads(
        self, fn: Callable[..., Any], args: tuple[Any, ...], ranks: list[int], timeout: float
    ) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[int, BaseException]] = []

        def body(rank: int) -> None:
            try:
                results[rank] = contextvars.Context().run(fn, rank, *args)
            except BaseException as error:
                failures.append((rank, error))

        threads = [
            threading.Thread(target=body, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in ranks
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._raise_first(failures)
        for rank, thread in zip(ranks, threads, strict=True):
            if thread.is_alive():
                raise RpcTimeoutError(
                    f"cannot finish on worker {self._names[rank]!r}: not done in {timeout:g} s"
                )
        return [results[rank] for rank in ranks]

    def _raise_first(self, failures: list[tuple[int, BaseException]]) -> None:
        if failures:
            rank, error = failures[0]
            raise _annotated(error, self._names[rank], "".join(traceback.format_exception(error)))

    def kill(self, rank: int) -> None:
        worker = self.workers[rank]
        for connection in worker.agent.links.connections:
            connection.abort()
        worker.close("killed")
        discharge(worker)

    def stop(self, graceful: bool) -> None:
        living = [w for w in self.workers if not w.closed]
        graceful = graceful and len(living) == len(self.workers)

        def depart(index: int) -> None:
            leave(living[index], graceful, _FAREWELL_S)

        self._on_threads(depart, (), list(range(len(living))), 2 * _FAREWELL_S)


class _Processes:
    """Workers in forked processes, each driven over a pipe."""

    def __init__(self, names: list[str], transport: str, options: dict[str, Any]) -> None:
        self._names = names
        self._transport = transport
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="distgrad-world-")
        self._processes: list[Any] = []
        self._pipes: list[Pipe] = []
        self._killed: set[int] = set()

    def start(self, timeout: float) -> None:
        extensions.load()
        fork = multiprocessing.get_context("fork")
        fresh = secrets.token_hex(16) if self._transport != "unix" else None
        meeting = f"file://{Path(self._folder.name) / 'store'}"
        for rank, name in enumerate(self._names):
            ours, theirs = fork.Pipe()
            self._pipes.append(ours)
            options = RpcBackendOptions(
                **{"secret": fresh, **self._options, "init_method": meeting}
            )
            process = fork.Process(
                target=_child,
                args=(
                    theirs,
                    self._pipes[:],
                    name,
                    self._transport,
                    rank,
                    len(self._names),
                    options,
                ),
                name=name,
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
        self._collect(list(range(len(self._names))), timeout)

    def run(
        self, fn: Callable[..., Any], args: tuple[Any, ...], ranks: list[int], timeout: float
    ) -> list[Any]:
        for rank in ranks:
            self._pipes[rank].send((fn, args))
        return self._collect(ranks, timeout)

    def _collect(self, ranks: list[int], timeout: float) -> list[Any]:
        until = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: list[BaseException] = []
        while len(results) < len(ranks) and not failures:
            open_ranks = [rank for rank in ranks if rank not in results]
            ready = wait_for([self._pipes[r] for r in open_ranks], until - time.monotonic())
            if not ready:
                raise RpcTimeoutError(
                    f"cannot finish on workers {[self._names[r] for r in open_ranks]}: "
                    f"not done in {timeout:g} s"
                )
            for rank in open_ranks:
                if self._pipes[rank] in ready:
                    self._take_answer(rank, results, failures)
        if failures:
            raise failures[0]
        return [results[rank] for rank in ranks]

    def _take_answer(
        self, rank: int, results: dict[int, Any], failures: list[BaseException]
    ) -> None:
        name = self._names[rank]
        try:
            succeeded, value, trace = self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            code = self._processes[rank].exitcode
            failures.append(WorkerLostError(f"worker {name!r} ended (exit code {code})"))
            return
        if succeeded:
            results[rank] = value
        else:
            failures.append(_annotated(value, name, trace))

    def kill(self, rank: int) -> None:
        self._killed.add(rank)
        os.kill(self._processes[rank].pid, signal.SIGKILL)
        self._processes[rank].join(_FAREWELL_S)

    def stop(self, graceful: bool) -> None:
        living = [r for r in range(len(self._processes)) if self._processes[r].is_alive()]
        graceful = graceful and not self._killed
        try:
            for rank in living:
                self._pipes[rank].send((None, (graceful,)))
            if graceful:
                self._collect(living, 2 * _FAREWELL_S)
        except (BrokenPipeError, EOFError):
            graceful = False  # it ended before it was told to; nothing is left to stop
        finally:
            self._end_processes(_FAREWELL_S if graceful else 2.0)
            self._folder.cleanup()

    def _end_processes(self, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        for process, pipe in zip(self._processes, self._pipes, strict=False):
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


def _child(
    pipe: Pipe,
    inherited: list[Pipe],
    name: str,
    transport: str,
    rank: int,
    size: int,
    options: RpcBackendOptions,
) -> None:
    """Live as one worker: run what the pipe asks for, until it asks to leave."""
    for other in inherited:
        other.close()
    if not _attempt(pipe, lambda: init_rpc(name, transport, rank, size, options) and None):
        return
    worker = activity.get().worker
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:  # the parent is gone
            worker.close("orphaned")
            return
        if fn is None:
            _attempt(pipe, leave, worker, args[0], _FAREWELL_S)
            return
        _attempt(pipe, fn, rank, *args)


def _attempt(pipe: Pipe, fn: Callable[..., Any], *args: Any) -> bool:
    """Run a function and report how it ended."""
    try:
        value = fn(*args)
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            pipe.send((False, error, trace))
        except Exception:  # the exception itself cannot be pickled
            pipe.send((False, DistgradError(f"{type(error).__name__}: {error}"), trace))
        return False
    pipe.send((True, value, ""))
    return True
