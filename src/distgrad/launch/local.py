"""``distgrad run``: a world of processes on this host.

Invariants:

1. One thread and one selector: output, ends of workers and signals are all events.
2. A worker leads a process group of its own; whatever it leaves behind is killed with it.
3. A worker dies with the launcher, even if the launcher is killed (``PR_SET_PDEATHSIG``), and
   so does what it started (`Guard`).
4. The launcher ends with the exit code of the first worker that failed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, BinaryIO

from distgrad.launch.guard import Guard

__all__ = ["add_arguments", "die_with", "main", "run", "worker_names"]

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be loaded
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TAIL_LINES = 40
LONGEST_LINE = 2**16
LEFT_PIECES = 64  # of a pipe's 64 KiB: a dead worker cannot have left more
TRACEBACK = b"Traceback (most recent call last):"
CAUSE_S = 5.0  # a traceback at most so long before the first failure is its likely cause


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``distgrad run``."""
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("-n", "--workers", type=int, help="workers, named worker0, worker1, …")
    size.add_argument(
        "--role",
        action="append",
        default=[],
        metavar="NAME[:COUNT]",
        help="workers of one role, may be repeated: ps:2 starts ps0 and ps1, ps starts one, ps",
    )
    parser.add_argument(
        "--grace", type=float, default=5.0, metavar="S", help="seconds between asking and killing"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT names a module")
    parser.add_argument("script", help="the Python program that every worker runs")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")


def main(args: argparse.Namespace) -> int:
    """Run the parsed command; return the exit code of the first failure, or 0."""
    try:
        names = worker_names(args.workers, args.role)
        if not args.module and not os.path.isfile(args.script):
            raise ValueError(f"cannot run {args.script!r}: there is no such file")
    except ValueError as error:
        print(f"distgrad run: {error}", file=sys.stderr)
        return 2
    program = ["-m", args.script] if args.module else [args.script]
    return run([sys.executable, *program, *args.args], names, grace_s=args.grace)


def worker_names(count: int | None, roles: Sequence[str] = ()) -> list[str]:
    """Return the names of a world in the order of ranks.

    Parameters
    ----------
    count
        Number of workers, if there are no roles.
    roles
        ``"ps:2"`` gives ``ps0`` and ``ps1``, ``"ps"`` gives ``ps``.

    Raises
    ------
    ValueError
        If a role or count cannot be read, or two workers get one name.
    """
    if not roles:
        roles = [f"worker:{count}"]
    names = [name for role in roles for name in _role_names(role)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"cannot name the workers: {', '.join(twice)} would exist twice")
    return names


def _role_names(role: str) -> list[str]:
    name, colon, count = role.partition(":")
    if not name or (colon and not (count.isdecimal() and int(count))):
        raise ValueError(f"cannot read role {role!r}: expected NAME or NAME:COUNT")
    return [f"{name}{i}" for i in range(int(count))] if colon else [name]


def run(command: Sequence[str], names: Sequence[str], *, grace_s: float = 5.0) -> int:
    """Run `command` once a name, as one world, until all have ended or one has failed.

    Output appears line by line behind ``[name]``. When a worker fails the others are
    ended (SIGTERM, after `grace_s` seconds SIGKILL) and the last lines of the first
    failure are shown once more. An interrupt ends all workers, a second one kills them.
    Call it from the main thread: it handles signals.

    Returns
    -------
    int
        0, the exit code of the first failure, or 128 plus the signal that ended the run.
    """
    base = os.environ | {"DISTGRAD_SECRET": secrets.token_hex(32)}
    with _reserved_port() as port, _World(grace_s) as world:
        for rank, name in enumerate(names):
            world.start(name, command, worker_environment(base, rank, names, port))
        return world.wait()


def worker_environment(
    base: Mapping[str, str], rank: int, names: Sequence[str], port: int
) -> dict[str, str]:
    """Return the environment of one worker: what ``init_rpc`` reads, and quiet defaults."""
    size = str(len(names))
    defaults = {"PYTHONUNBUFFERED": "1"}
    if len(names) > 1:
        # Workers share the cores; a BLAS that takes all of them for each makes all slower.
        defaults |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {
        **defaults,
        **base,
        "RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DISTGRAD_NAME": names[rank],
    }


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Keep a port from being handed out to others.

    A bound socket that does not listen lets a server with SO_REUSEADDR, which every
    rendezvous sets, listen on the same port.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, the process that started it, ends.

    Meant to run in a child between fork and exec, ``Popen(preexec_fn=...)``.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked


class _Relay:
    """Copies one pipe of a worker to a stream of ours, line by line with a prefix."""

    def __init__(self, pipe: IO[bytes], target: BinaryIO, worker: _Worker) -> None:
        self.pipe, self.target, self.worker = pipe, target, worker
        self.prefix = f"[{worker.name}] ".encode()
        self.rest = b""
        os.set_blocking(pipe.fileno(), False)

    def read(self) -> bool | None:
        """Copy a piece of what is there; return None if there is none yet, False at the end."""
        try:
            data = os.read(self.pipe.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) >= LONGEST_LINE):
            lines, self.rest = [*lines, self.rest], b""
        self.write(lines)
        return bool(data)

    def close(self) -> None:
        """Copy what the worker left, but not what a stranger may write for ever."""
        any(not self.read() for _ in range(LEFT_PIECES))
        if self.rest:
            self.write([self.rest])
        self.pipe.close()

    def write(self, lines: list[bytes]) -> None:
        if self.pipe is self.worker.process.stderr:
            self.worker.remember(lines)
        self.target.write(b"".join(self.prefix + line + b"\n" for line in lines))
        self.target.flush()


class _Worker:
    """One process of the world, leader of its process group."""

    def __init__(self, name: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            preexec_fn=partial(die_with, os.getpid()),
        )
        assert self.process.stdout
        assert self.process.stderr
        self.ended = os.pidfd_open(self.process.pid)  # readable once the process has ended
        self.tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self.wept_at: float | None = None  # when it first wrote a traceback
        self.relays = [
            _Relay(self.process.stdout, sys.stdout.buffer, self),
            _Relay(self.process.stderr, sys.stderr.buffer, self),
        ]

    def remember(self, lines: list[bytes]) -> None:
        self.tail.extend(lines)
        if self.wept_at is None and TRACEBACK in lines:
            self.wept_at = time.monotonic()

    def signal(self, number: int) -> None:
        # Not reaped yet, so the group's number cannot belong to others.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def reap(self) -> int:
        """Kill what is left of the group and return how the process ended."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.ended)
        for relay in self.relays:
            relay.close()
        return self.process.returncode

    def outcome(self) -> str:
        code = self.process.returncode
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class _World:
    """The workers of one run and the loop that serves them."""

    def __init__(self, grace_s: float) -> None:
        self.guard = Guard()
        self.grace_s = grace_s
        self.living: list[_Worker] = []
        self.failed: _Worker | None = None  # the first one to end
        self.cause: _Worker | None = None  # the one whose failure made it fail
        self.interrupt = 0  # the signal that we were asked to end with
        self.kill_at: float | None = None  # when asking gives way to killing
        self.selector = selectors.DefaultSelector()
        self.inbox, self.outbox = socket.socketpair()  # signals, as bytes

    def __enter__(self) -> _World:
        self.outbox.setblocking(False)
        self.watch(self.inbox.fileno(), self.on_signal)
        self.handlers = {s: signal.signal(s, lambda *_: None) for s in ENDING_SIGNALS}
        signal.set_wakeup_fd(self.outbox.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.living:  # only after an error of the launcher itself
            worker.signal(signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.selector.close()
        self.inbox.close()
        self.outbox.close()
        self.guard.dismiss()

    def start(self, name: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
        worker = _Worker(name, command, environ)
        self.guard.watch(worker.process.pid)
        self.living.append(worker)
        self.watch(worker.ended, partial(self.on_end, worker))
        for relay in worker.relays:
            self.watch(relay.pipe, partial(self.on_output, relay))

    def watch(self, file: int | IO[bytes], callback: Callable[[], None]) -> None:
        self.selector.register(file, selectors.EVENT_READ, callback)

    def wait(self) -> int:
        """Serve events until no worker is left; return the exit code of the run."""
        while self.living:
            for key, _ in self.selector.select(self.patience()):
                key.data()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self.end(signal.SIGKILL)
        return self.conclude()

    def patience(self) -> float | None:
        return None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())

    def end(self, number: int) -> None:
        """Ask all workers to end; what does not within the grace time is killed."""
        self.kill_at = time.monotonic() + self.grace_s
        for worker in self.living:
            worker.signal(number)

    def on_output(self, relay: _Relay) -> None:
        # The pipe may have been closed in this very round, with its worker.
        if not relay.pipe.closed and relay.read() is False:
            self.selector.unregister(relay.pipe)

    def on_signal(self) -> None:
        for number in filter(ENDING_SIGNALS.__contains__, self.inbox.recv(64)):
            self.end(signal.SIGKILL if self.interrupt else number)
            self.interrupt = self.interrupt or number

    def on_end(self, worker: _Worker) -> None:
        self.selector.unregister(worker.ended)
        for relay in worker.relays:
            with suppress(KeyError):  # a pipe may end before its process
                self.selector.unregister(relay.pipe)
        self.living.remove(worker)
        for relay in (r for other in self.living for r in other.relays):
            relay.read()  # what they wrote before this end, so that it is known to be earlier
        self.guard.forget(worker.process.pid)
        if worker.reap() and self.kill_at is None:
            self.failed = worker
            self.cause = self.find_cause(worker)
            self.end(signal.SIGTERM)

    def find_cause(self, failed: _Worker) -> _Worker:
        """Return the worker to blame: who loses a peer may be gone before the peer itself is."""
        now = time.monotonic()
        recent = [w for w in (failed, *self.living) if w.wept_at and now - w.wept_at < CAUSE_S]
        return min(recent, key=lambda w: w.wept_at or 0.0, default=failed)

    def conclude(self) -> int:
        if self.interrupt:
            return 128 + self.interrupt
        if self.failed is None or self.cause is None:
            return 0
        outcome = self.failed.outcome()
        if self.cause is not self.failed:
            outcome = f"{self.failed.name} after it: {outcome}"
        lines = [f"distgrad run: {self.cause.name} failed first: {outcome}"]
        lines += [line.decode(errors="replace") for line in self.cause.tail]
        print("\n    ".join(lines), file=sys.stderr, flush=True)
        code = self.failed.process.returncode
        return code if code > 0 else 128 - code
