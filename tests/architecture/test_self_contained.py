"""The repository stands by itself: no paths of one machine, no large or generated files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGEST = 2**20
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:home|root|work|farm|Users|mnt|media|scratch)/\w")
GENERATED = (".c", ".so", ".o", ".pyc")
NATIVE = re.compile(r"/_\w+_native\.c$")


def tracked() -> list[Path]:
    """Return what the repository holds, or all files where there is no repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return [ROOT / name for name in result.stdout.split("\0") if name]
    return [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", "build"} & {*p.parts}]


FILES = [path for path in tracked() if path.exists()]


def test_self_contained_no_file_speaks_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_self_contained_no_file_is_large() -> None:
    assert [str(path) for path in FILES if path.stat().st_size > LARGEST] == []


def test_self_contained_no_file_is_generated() -> None:
    written = [p for p in FILES if p.suffix in GENERATED and not NATIVE.search(p.as_posix())]
    if (ROOT / ".git").exists():
        assert written == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("/".join(["see ", "home", "me", "x"]), True),
        ("/".join(['open("', "root", 'x")']), True),
        ("https://example.org/home/page", False),
        ("~/home/x and $TMP/home/x", False),
        ("/dev/shm, /proc/self, /usr/bin/env", False),
    ],
)
def test_self_contained_pattern_knows_a_machine_path(line: str, bad: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is bad
