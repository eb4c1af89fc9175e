"""Arrays keep dtype, byte order, shape and order, and arrive owned and writable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wire_values import frame_of, frame_with, round_trip, same, whole

from distgrad._codec import configure, decode, encode, parse
from distgrad.errors import ProtocolError, SerializationError

Array = np.ndarray[Any, Any]

PLAIN = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "g", "F", "D", "G"]
DESCRIBED = ["M8[ns]", "M8[25s]", "m8[D]", "M8", "S5", "U3", "V7", "S", "U"]
STRUCTURED = [
    np.dtype([("a", "<i4"), ("b", ">f8")]),
    np.dtype([("a", "i1"), ("b", "f8")], align=True),
    np.dtype([("nested", [("x", "f4", (2, 3)), ("y", "S3")]), ("when", "M8[us]")]),
    np.dtype({"names": ["b", "a"], "formats": ["i4", "i4"], "offsets": [4, 0], "itemsize": 12}),
    np.dtype([(("title", "a"), "i4"), ("b", "i4")]),
    np.dtype([]),
]


def filled(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an array of arbitrary bits of a dtype, but only 0 and 1 for bools."""
    array = np.zeros(shape, dtype)
    if array.nbytes and array.dtype.kind not in "U?":
        flat = array.reshape(-1).view(np.uint8)
        flat[:] = np.arange(flat.size) % 100
    return array


def check(array: Array) -> None:
    back = round_trip(array)
    assert same(back, array)
    assert back.dtype.isalignedstruct == array.dtype.isalignedstruct
    assert back.flags.writeable
    assert back.flags.aligned
    if array.flags.c_contiguous or array.flags.f_contiguous:
        assert back.flags.c_contiguous == array.flags.c_contiguous
        assert back.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", PLAIN + DESCRIBED)
def test_codec_array_keeps_dtype_and_byte_order(dtype: str, order: str) -> None:
    kind = np.dtype(dtype).newbyteorder(order)
    check(filled((3, 4), kind))
    check(filled((200, 60), kind))
    check(filled((), kind))


@pytest.mark.parametrize("dtype", STRUCTURED, ids=str)
def test_codec_array_keeps_structured_dtype(dtype: np.dtype[Any]) -> None:
    check(filled((5,), dtype))
    check(filled((30, 40), dtype))


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (0, 5), (5, 0, 2), (3, 4), (2, 3, 4, 5), (1,) * 32]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_codec_array_keeps_shape_and_order(shape: tuple[int, ...], order: Any) -> None:
    check(np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), order=order))


@pytest.mark.parametrize("scale", [1, 40])
def test_codec_array_with_gaps_is_packed(scale: int) -> None:
    base = np.arange(24.0 * scale * scale).reshape(2, 3 * scale, 4 * scale)
    for view in (base[:, ::2], base[..., ::-1], base.transpose(1, 0, 2), base[1:, 1:, 1:]):
        back = round_trip(view)
        assert np.array_equal(back, view)
        assert back.flags.c_contiguous
    spread = np.broadcast_to(np.float32(3), (7 * scale, 5))
    assert same(round_trip(spread), np.ascontiguousarray(spread))


def test_codec_small_arrays_travel_in_the_meta_block() -> None:
    small, large = np.zeros(256), np.zeros(257)
    assert frame_of(small).payload is None
    assert len(memoryview(frame_of(large).payload)) == large.nbytes  # type: ignore[arg-type]


def test_codec_inline_limit_can_be_changed() -> None:
    old = configure(inline_array_bytes=0)
    try:
        assert frame_of(np.zeros(1)).payload is not None
        assert frame_of(np.zeros(0)).payload is None
        check(np.zeros((3, 3)))
    finally:
        configure(**old)


def test_codec_inline_array_is_aligned_and_owns_its_memory() -> None:
    frame = frame_of(["odd", np.arange(3.0), "x", np.arange(5)])
    for offset in (
        frame.meta.index(np.arange(3.0).tobytes()),
        frame.meta.index(np.arange(5).tobytes()),
    ):
        assert offset % 16 == 0
    _, first, _, second = round_trip(["odd", np.arange(3.0), "x", np.arange(5)])
    assert first.base is None
    assert second.base is None


def test_codec_large_arrays_are_aligned_views_of_the_payload() -> None:
    arrays = [np.arange(n, dtype=np.uint8) for n in (3000, 2049, 4096, 9999)]
    message = encode(1, arrays)
    parts = message.parts()
    offset = sum(len(memoryview(part)) for part in parts[1:])
    assert offset == message.nbytes - len(memoryview(parts[0]))
    back = round_trip(arrays)
    assert same(back, arrays)
    for array in back:
        assert array.ctypes.data % 64 == 0
        assert not array.flags.owndata


def test_codec_many_large_arrays_outgrow_the_reserved_table() -> None:
    for count in (1, 2, 15, 16, 17, 40, 200):
        arrays = [np.full(600, i, np.int64) for i in range(count)]
        assert same(round_trip([arrays, np.arange(7.0), "end"]), [arrays, np.arange(7.0), "end"])


def test_codec_payload_given_beside_the_head_is_not_copied() -> None:
    array = np.arange(1000.0)
    head, *rest = encode(1, [array]).parts()
    block = np.zeros(8064 + 64, np.uint8)
    start = -block.ctypes.data % 64
    payload = block[start : start + 8000]
    payload[:] = np.frombuffer(b"".join(rest), np.uint8)
    (back,) = decode(parse(head, payload))
    assert same(back, array)
    assert np.shares_memory(back, payload)
    with pytest.raises(ValueError, match="not aligned"):
        decode(parse(head, block[start + 1 : start + 8001]))


def test_codec_message_keeps_its_arrays_alive() -> None:
    message = encode(1, [np.full(10_000, 7.0)])
    np.full(10_000, 1.0)
    assert np.frombuffer(whole(message)[-80_000:]).sum() == 70_000


def test_codec_readonly_array_arrives_writable() -> None:
    for size in (4, 4000):
        array = np.zeros(size)
        array.flags.writeable = False
        back = round_trip(array)
        back += 1
        assert back.sum() == size


class Labelled(np.ndarray):
    pass


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, object),
        np.zeros(3, [("a", "i4"), ("b", "O")]),
        np.zeros(3).view(Labelled),
        np.ma.zeros(3),
    ],
    ids=["object", "objects", "subclass", "masked"],
)
def test_codec_array_without_a_form_is_refused(array: Array) -> None:
    with pytest.raises(SerializationError, match=r"value\[0\].* has no form on the wire"):
        encode(1, [array])


def test_codec_arrays_beyond_the_limits_are_refused() -> None:
    old = configure(max_payload_bytes=10_000, max_buffers=3)
    try:
        with pytest.raises(SerializationError, match=r"value\[1\]: the arrays exceed 10000 bytes"):
            encode(1, [np.zeros(1000), np.zeros(1000)])
        with pytest.raises(SerializationError, match="exceed"):
            encode(1, np.broadcast_to(0.0, (2**20, 2**20)))
        with pytest.raises(SerializationError, match="more than 3 large arrays"):
            encode(1, [np.zeros(260)] * 1 + [np.zeros(260) for _ in range(3)])
    finally:
        configure(**old)


def test_codec_array_of_more_empty_rows_than_items_is_refused() -> None:
    """Who goes through it would never end, and there is no byte to show for it."""
    rows = np.zeros((2**40, 0))
    with pytest.raises(SerializationError, match="items without bytes"):
        encode(1, rows)
    meta = b"\xc5\x0c\x02" + (2**40).to_bytes(8, "little") + bytes(8)
    with pytest.raises(ProtocolError, match="items without bytes"):
        decode(frame_with(meta + bytes(-len(meta) % 16)))
    assert round_trip(np.zeros((0, 2**40))).shape == (0, 2**40)
