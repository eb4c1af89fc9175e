"""What every peer shares: the timing loop and the conversation with the harness.

A peer is one system under measurement, run as a process of its own under the interpreter
that has the system installed; so this file needs the standard library alone. The harness
writes one JSON request a line to standard input and reads one JSON answer a line:

    {"case": "echo_small", "budget_s": 0.3}  ->  {"seconds": 1.2e-05, "samples": 20000}

Before that the peer says once what it is: ``{"ready": version, "cases": [...]}`` or
``{"missing": reason}``. Between two requests a peer, its server included, is stopped by a
signal, for another system is being measured meanwhile; only MPI's stay awake, and must sleep.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

#: Shortest time that one sample covers; faster calls are repeated inside a sample.
SAMPLE_S = 10e-6
#: Fewest samples of a round, however long one takes.
MIN_SAMPLES = 3


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
        return [name.removeprefix("time_") for name in dir(cls) if name.startswith("time_")]


def measure(call: Callable[[], object], budget_s: float) -> tuple[float, int]:
    """Median seconds of one call and the number of samples, over about ``budget_s`` seconds."""
    repeat = max(1, round(SAMPLE_S / min(_timed(call, 1) for _ in range(3))))
    samples: list[float] = []
    end = perf_counter() + budget_s
    while len(samples) < MIN_SAMPLES or perf_counter() < end:
        samples.append(_timed(call, repeat))
    return median(samples), len(samples)


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
            call = getattr(peer, "time_" + request["case"])
            with peer.awake(request["case"]):
                seconds, samples = measure(call, request["budget_s"])
            answer(seconds=seconds, samples=samples)
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
    peer.close()


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
