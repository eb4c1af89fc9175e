"""The workers of the demo: processes of this host, or threads of this process.

The calling process is a worker too. Whatever happens, nothing outlives the world: its
processes end with it (and with this process, should that be killed), and their sockets
lie in a directory that is removed.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from distgrad import rpc
from distgrad.errors import DistgradError, WorkerLostError
from distgrad.launch.local import die_with
from distgrad.rpc.store import FileStore, MemoryStore

__all__ = ["TRANSPORTS", "Traffic", "World", "open_world", "serve"]

TRANSPORTS = ("unix", "tcp", "inproc")
PROGRAM = "from distgrad.launch.demo_world import serve; serve()"
END_S = 5.0  # how long a process may take to end by itself
SETTLE_S = 0.5  # how long the end of a process may lag behind that of its connections


class Traffic(NamedTuple):
    """Requests that workers made, and bytes that they sent."""

    requests: int
    nbytes: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.requests - earlier.requests, self.nbytes - earlier.nbytes)


@dataclass(frozen=True)
class World:
    """A running world.

    Parameters
    ----------
    transport
        One of ``TRANSPORTS``.
    names
        All workers in the order of their ids; the last one is the calling thread.
    processes
        Those of the other workers by name; empty where they are threads.
    """

    transport: str
    names: tuple[str, ...]
    processes: dict[str, subprocess.Popen[bytes]]

    def traffic(self) -> Traffic:
        """Return what all workers together have sent so far."""
        each = [rpc.rpc_sync(name, own_traffic) for name in self.names]
        return Traffic(*map(sum, zip(*each, strict=True)))

    def first_death(self) -> str:
        """Say which worker's process ended, if one did; wait a moment for that to show."""
        living = [p for p in self.processes.values() if p.returncode is None]
        if len(living) == len(self.processes):
            watched = [os.pidfd_open(process.pid) for process in living]
            select.select(watched, [], [], SETTLE_S)
            for descriptor in watched:
                os.close(descriptor)
        for name, process in self.processes.items():
            if (code := process.poll()) is not None:
                return f"worker {name!r} (process {process.pid}) {_how_it_ended(code)}"
        return ""


@rpc.expose
def own_traffic() -> tuple[int, int]:
    """Return the counters of the worker that runs this."""
    info = rpc.debug_info()
    return info["rpc.calls_issued"], info["rpc.bytes_sent"]


@contextmanager
def open_world(
    transport: str, stages: Sequence[str], own_name: str, module: str
) -> Iterator[World]:
    """Start a worker for each stage and become the last worker of their world.

    Parameters
    ----------
    transport
        One of ``TRANSPORTS``.
    stages
        Names of the workers to start.
    own_name
        Name of the calling thread's worker.
    module
        Exposes what the workers may be asked to do; they import it.

    Raises
    ------
    WorkerLostError
        If the body failed because a worker's process ended; names it.
    """
    names = (*stages, own_name)
    with ExitStack() as cleanup:
        if transport == "inproc":
            processes = {}
            options = _start_threads(cleanup, names)
        else:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="distgrad-demo-"))
            secret = secrets.token_hex(32)
            options = _options(folder, secret)
            processes = _start_processes(cleanup, transport, names, module, folder, secret)
        world = World(transport, names, processes)
        try:
            with _start_watched(world, options):
                rpc.init_rpc(own_name, transport, len(stages), len(names), options)
            yield world
        except DistgradError as error:
            death = world.first_death()
            with suppress(DistgradError):  # if this process has not become a worker
                rpc.shutdown(graceful=False)
            if death:
                raise WorkerLostError(f"cannot go on: {death}") from error
            raise
        except BaseException:
            rpc.shutdown(graceful=False)
            raise
        rpc.shutdown()


@contextmanager
def _start_watched(world: World, options: rpc.RpcBackendOptions) -> Iterator[None]:
    """Tell the workers that wait for each other of one whose process has ended meanwhile."""
    if not world.processes:
        yield
        return
    store = FileStore(options.init_method.removeprefix("file://"))
    started = os.eventfd(0)
    watched = [*(os.pidfd_open(p.pid) for p in world.processes.values()), started]

    def watch() -> None:
        ended, _, _ = select.select(watched, [], [])
        if started not in ended:
            store.fail(world.first_death())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        os.eventfd_write(started, 1)
        watcher.join()
        for descriptor in watched:
            os.close(descriptor)


def _options(folder: str, secret: str) -> rpc.RpcBackendOptions:
    return rpc.RpcBackendOptions(init_method=f"file://{folder}/meeting", secret=secret)


def _start_processes(
    cleanup: ExitStack,
    transport: str,
    names: Sequence[str],
    module: str,
    folder: str,
    secret: str,
) -> dict[str, subprocess.Popen[bytes]]:
    environment = os.environ | {
        "DISTGRAD_SECRET": secret,
        "TMPDIR": folder,  # a killed worker cannot remove its socket
        "OPENBLAS_NUM_THREADS": "1",
    }
    processes = {}
    for rank, name in enumerate(names[:-1]):
        command = [sys.executable, "-c", PROGRAM, transport, str(rank), ",".join(names), module]
        processes[name] = subprocess.Popen(
            [*command, folder],
            env=environment,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(die_with, os.getpid()),
        )
        cleanup.callback(_end, processes[name])
    return processes


def serve() -> None:
    """Be one stage's worker until the world ends; the command line says which."""
    transport, rank, names, module, folder = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    __import__(module)
    members = names.split(",")
    options = _options(folder, os.environ["DISTGRAD_SECRET"])
    _be_worker(members[int(rank)], transport, int(rank), len(members), options)


def _start_threads(cleanup: ExitStack, names: Sequence[str]) -> rpc.RpcBackendOptions:
    options = rpc.RpcBackendOptions(init_method=MemoryStore())
    for rank, name in enumerate(names[:-1]):
        arguments: tuple[Any, ...] = (name, "inproc", rank, len(names), options)
        thread = threading.Thread(target=_be_worker, args=arguments, name=name, daemon=True)
        thread.start()
        cleanup.callback(thread.join, END_S)
    return options


def _be_worker(
    name: str, transport: str, rank: int, size: int, options: rpc.RpcBackendOptions
) -> None:
    rpc.init_rpc(name, transport, rank, size, options)
    # Serves until all workers have come here. What goes wrong, the calling process tells.
    with suppress(DistgradError):
        rpc.shutdown()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a process end by itself if the world ended well, else make it."""
    if sys.exception() is not None:
        process.kill()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
