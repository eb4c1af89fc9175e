"""``distgrad bench``: run a benchmark of the source checkout this package comes from."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``distgrad bench``."""
    parser.add_argument("name", nargs="?", help="which benchmark; without it they are listed")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark or list them all; return its exit code."""
    scripts = {path.stem.removeprefix("bench_"): path for path in _scripts()}
    if args.name in scripts:
        return subprocess.call([sys.executable, str(scripts[args.name]), *args.args])
    if not scripts:
        print("cannot run benchmarks: they come with the source, not with the package")
        print("hint: clone the repository, 'pip install -e .[bench]', and run this again")
    else:
        print("benchmarks:", *sorted(scripts))
    return 0 if args.name is None and scripts else 2


def _scripts() -> list[Path]:
    """Return the benchmarks of an editable install, else of the current directory."""
    for root in (Path(__file__).parents[3], Path.cwd()):
        if found := sorted((root / "benchmarks").glob("bench_*.py")):
            return found
    return []
