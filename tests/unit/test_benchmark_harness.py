"""The benchmarks' harness: rounds, ratios, missing systems, failures, and the report."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEER = """
import itertools, sys
sys.path.insert(0, {peers!r})
import measure

ticks = itertools.count()
measure.perf_counter = lambda: next(ticks) * float(sys.argv[2])  # so long takes everything
measure.sleep = lambda seconds: None

class Peer(measure.Peer):
    version = "1.0"
    def __init__(self):
        print("noise on standard output")
        if sys.argv[1] == "absent":
            import a_module_that_is_nowhere
    def time_wait(self):
        pass
    def time_fail(self):
        raise ValueError("out of order")
    def tail_late(self, budget_s):
        return measure.percentile_99(range(300)) / 1e5, measure.percentile_99([3, 1, 2]) / 1e5
    def tail_many(self, budget_s):
        calls = []
        measure.tail(lambda: calls.append(1), budget_s)
        return len(calls)

measure.serve(Peer)
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield load("harness")
    for name in ("harness", "systems"):
        sys.modules.pop(name, None)


@pytest.fixture
def report(harness: ModuleType) -> Iterator[ModuleType]:
    yield load("report")
    sys.modules.pop("report", None)


@pytest.fixture
def measured(harness: ModuleType, tmp_path: Path) -> dict[str, Any]:
    """A run with a fast, a slow and a missing system, one of whose cases fails.

    Another one compares itself with the idle system.
    """
    script = tmp_path / "peer.py"
    script.write_text(PEER.format(peers=str(BENCHMARKS / "peers")))
    systems = [
        harness.System("distgrad", [str(script), "fast", "0.001"]),
        harness.System("torch rpc", [str(script), "slow", "0.005"]),
        harness.System("gone", [str(script), "absent", "0"]),
        harness.System("broken", [str(tmp_path / "no-such-file.py")]),
    ]
    cases = [
        harness.Case("wait", "waiting"),
        harness.Case("fail", "failing"),
        harness.Case("late", "being late"),
        harness.Case("many", "number of samples"),
    ]
    target = tmp_path / "results" / "rpc.json"
    arguments = ["--rounds", "3", "--seconds", "0.01", "--json", str(target)]
    harness.main("rpc", "a test", cases, systems, arguments)
    content: dict[str, Any] = json.loads(target.read_text())
    return content


def test_harness_ratio_is_that_of_the_same_rounds(measured: dict[str, Any]) -> None:
    systems = measured["cases"]["wait"]["systems"]
    assert [len(numbers["rounds_s"]) for numbers in systems.values()] == [3, 3]
    assert systems["distgrad"]["ratio"] == 1.0
    assert systems["distgrad"]["median_s"] == pytest.approx(0.001)
    assert systems["torch rpc"]["ratio"] == pytest.approx(5.0)


def test_harness_names_what_is_missing_and_what_failed(measured: dict[str, Any]) -> None:
    assert "a_module_that_is_nowhere" in measured["systems"]["gone"]["missing"]
    assert "ended" in measured["systems"]["broken"]["missing"]
    assert measured["systems"]["distgrad"]["version"] == "1.0"
    assert measured["failures"]["fail: distgrad"] == "ValueError: out of order"
    assert measured["machine"]["cores"] >= 1


def test_harness_shows_how_much_is_above_idle(measured: dict[str, Any], report: Any) -> None:
    numbers = measured["cases"]["late"]["systems"]["torch rpc"]
    assert numbers["median_s"] == pytest.approx(296e-5)  # 297 of 300 are not above it
    assert numbers["idle_s"] == pytest.approx(3e-5)
    assert numbers["added_s"] == pytest.approx(293e-5)
    assert len(numbers["idle_rounds_s"]) == 3
    assert "idle_s" not in measured["cases"]["wait"]["systems"]["torch rpc"]
    assert "2,930 µs above 30.0 µs idle" in report.full_tables({"rpc": measured})


def test_harness_round_of_a_tail_ends_where_calls_take_long(measured: dict[str, Any]) -> None:
    systems = measured["cases"]["many"]["systems"]
    assert systems["distgrad"]["median_s"] == 300  # calls of three ticks of 1 ms
    assert 1.0 / 0.015 <= systems["torch rpc"]["median_s"] < 1.0 / 0.015 + 2


def test_report_tables_show_ratio_and_absence(measured: dict[str, Any], report: Any) -> None:
    measured["cases"]["echo_small"] = measured["cases"]["wait"]
    summary = report.summary_table({"rpc": measured})
    assert summary.count("| waiting |") == 1
    assert "**5.0x**" in summary
    full = report.full_tables({"rpc": measured})
    assert "- gone: No module named 'a_module_that_is_nowhere'" in full
    assert "torch rpc 1.0" in full


def test_report_replaces_the_block_and_nothing_else(report: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    report.write_block(page, "| new |\n")
    expected = "before\n<!-- figures -->\n| new |\n<!-- /figures -->\nafter\n"
    assert page.read_text() == expected
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="no <!-- figures --> block"):
        report.write_block(page, "")


@pytest.mark.parametrize(
    ("unit", "amount", "seconds", "shown"),
    [
        ("µs", 1, 1.234e-6, "1.23 µs"),
        ("µs", 1, 0.012, "12,000 µs"),
        ("calls/s", 1000, 0.01, "100,000 calls/s"),
        ("GB/s", 16e6, 0.004, "8.00 GB/s"),
    ],
)
def test_case_shows_seconds_in_its_unit(
    harness: ModuleType, unit: str, amount: float, seconds: float, shown: str
) -> None:
    assert harness.Case("key", "title", unit, amount).show(seconds) == shown
