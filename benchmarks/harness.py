"""Measure several systems beside each other in one run.

The machine may be shared and noisy, so a number by itself says little: all systems alternate,
round robin, and each is compared with the reference system of the same round. Every system is a
process of its own (``peers/``), under an interpreter that has it installed, and is idle while
another one is measured. The first round warms up and is thrown away.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from systems import System


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
    fresh
        Start the processes anew for every round. Where a scheduler once put many threads, they
        stay: a quarter of the time more or less for as long as the processes live, so that the
        rounds of the same processes would not be independent.
    """

    key: str
    title: str
    unit: str = "µs"
    amount: float = 1
    systems: tuple[str, ...] = ("",)
    fresh: bool = False

    def show(self, seconds: float) -> str:
        if self.unit == "µs":
            return f"{seconds * 1e6:,.{_decimals(seconds * 1e6)}f} µs"
        if self.unit == "ns/node":
            return f"{seconds / self.amount * 1e9:,.0f} ns/node"
        if self.unit == "calls/s":
            return f"{self.amount / seconds:,.0f} calls/s"
        rate = 2 * self.amount / seconds / 1e9
        return f"{rate:.2f} GB/s"

    def show_idle(self, numbers: dict[str, Any]) -> str:
        """Say how much more a summary shows than that of the idle system, if it has that."""
        if "idle_s" not in numbers:
            return ""
        return f", {self.show(numbers['added_s'])} above {self.show(numbers['idle_s'])} idle"


def _decimals(number: float) -> int:
    return 2 if number < 10 else 1 if number < 100 else 0


@dataclass
class Measurements:
    """Seconds by case and system, one number a round.

    Attributes
    ----------
    idle
        The same for what a case compares itself with, where it does.
    """

    benchmark: str
    cases: Sequence[Case]
    systems: Sequence[System]
    rounds: int
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    idle: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, case: Case, system: System, seconds: float, idle_s: float | None = None) -> None:
        self.seconds.setdefault(case.key, {}).setdefault(system.name, []).append(seconds)
        if idle_s is not None:
            self.idle.setdefault((case.key, system.name), []).append(idle_s)

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
                        name: summary(
                            values,
                            self.seconds[case.key].get(self.systems[0].name),
                            self.idle.get((case.key, name)),
                        )
                        for name, values in self.seconds[case.key].items()
                    },
                }
                for case in self.cases
                if case.key in self.seconds
            },
            "failures": self.failures,
        }


def summary(
    values: Sequence[float], reference: Sequence[float] | None, idle: Sequence[float] | None = None
) -> dict[str, Any]:
    """Median, quartiles, and the median of the rounds' ratios to the reference system.

    With ``idle`` also its median, and that of the rounds' differences.
    """
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    ratios = [a / b for a, b in zip(values, reference, strict=True)] if reference else []
    numbers = {
        "median_s": median(values),
        "quartiles_s": [low, high],
        "ratio": median(ratios) if ratios else None,
        "rounds_s": list(values),
    }
    if idle:
        added = [a - b for a, b in zip(values, idle, strict=True)]
        numbers |= {"idle_s": median(idle), "added_s": median(added), "idle_rounds_s": list(idle)}
    return numbers


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
                    if case.fresh and turn > 0:
                        system.restart()
                    answer = system.measure(case.key, budget_s)
                except (RuntimeError, OSError) as error:
                    measurements.drop(case, system, error)
                    able.remove(system)
                    continue
                if turn > 0:
                    measurements.add(case, system, **answer)
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
        line = f"  {name:<28}{case.show(numbers['median_s']):>18}  ±{spread:3.0f} % {ratio}"
        print(line + case.show_idle(numbers))


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
