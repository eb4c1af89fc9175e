"""Fuzz a target under AddressSanitizer and UndefinedBehaviorSanitizer; see README.md."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sanitizers import HERE, ROOT, build, build_driver, build_for_python, can_fuzz, environment

TARGETS = [path.stem.removeprefix("target_") for path in sorted(HERE.glob("target_*.py"))]
LONGEST = 4096  # bytes of an input


def seeds(target: str) -> list[Path]:
    """Return the folders with inputs of the repository."""
    folders = [HERE / "corpus" / target]
    if target == "codec":
        folders.append(ROOT / "tests" / "unit" / "golden")
    return [folder for folder in folders if folder.is_dir()]


def run_libfuzzer(options: argparse.Namespace) -> int:
    """Fuzz with coverage."""
    library = build("fuzzer-no-link,address,undefined", "clang")
    driver = build_driver(library.parent)
    found = options.work / options.target
    found.mkdir(parents=True, exist_ok=True)
    orders = environment(library) | {
        "DISTGRAD_FUZZ_PYTHON": sys.executable,
        "DISTGRAD_FUZZ_TARGET": f"target_{options.target}",
        # What a header announces is taken at once, up to this limit: below that of the fuzzer.
        "DISTGRAD_MAX_PAYLOAD_BYTES": str(2**24),
    }
    corpus = options.inputs or [found, *seeds(options.target)]
    arguments = [f"-max_total_time={options.seconds}", "-print_final_stats=1"]
    if options.merge:
        arguments, corpus = ["-merge=1", "-use_counters=0"], [options.merge, *corpus]
    command = [
        driver, f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=2048",
        "-malloc_limit_mb=64", f"-artifact_prefix={options.work}/{options.target}-",
        *arguments, *options.extra, *corpus,
    ]  # fmt: skip
    dictionary = HERE / f"{options.target}.dict"
    if dictionary.exists() and not options.merge:
        command.insert(1, f"-dict={dictionary}")
    return subprocess.run(command, env=orders, cwd=options.work).returncode


def run_without(options: argparse.Namespace) -> int:
    """Replay the corpus and mutate it blindly; needs only gcc, or what `CC` names."""
    orders = build_for_python(os.environ.get("CC", "gcc"))
    command = [
        sys.executable, __file__, options.target, f"--seconds={options.seconds}", "--blind-loop",
        f"--work={options.work}", *options.inputs,
    ]  # fmt: skip
    return subprocess.run(command, env=orders).returncode


def blind_loop(options: argparse.Namespace) -> int:
    """Run in the sanitized process: every input, then mutations of them."""
    target = importlib.import_module(f"target_{options.target}")
    paths = options.inputs or [p for folder in seeds(options.target) for p in folder.iterdir()]
    inputs = [path.read_bytes() for path in paths]
    until = time.monotonic() + options.seconds
    last = options.work / f"{options.target}-last"
    executions = 0
    for data in mutations(inputs, target.repair, random.Random(options.seed)):
        if executions >= len(inputs) and time.monotonic() > until:
            break
        last.write_bytes(data)  # what a crash leaves behind
        target.one(data)
        executions += 1
    print(f"{options.target}: {executions} executions, {len(inputs)} inputs, no finding")
    return 0


def mutations(
    inputs: list[bytes], repair: Callable[[bytes], bytes], dice: random.Random
) -> Iterator[bytes]:
    """Yield the inputs, then damaged ones for ever, most of them repaired."""
    yield from inputs
    while True:
        data = bytearray(dice.choice(inputs))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data) + 1)
            other = dice.choice(inputs)
            start = dice.randrange(len(other) + 1)
            piece = other[start : start + dice.randint(0, 16)]
            data[at : at + dice.randint(0, 8)] = dice.choice((piece, dice.randbytes(1), b"\xff"))
        yield repair(bytes(data)) if dice.random() < 0.9 else bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("inputs", nargs="*", type=Path, help="run these files only")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--merge", type=Path, help="write a minimal corpus to this folder")
    parser.add_argument("--blind", action="store_true", help="do without clang")
    parser.add_argument("--blind-loop", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1)
    options, options.extra = parser.parse_known_intermixed_args()
    options.work = options.work.absolute()
    options.inputs = [path.absolute() for path in options.inputs]
    options.work.mkdir(parents=True, exist_ok=True)
    if options.blind_loop:
        return blind_loop(options)
    if options.blind or not can_fuzz():
        print("no libFuzzer: replaying the corpus with blind mutations", flush=True)
        return run_without(options)
    return run_libfuzzer(options)


if __name__ == "__main__":
    sys.exit(main())
