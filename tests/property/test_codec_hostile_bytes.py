"""Damaged and invented bytes give ProtocolError or a value: no crash, hang or giant allocation.

The checksum is repaired, so that the decoder itself meets the bytes.
"""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from pathlib import Path

import golden_records  # noqa: F401 - registers the classes of the golden files
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_values import frame_with, same, whole

from distgrad._codec import TAGS, _recompute_crc, decode, encode, parse
from distgrad.errors import ProtocolError, SerializationError

GOLDEN = sorted((Path(__file__).parents[1] / "unit" / "golden").glob("*.bin"))
HEADER = 64


def attempt(data: bytes | bytearray) -> object:
    """Return the value in a frame, or None where it is refused."""
    try:
        return decode(parse(data))
    except (ProtocolError, SerializationError):
        return None


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_codec_truncation_at_every_byte_is_refused(path: Path) -> None:
    frame = path.read_bytes()
    for end in range(len(frame)):
        with pytest.raises(ProtocolError):
            decode(parse(frame[:end]))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_codec_value_cut_at_every_byte_is_refused(path: Path) -> None:
    """As above, behind the checksum and with lengths that fit."""
    frame = parse(path.read_bytes())
    for end in range(1, len(frame.meta)):
        if frame.payload is None:
            with pytest.raises(ProtocolError):
                decode(frame_with(frame.meta[:end]))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_codec_flip_of_any_checked_bit_is_noticed(path: Path) -> None:
    frame = bytearray(path.read_bytes())
    checked = HEADER + len(parse(frame).meta)
    for bit in range(8 * checked):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            parse(frame)
        frame[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_codec_flip_behind_the_checksum_is_survived(path: Path) -> None:
    golden = path.read_bytes()
    for bit in range(8 * (HEADER + len(parse(golden).meta))):
        frame = bytearray(golden)
        frame[bit // 8] ^= 1 << bit % 8
        _recompute_crc(frame)
        attempt(frame)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_codec_flip_in_the_payload_changes_items_only(path: Path) -> None:
    frame = bytearray(path.read_bytes())
    start = HEADER + len(parse(frame).meta)
    original = decode(parse(frame))
    for position in range(start, len(frame), 37):
        frame[position] ^= 0xFF
        value = attempt(frame)
        assert value is None or not same(value, original)
        frame[position] ^= 0xFF


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_codec_random_damage_is_survived(path: Path) -> None:
    golden = path.read_bytes()
    end = HEADER + len(parse(golden).meta)
    dice = random.Random(path.name)
    for _ in range(3000):
        frame = bytearray(golden)
        for _ in range(dice.randint(1, 6)):
            frame[dice.randrange(HEADER, end)] = dice.choice(
                (0, 1, 0x7F, 0xFF, dice.randrange(256))
            )
        _recompute_crc(frame)
        attempt(frame)


tags = st.sampled_from([*TAGS.values(), *(tag | 0x20 for tag in TAGS.values() if tag >= 0xC0)])
numbers = st.sampled_from([0, 1, 2, 5, 31, 255, 2**16, 10**6, 2**31, 2**32 - 1])
pieces = st.one_of(
    tags.map(lambda tag: bytes([tag])),
    numbers.map(lambda number: number.to_bytes(4, "little")),
    numbers.map(lambda number: number.to_bytes(8, "little")),
    st.binary(max_size=6),
    st.sampled_from(
        [
            b"\x84date",
            b"\x89timedelta",
            b"\x88zoneinfo\x83UTC",
            b"\x83<i4",
            b"\x85<M8[s",
            b"\x84|V10",
        ]
    ),
)


@settings(max_examples=2000)
@given(st.lists(pieces, min_size=1, max_size=24).map(b"".join))
@example(b"\xc5\x00\x00\x86<M8[s]" + bytes(8))
def test_codec_invented_value_is_survived(meta: bytes) -> None:
    with contextlib.suppress(ProtocolError, SerializationError):
        decode(frame_with(meta))


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_codec_invented_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(data)


@pytest.mark.parametrize(
    "meta",
    [
        b"\xa7" + b"\xff" * 4,
        b"\xa8" + b"\xff" * 4 + bytes(100),
        b"\xa4\x00\x00\x01\x00",
        b"\xc0\x40\x42\x0f\x00",
        b"\xc1\x40\x42\x0f\x00" * 60,
        b"\xc2\x40\x42\x0f\x00" * 60,
        b"\xc5\x06\x01" + (2**62).to_bytes(8, "little"),
        b"\xc6\x06\x01" + (2**62).to_bytes(8, "little"),
        b"\xc5\x00\x01" + (2**40).to_bytes(8, "little") + b"\x83|V0",
        b"\xc5\x00\x01" + (2**30).to_bytes(8, "little") + b"\x8b|V100000000",
        b"\xac\x00\x8b|V100000000",
        b"\xc8\x87strings\xc0\x04\0\0\0\xc5\x04\x01" + (2**40).to_bytes(8, "little"),
    ],
    ids=lambda meta: meta[:5].hex(),
)
def test_codec_promise_of_many_bytes_allocates_nothing(meta: bytes) -> None:
    frame = frame_with(meta)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(frame)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_codec_lies_about_buffers_are_survived() -> None:
    golden = whole(encode(1, [np.arange(600.0), np.arange(300), "x", np.zeros(2100, "u1")]))
    dice = random.Random(7)
    for _ in range(5000):
        frame = bytearray(golden)
        for _ in range(dice.randint(1, 3)):
            position = dice.choice([dice.randrange(44, 56), dice.randrange(64, 96)])
            frame[position] = dice.choice((0, 1, 2, 8, 0x40, 0x80, 0xFF))
        _recompute_crc(frame)
        attempt(frame)
