"""Frames of wire version 1 that every later release must read, and writes the same.

Run this file as a program to write the frames of new cases; frames that exist are history
and stay as they are.
"""

from __future__ import annotations

import datetime
import zoneinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_records import Level, Mode, Point, Size
from numpy.dtypes import StringDType
from wire_values import same, whole

from distgrad._codec import decode, encode, parse

GOLDEN = Path(__file__).parent / "golden"


def shared() -> object:
    inner: list[object] = [1, np.arange(3)]
    return [inner, inner, {"k": inner}]


SIZED = [
    "bool",
    "i1",
    "u1",
    "<i2",
    "<u2",
    "<i4",
    "<u4",
    "<i8",
    "<u8",
    "<f2",
    "<f4",
    "<f8",
    "<c8",
    "<c16",
]

#: Name -> message kind, header fields, value.
CASES: dict[str, tuple[int, dict[str, int], Any]] = {
    "call": (
        1,
        {"request_id": 7, "chain": 0xABCDEF, "deadline_us": 60_000_000},
        ("mod:f", (1, 2.5, "hello", [1, 2, 3], {"a": 1, "b": None}), {"k": True}),
    ),
    "numbers": (2, {}, [127, 128, -1, 2**63 - 1, -(2**63), 2**63, -(2**200), 0.1, 1 - 2j]),
    "texts": (2, {}, ["", "ascii", "x" * 32, "日本語", "\udcff", b"", b"\0\xff"]),
    "containers": (2, {}, [(), [], {}, set(), {1: (2, [3])}, {"a"}, frozenset({5})]),
    "ranges": (2, {}, [range(1, 10, 3), slice(None, -1, 2), ..., None, True, False]),
    "times": (
        2,
        {},
        [
            datetime.date(2024, 2, 29),
            datetime.time(12, 30, fold=1),
            datetime.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=datetime.UTC),
            datetime.timedelta(-1, 2, 3),
            datetime.timezone(datetime.timedelta(hours=2), "X"),
        ],
    ),
    "zones": (
        2,
        {},
        [
            zoneinfo.ZoneInfo("America/Argentina/Buenos_Aires"),
            datetime.time(12, 30, tzinfo=zoneinfo.ZoneInfo("UTC")),
            datetime.datetime(
                2024, 10, 27, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Paris"), fold=1
            ),
        ],
    ),
    "scalars": (
        2,
        {},
        [np.float32(1.5), np.int64(-3), np.bool_(True), np.datetime64("2024-02-29", "D")],
    ),
    "arrays": (
        2,
        {"context_id": 1 << 48 | 5, "message_id": 6},
        [
            np.arange(4, dtype="<f4"),
            np.arange(4, dtype=">i8").reshape(2, 2),
            np.asfortranarray(np.arange(6, dtype="<f8").reshape(2, 3)),
            np.array(2.0),
            np.zeros((0, 3), "<i2"),
            np.array(["a", "bcd"]),
            np.array(["2024-01-01"], "M8[s]"),
            np.array([(1, (2.0, 3.0))], [("a", "<i4"), ("b", ">f8", (2,))]),
        ],
    ),
    "buffers": (
        32,
        {},
        [np.arange(700, dtype="<f4"), "between", np.arange(3000, dtype="u1").reshape(60, 50).T],
    ),
    "strings": (
        2,
        {},
        [
            np.array([["a", "", "日本語"], ["nul\0", "b" * 20, "é"]], StringDType()),
            np.array([["a", None], ["b", "c"]], StringDType(na_object=None), order="F"),
            np.array(["x", np.nan], StringDType(na_object=np.nan, coerce=False)),
            np.array("alone", StringDType()),
            np.zeros((0, 3), StringDType()),
        ],
    ),
    "shared": (2, {}, shared()),
    "records": (
        2,
        {},
        [Level.HIGH, Mode.READ, Mode.READ | Mode.WRITE, Point(1, [Size(2, 3)]), Size(4, 5)],
    ),
    "dtypes": (2, {}, [np.arange(3).astype(name) for name in SIZED]),
    "dates": (
        2,
        {},
        [
            np.array(["2024-02-29", "NaT"], "M8[25us]"),
            np.array([1, -2], ">m8[D]"),
            np.array([b"a", b"bc"], "S2"),
            np.array(
                [(1, 2.5, "x")], np.dtype([("i", "<i2"), ("f", "<f8"), ("s", "<U1")], align=True)
            ),
        ],
    ),
    "error": (
        3,
        {"request_id": 1 << 48 | 1},
        (
            "builtins:KeyError",
            "'k'",
            ("k",),
            "Traceback ...",
            ("worker2", "worker1"),
            {"limit": 5},
        ),
    ),
    "cancel": (4, {"request_id": 1 << 48 | 2}, ()),
    "bye": (5, {}, ("shutdown",)),
    "arrived": (6, {}, (10, 2**40)),
    "departed": (7, {}, (False, "worker 'a' is lost")),
}


def file(name: str) -> Path:
    return GOLDEN / f"{name}.v1.bin"


def encoded(name: str) -> bytes:
    kind, fields, value = CASES[name]
    return whole(encode(kind, value, **fields))


@pytest.mark.parametrize("name", CASES)
def test_codec_golden_frame_is_read(name: str) -> None:
    kind, fields, value = CASES[name]
    frame = parse(file(name).read_bytes())
    assert frame.kind == kind
    assert {field: getattr(frame, field) for field in fields} == fields
    assert same(decode(frame), value)


@pytest.mark.parametrize("name", CASES)
def test_codec_golden_frame_is_written_the_same(name: str) -> None:
    assert encoded(name) == file(name).read_bytes()


def test_codec_golden_frames_all_have_a_case() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {file(name).name for name in CASES}


if __name__ == "__main__":
    for case in CASES:
        if not file(case).exists():
            file(case).write_bytes(encoded(case))
