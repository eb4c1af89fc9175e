"""What every peer shares: the timing loop and the conversation with the harness.

A peer is one system under measurement, run as a process of its own under the interpreter
that has the system installed; so this file needs the standard library alone. The harness
writes one JSON request a line to standard input and reads one JSON answer a line:

    {"case": "echo_small", "budget_s": 0.3}  ->  {"seconds": 1.2e-05}

A case that shows what something else costs also answers with ``idle_s``, the same without it.
Before that the peer says once what it is: ``{"ready": version, "cases": [...]}`` or
``{"missing": reason}``. Between two requests a peer, its server included, is stopped by a
signal, for another system is being measured meanwhile; only MPI's stay awake, and must sleep.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter, sleep
from typing import Any

#: Shortest time that one sample covers; faster calls are repeated inside a sample.
SAMPLE_S = 10e-6
#: Fewest samples of a round, however long one takes.
MIN_SAMPLES = 3
#: Fewest samples of a case that asks for the slowest one in a hundred; but some systems take
#: seconds for one beside a transfer, so a round ends after a while with what it has.
MIN_TAIL_SAMPLES = 300
LONGEST_TAIL_S = 1.0
#: Ending of cases that are measured while two more processes are busy.
CROWDED = "_crowded"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, even if it is stopped then."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


die_with_parent()  # whatever ends the harness: no peer, server or MPI rank outlives it


class Peer:
    """One system; each method ``time_<case>`` does the work of that case once."""

    version = ""

    @contextlib.contextmanager
    def awake(self, case: str) -> Iterator[None]:
        """Surround a round of ``case``; a peer whose server busy-waits starts it here."""
        yield

    def close(self) -> None:
        """End the servers of this peer."""

    @classmethod
    def cases(cls) -> list[str]:
        """List what can be measured: ``time_`` repeats a method, ``tail_`` is its own loop."""
        names = [name.partition("_") for name in dir(cls)]
        timed = [case for kind, _, case in names if kind == "time"]
        tails = [case for kind, _, case in names if kind == "tail"]
        return timed + tails + [case + CROWDED for case in timed]


@contextlib.contextmanager
def crowd(wanted: bool) -> Iterator[None]:
    """Keep two processes busy meanwhile."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=die_with_parent)
        for _ in range(2 if wanted else 0)
    ]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def tail(call: Callable[[], object], budget_s: float, pause_s: float = 0.0005) -> float:
    """Seconds that 99 of 100 calls stay below, a pause between each two."""
    samples: list[float] = []
    start = now = perf_counter()
    while now < start + budget_s or (
        len(samples) < MIN_TAIL_SAMPLES and now < start + LONGEST_TAIL_S
    ):
        samples.append(_timed(call, 1))
        sleep(pause_s)
        now = perf_counter()
    return percentile_99(samples)


def percentile_99(samples: Sequence[float]) -> float:
    """Of less than a hundred samples that is the greatest."""
    return sorted(samples)[math.ceil(0.99 * len(samples)) - 1]


def tail_beside(
    call: Callable[[], object], transfer: Callable[[], object], budget_s: float
) -> tuple[float, float]:
    """The same while another thread repeats ``transfer``, and before that without it."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            transfer()

    idle = tail(call, budget_s)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        return tail(call, budget_s), idle
    finally:
        over.set()
        thread.join()


def measure(call: Callable[[], object], budget_s: float) -> float:
    """Median seconds of one call, over about ``budget_s`` seconds."""
    repeat = max(1, round(SAMPLE_S / min(_timed(call, 1) for _ in range(3))))
    samples: list[float] = []
    end = perf_counter() + budget_s
    while len(samples) < MIN_SAMPLES or perf_counter() < end:
        samples.append(_timed(call, repeat))
    return median(samples)


def _timed(call: Callable[[], object], repeat: int) -> float:
    if repeat == 1:
        start = perf_counter()
        call()
        return perf_counter() - start
    turns = range(repeat)
    start = perf_counter()
    for _ in turns:
        call()
    return (perf_counter() - start) / repeat


def serve(make: Callable[[], Peer]) -> None:
    """Answer the harness on behalf of the peer that ``make`` builds, until it hangs up."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not reach the harness

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        peer = make()
    except ImportError as error:
        answer(missing=str(error))
        return
    answer(ready=peer.version, cases=peer.cases())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(**run_case(peer, request["case"], request["budget_s"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
    peer.close()


def run_case(peer: Peer, case: str, budget_s: float) -> dict[str, float]:
    """Measure a case: seconds of one repetition, and where it matters those of an idle system."""
    name = case.removesuffix(CROWDED)
    with peer.awake(name), crowd(case != name):
        if not hasattr(peer, "tail_" + name):
            return {"seconds": measure(getattr(peer, "time_" + name), budget_s)}
        found = getattr(peer, "tail_" + name)(budget_s)
    if isinstance(found, tuple):
        return {"seconds": found[0], "idle_s": found[1]}
    return {"seconds": found}


def start_server(*arguments: str) -> subprocess.Popen[bytes]:
    """Run this script once more as a server; it ends with this process."""
    command = [sys.executable, os.path.abspath(sys.argv[0]), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2)


def end_with_parent() -> None:
    """End this server process as soon as the process that started it is gone."""

    def watch() -> None:
        # Unbuffered: a lock held by a daemon thread in sys.stdin would abort the exit.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
