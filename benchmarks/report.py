"""Render measurements as Markdown.

    python benchmarks/report.py benchmarks/results/*.json           print the tables
    python benchmarks/report.py benchmarks/results/*.json --write   put them into README.md
                                                                    and docs/benchmarks.md

The tables stand between ``<!-- figures -->`` and ``<!-- /figures -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import Case

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.S)
#: What the README shows: (benchmark, case).
HEADLINES = [
    ("rpc", "echo_small"),
    ("rpc", "echo_1000_in_flight"),
    ("rref", "remote_to_here"),
    ("rref", "proxy_call"),
    ("rref", "step_adam_100"),
    ("rpc", "echo_16mb"),
    ("backward", "backward_call"),
    ("backward", "backward_chain_9"),
    ("backward", "backward_16mb"),
    ("backward", "backward_16mb_weighted"),
    ("graph", "chain_40"),
    ("graph", "mlp_step"),
]
#: How many of the other systems the README names, the fastest first.
OTHERS = 2

Result = dict[str, Any]


def summary_table(results: dict[str, Result]) -> str:
    """The README's table: distgrad, torch, and the fastest of the rest."""
    rows = []
    for benchmark, key in HEADLINES:
        result = results.get(benchmark, {"cases": {}})
        if key in result["cases"]:
            rows.append(summary_row(result, key))
    head = ["work", "distgrad", "PyTorch", "speed-up", "others"]
    return table(head, rows) + "\n" + machine_line(results.values())


def summary_row(result: Result, key: str) -> list[str]:
    case, systems = case_of(result, key), result["cases"][key]["systems"]
    torch = next((name for name in systems if name.startswith("torch")), None)
    cells = [case.title, "-", "-", "-", ""]
    if "distgrad" in systems:
        cells[1] = case.show(systems["distgrad"]["median_s"])
    if torch:
        cells[2] = case.show(systems[torch]["median_s"])
        cells[3] = f"**{times(systems[torch]['ratio'])}**"
    others = sorted(
        (numbers["median_s"], name)
        for name, numbers in systems.items()
        if not name.startswith(("distgrad", "torch")) and not result["systems"][name]["control"]
    )
    cells[4] = ", ".join(f"{name} {case.show(seconds)}" for seconds, name in others[:OTHERS])
    return cells


def full_tables(results: dict[str, Result]) -> str:
    """The tables of docs/benchmarks.md: every case, every system."""
    parts = [machine_line(results.values())]
    for benchmark, result in results.items():
        names = [name for name, system in result["systems"].items() if not system["missing"]]
        head = [benchmark, *(f"{name} {result['systems'][name]['version']}" for name in names)]
        rows = [
            [case_of(result, key).title, *(full_cell(result, key, name) for name in names)]
            for key in result["cases"]
        ]
        parts.append(f"### `bench_{benchmark}.py`\n\n{table(head, rows)}")
        parts.extend(absences(result))
    return "\n".join(parts)


def full_cell(result: Result, key: str, name: str) -> str:
    numbers = result["cases"][key]["systems"].get(name)
    if numbers is None:
        return "-"
    low, high = numbers["quartiles_s"]
    spread = 50 * (high - low) / numbers["median_s"]
    case = case_of(result, key)
    text = f"{case.show(numbers['median_s'])} ±{spread:.0f} %{case.show_idle(numbers)}"
    return text if name == result["reference"] else f"{text} ({times(numbers['ratio'])})"


def absences(result: Result) -> list[str]:
    """Name what could not be measured."""
    missing = [
        f"- {name}: {system['missing']}"
        for name, system in result["systems"].items()
        if system["missing"]
    ]
    failed = [f"- {where}: {error}" for where, error in result["failures"].items()]
    return ["Not measured:\n", *missing, *failed, ""] if missing or failed else []


def times(ratio: float | None) -> str:
    """How many times the reference's time another system takes."""
    if ratio is None:
        return "-"
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"


def case_of(result: Result, key: str) -> Case:
    case = result["cases"][key]
    return Case(key, case["title"], case["unit"], case["amount"])


def machine_line(results: Iterable[Result]) -> str:
    """Say where and when this was measured, and how."""
    lines = {}
    for result in results:
        m = result["machine"]
        where = f"{m['cores']} cores of {m['cpu']}, Python {m['python']}, {m['date']}"
        lines[where] = f"Median of {result['rounds']} rounds, all systems alternating; {where}.\n"
    return "".join(lines.values())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_block(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a file."""
    page = path.read_text()
    if not BLOCK.search(page):
        raise SystemExit(f"cannot write the tables into {path}: no <!-- figures --> block")
    path.write_text(BLOCK.sub(lambda found: f"{found[1]}{text}{found[2]}", page))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of the benchmarks")
    parser.add_argument("--write", action="store_true", help="into README.md and the docs")
    options = parser.parse_args()
    contents = [json.loads(path.read_text()) for path in options.files]
    loaded = [content for content in contents if "benchmark" in content]
    order = ["rpc", "rref", "backward", "contexts", "graph", "codec"]
    results = {r["benchmark"]: r for r in sorted(loaded, key=lambda r: order.index(r["benchmark"]))}
    if options.write:
        write_block(ROOT / "README.md", summary_table(results))
        write_block(ROOT / "docs" / "benchmarks.md", full_tables(results))
    else:
        print(summary_table(results), full_tables(results), sep="\n")


if __name__ == "__main__":
    main()
