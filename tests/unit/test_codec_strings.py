"""Arrays of strings of any length keep their text, gaps, shape, order and dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.dtypes import StringDType
from wire_values import frame_of, frame_with, round_trip, same

from distgrad._codec import configure, decode, encode
from distgrad.errors import ProtocolError, SerializationError

Array = np.ndarray[Any, Any]
TEXTS = ["a", "", "é" * 40, "nul\0", "日本語", "x" * 15, "y" * 16, "😀"]


@pytest.mark.parametrize("coerce", [True, False])
@pytest.mark.parametrize("marks", [{}, {"na_object": None}, {"na_object": np.nan}], ids=str)
def test_codec_strings_keep_their_dtype(marks: dict[str, Any], coerce: bool) -> None:
    array = np.array(TEXTS, StringDType(coerce=coerce, **marks))
    if marks:
        array[::3] = marks["na_object"]
    back = round_trip(array)
    assert same(back, array)
    assert back.dtype.coerce is coerce
    assert hasattr(back.dtype, "na_object") == bool(marks)
    back[0] = "its own"
    assert array[0] != "its own"


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (2, 3), (2, 3, 2), (70, 130)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_codec_strings_keep_shape_and_order(shape: tuple[int, ...], order: Any) -> None:
    texts = [f"{i} {'long' * (i % 7)}" for i in range(int(np.prod(shape)))]
    array = np.asarray(np.array(texts, StringDType()).reshape(shape), order=order)
    back = round_trip([array, "next"])[0]
    assert same(back, array)
    assert back.flags.c_contiguous == array.flags.c_contiguous
    assert back.flags.f_contiguous == array.flags.f_contiguous


def test_codec_strings_with_gaps_are_packed() -> None:
    base = np.array([[f"{i}.{j}" for i in range(6)] for j in range(5)], StringDType())
    for view in (base[::2], base[:, ::-1], base[1:, 1:].T, np.broadcast_to(base[0], (3, 6))):
        back = round_trip(view)
        assert same(back, np.array(view))
        assert back.flags.c_contiguous


def test_codec_strings_stay_one_array() -> None:
    first = np.array(["a", "b"], StringDType())
    back = round_trip([first, {"again": first}, np.array(["a", "b"], StringDType()), ()])
    assert back[0] is back[1]["again"]
    assert back[2] is not back[0]


def test_codec_large_strings_travel_in_the_payload() -> None:
    frame = frame_of(np.array(["x" * 100] * 1000, StringDType()))
    assert len(memoryview(frame.payload)) == 4032 + 100_000  # type: ignore[arg-type]
    assert len(frame.meta) < 100


def test_codec_strings_with_another_mark_are_refused_with_the_path() -> None:
    array = np.array(["a"], StringDType(na_object="missing"))
    with pytest.raises(SerializationError, match=r"value\['k'\]: .* na_object='missing'") as caught:
        encode(1, {"k": array})
    assert "na_object=None or nan" in str(caught.value)


def test_codec_strings_beyond_the_limits_are_refused() -> None:
    array = np.array(["x" * 100] * 1000, StringDType())
    frame = frame_of(array)
    old = configure(max_payload_bytes=100_000)
    try:
        with pytest.raises(SerializationError, match="the arrays exceed 100000 bytes"):
            encode(1, array)
    finally:
        configure(**old)
    assert same(decode(frame), array)
    with pytest.raises(SerializationError, match="items without bytes"):
        encode(1, np.zeros((2**40, 0), StringDType()))


def array_bytes(dtype: int, items: bytes, count: int, before: int) -> bytes:
    head = bytes([0xC5, dtype, 1]) + count.to_bytes(8, "little")
    return head + bytes(-(before + len(head)) % 16) + items


def packed(lengths: list[int], text: bytes, rest: bytes = b"\xc0\0\0\0\0\xa2") -> Any:
    """Return a frame with an array of strings of one's own making."""
    meta = b"\xc8\x87strings\xc0\x04\0\0\0"
    meta += array_bytes(4, np.array(lengths, "<i4").tobytes(), len(lengths), len(meta))
    meta += array_bytes(6, text, len(text), len(meta))
    return frame_with(meta + rest)


def test_codec_strings_can_be_made_by_hand() -> None:
    assert decode(packed([1, 0, 2], b"abc")).tolist() == ["a", "", "bc"]
    assert decode(packed([1, -1], b"a", b"\xc0\x01\0\0\0\xa0\xa1")).tolist() == ["a", None]


@pytest.mark.parametrize(
    ("lengths", "text", "rest", "message"),
    [
        ([1, 1], b"a", b"\xc0\0\0\0\0\xa2", "do not add up"),
        ([1], b"ab", b"\xc0\0\0\0\0\xa2", "do not add up"),
        ([2**31 - 1] * 4, b"ab", b"\xc0\0\0\0\0\xa2", "do not add up"),
        ([2, -1], b"a", b"\xc0\0\0\0\0\xa2", "a negative length"),
        ([-2], b"", b"\xc0\x01\0\0\0\xa0\xa2", "a negative length"),
        ([1], b"\xff", b"\xc0\0\0\0\0\xa2", "UnicodeDecodeError"),
        ([1, 1], "é".encode(), b"\xc0\0\0\0\0\xa2", "UnicodeDecodeError"),
        ([3], b"\xed\xa0\x80", b"\xc0\0\0\0\0\xa2", "UnicodeDecodeError"),
        ([], b"", b"\xc0\x01\0\0\0\x81x\xa2", "the mark for missing"),
        ([], b"", b"\xc0\x02\0\0\0\xa0\xa0\xa2", "the mark for missing"),
        ([], b"", b"\xa0\xa2", "the mark for missing"),
        ([], b"", b"\xc0\0\0\0\0\x01", "not the flags"),
    ],
)
def test_codec_strings_that_make_no_sense_are_refused(
    lengths: list[int], text: bytes, rest: bytes, message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(packed(lengths, text, rest))


@pytest.mark.parametrize(
    "value", [b"\x01", b"\xc0\0\0\0\0", b"\xc0\x04\0\0\0\x01\x02\xc0\0\0\0\0\xa2"], ids=bytes.hex
)
def test_codec_strings_of_other_parts_are_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError, match="of an array of strings"):
        decode(frame_with(b"\xc8\x87strings" + value))


def test_codec_strings_by_reference_are_refused() -> None:
    """A few bytes could name the lengths of a million strings, again and again."""
    meta = b"\xc0\x02\0\0\0"
    at = len(meta)
    meta += array_bytes(0x04, b"", 0, len(meta))
    shared = bytearray(meta)
    shared[at] |= 0x20
    ref = b"\xad" + at.to_bytes(4, "little")
    assert decode(frame_with(bytes(shared) + ref))[1].shape == (0,)
    strings = b"\xc8\x87strings\xc0\x04\0\0\0" + ref + ref + b"\xc0\0\0\0\0\xa2"
    with pytest.raises(ProtocolError, match="a reference inside a value that stands alone"):
        decode(frame_with(bytes(shared) + strings))
