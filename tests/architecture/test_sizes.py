"""Rooms stay small: files and functions have limits, and most functions are far below."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
FILE_LIMIT = {".py": 400, ".pyi": 400, ".pyx": 900, ".pxd": 400}
FUNCTION_LIMIT = 60
MEDIAN_LIMIT = 10
FOLDERS = ("src", "tests", "examples", "benchmarks")

SOURCES = sorted(p for p in (ROOT / "src").rglob("*") if p.suffix in FILE_LIMIT)
CODE = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
COMPILED_HEAD = re.compile(r"^( *)(?:async )?c?p?def (?!class ).*\(.*$")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, length and length without the docstring, in lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and ast.get_docstring(node) is not None
            doc = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield f"{relative(path)}:{node.lineno} {node.name}", length, length - doc


def compiled_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield place and length of each function: it ends where the indentation returns."""
    lines = path.read_text().splitlines()
    for start, line in enumerate(lines):
        if head := COMPILED_HEAD.match(line):
            yield f"{relative(path)}:{start + 1}", block_length(lines[start:], len(head[1]))


def block_length(lines: list[str], indent: int) -> int:
    length = 1
    for count, line in enumerate(lines[1:], start=2):
        text = line.strip()
        if text and len(line) - len(line.lstrip()) <= indent and text[0] not in ")#":
            break
        length = count if text else length
    return length


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sizes_source_file_stays_below_its_limit(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= FILE_LIMIT[path.suffix]


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_sizes_python_function_fits_on_a_screen(path: Path) -> None:
    assert [name for name, length, _ in python_functions(path) if length > FUNCTION_LIMIT] == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix == ".pyx"], ids=relative)
def test_sizes_compiled_function_fits_on_a_screen(path: Path) -> None:
    assert [name for name, length in compiled_functions(path) if length > FUNCTION_LIMIT] == []


def test_sizes_median_function_is_short() -> None:
    sources = [path for path in SOURCES if path.suffix == ".py"]
    lengths = [code for path in sources for _, _, code in python_functions(path)]
    assert median(lengths) < MEDIAN_LIMIT


def test_sizes_block_ends_where_the_indentation_returns() -> None:
    text = "def f(\n    a,\n):\n    return a\n\n\nx = 1\n"
    assert block_length(text.splitlines(), 0) == 4
