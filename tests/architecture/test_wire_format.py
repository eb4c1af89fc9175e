"""The tables of docs/wire-format.md are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from distgrad import _codec
from distgrad.config import Config
from distgrad.message import KINDS

TEXT = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text()


def table(head: str) -> list[list[str]]:
    """Return the rows of the table whose head line starts with these columns."""
    pattern = re.escape(f"| {head} ") + r".*\n\| --- .*\n((?:\|.*\n)+)"
    found = re.search(pattern, TEXT)
    assert found, head
    return [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in found[1].splitlines()]


def test_wire_format_header_is_documented() -> None:
    rows = [(name, int(offset), int(size)) for name, offset, size, _ in table("field | offset")]
    assert rows == list(_codec.HEADER_FIELDS)


def test_wire_format_header_has_no_gaps() -> None:
    end = 0
    for _, offset, size in _codec.HEADER_FIELDS:
        assert offset == end
        assert offset % size == 0
        end += size
    assert end == 64


def test_wire_format_tags_are_documented() -> None:
    rows = {name: int(tags.split("-")[0], 16) for tags, name, _, _ in table("tag | name")}
    assert rows == _codec.TAGS


def test_wire_format_dtype_codes_are_documented() -> None:
    assert {name: int(code) for code, name in table("code | dtype")} == _codec.DTYPES


@pytest.mark.parametrize("name", [name for name in _codec.DTYPES if hasattr(np, name)])
def test_wire_format_dtype_code_is_what_is_written(name: str) -> None:
    array = np.zeros(1, name)
    frame = _codec.parse(bytes(_codec.encode(1, array)))
    assert frame.meta[:3] == bytes([_codec.TAGS["array"], _codec.DTYPES[name], 1])


def test_wire_format_limits_are_documented() -> None:
    rows = {name: int(default) for name, default, _ in table("limit | default")}
    assert rows == {name: getattr(Config(), name) for name in _codec.configure()}


def test_wire_format_messages_are_documented() -> None:
    rows = {
        int(code): (name, re.findall(r"\w+", cells))
        for code, name, cells in table("code | message")
    }
    assert rows == {code: (cls.__name__, list(cls._fields)) for code, cls in KINDS.items()}
