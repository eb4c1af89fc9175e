"""The command line: ``distgrad <command>``, also ``python -m distgrad <command>``.

A command is a module with ``add_arguments(parser)`` and ``main(args) -> int``; it is
imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_version", "main"]

COMMANDS = {
    "run": ("distgrad.launch.local", "start a world of processes on this host"),
    "demo": ("distgrad.launch.demo", "train a small model across processes, step by step"),
    "bench": ("distgrad.launch.bench", "run the benchmarks of a source checkout"),
    "doctor": ("distgrad.launch.doctor", "show versions, limits and what is wrong with them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Parameters
    ----------
    argv
        The arguments after the program's name; None takes those of the process.
    """
    chosen = _parser().parse_args(argv)
    module_name, summary = COMMANDS[chosen.command]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"distgrad {chosen.command}", description=summary)
    module.add_arguments(parser)
    args = parser.parse_args(chosen.rest)
    try:
        return int(module.main(args))
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def installed_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("distgrad")
    except PackageNotFoundError:
        return "from source, not installed"


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:8} {summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="distgrad",
        description="Reverse-mode autograd across processes and machines.",
        epilog=f"commands:\n{commands}\n\n'distgrad COMMAND --help' shows its arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distgrad {installed_version()}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    return parser
