"""Header, checksum, limits and the parts of a frame."""

from __future__ import annotations

import gc
import pickle
import re
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from wire_values import frame_of, frame_with, round_trip, whole

from distgrad import _codec
from distgrad._codec import Bounds, Frame, Outgoing, configure, decode, encode, parse
from distgrad.errors import ProtocolError, SerializationError

FIELDS = {name: (offset, size) for name, offset, size in _codec.HEADER_FIELDS}


def changed(frame: bytes, field: str, value: int) -> bytearray:
    """Return a frame with another value in a header field and a correct crc."""
    offset, size = FIELDS[field]
    altered = bytearray(frame)
    altered[offset : offset + size] = value.to_bytes(size, "little")
    if field != "crc":
        _codec._recompute_crc(altered)
    return altered


def test_codec_header_fields_arrive() -> None:
    fields = {
        "request_id": 2**64 - 1,
        "context_id": 3 << 48 | 7,
        "message_id": 5,
        "chain": 2**63,
        "deadline_us": 1_000_000,
    }
    frame = parse(whole(encode(255, None, **fields)))
    assert {name: getattr(frame, name) for name in fields} == fields
    assert (frame.kind, frame.flags, frame.payload) == (255, 0, None)
    assert frame.meta == bytes([_codec.TAGS["none"]])


def test_codec_header_fields_can_be_set_until_sealed() -> None:
    message = encode(1, "x", request_id=1)
    message.kind, message.request_id, message.chain = 2, 3, 4
    message.context_id, message.message_id, message.deadline_us = 5, 6, 7
    message.seal()
    message.request_id = 99
    frame = parse(whole(message))
    assert (frame.kind, frame.request_id, frame.chain) == (2, 3, 4)
    assert (frame.context_id, frame.message_id, frame.deadline_us) == (5, 6, 7)


def test_codec_deadline_saturates() -> None:
    assert parse(whole(encode(1, None, deadline_us=2**40))).deadline_us == 2**32 - 1


@pytest.mark.parametrize(
    "fields", [{"request_id": -1}, {"chain": 2**64}, {"deadline_us": "soon"}], ids=str
)
def test_codec_header_field_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((OverflowError, TypeError)):
        encode(1, None, **fields)


def test_codec_frame_sizes_add_up() -> None:
    message = encode(1, [np.zeros(500), "x", np.zeros(501), np.zeros(777, np.uint8), np.zeros(3)])
    data = whole(message)
    assert message.nbytes == len(data) == parse(data).nbytes
    assert bytes(message) == data[: len(bytes(message))]


def test_codec_parts_are_sealed_and_repeatable() -> None:
    message = encode(1, np.arange(1000))
    assert whole(message) == whole(message)
    view = memoryview(message)
    assert view.readonly
    assert view.nbytes == 64 + len(parse(whole(message)).meta)


def test_codec_parts_hold_any_dtype_and_order() -> None:
    arrays = [np.zeros(300, "M8[s]"), np.asfortranarray(np.ones((30, 30))), np.zeros(99, "U40")]
    for part in encode(1, arrays).parts():
        assert memoryview(part).contiguous


@pytest.mark.parametrize("cls", [Outgoing, Frame])
def test_codec_classes_cannot_be_made_by_hand(cls: type) -> None:
    with pytest.raises(TypeError, match="cannot create"):
        cls()
    with pytest.raises(TypeError):
        pickle.dumps(encode(1, 1))


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64])
def test_codec_truncated_header_is_refused(nbytes: int) -> None:
    with pytest.raises(ProtocolError):
        parse(whole(encode(1, "abc"))[:nbytes])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "wire version 2"),
        ("version", 0, "wire version 0"),
        ("kind", 0, "reserved"),
        ("flags", 0x0100, "unknown flags 0x0100"),
        ("flags", 0x8000, "unknown flags 0x8000"),
        ("reserved_a", 1, "reserved"),
        ("reserved_b", 1, "reserved"),
        ("meta_nbytes", 2**32 - 1, "4294967295 bytes of meta"),
        ("meta_nbytes", 0, "no room for a value"),
        ("payload_nbytes", 2**63, "bytes of arrays"),
        ("payload_nbytes", 8, "contradict"),
        ("num_buffers", 1, "no room for a value"),
        ("num_buffers", 2000, "2000 arrays, 1024 are allowed"),
        ("crc", 0, "checksum"),
    ],
)
def test_codec_wrong_header_is_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse(changed(whole(encode(1, "abc")), field, value))


def test_codec_flags_that_may_be_ignored_are() -> None:
    frame = parse(changed(whole(encode(1, "abc")), "flags", 0x00FF))
    assert frame.flags == 0xFF
    assert decode(frame) == "abc"


def test_codec_missing_or_short_payload_is_refused() -> None:
    head, array = encode(1, np.zeros(1000)).parts()
    block = np.zeros(8064, np.uint8)
    start = -block.ctypes.data % 64
    with pytest.raises(ProtocolError, match="a frame of"):
        parse(head)
    with pytest.raises(ProtocolError, match="the payload is truncated"):
        decode(parse(head, block[start : start + 7999]))
    with pytest.raises(ValueError, match="not writable"):
        decode(parse(head, bytes(memoryview(array))))


def test_codec_payload_checks_lengths_and_padding() -> None:
    message = encode(1, [np.zeros(2049, np.uint8), np.zeros(3000, np.uint8)])
    frame = bytearray(whole(message))
    assert decode(parse(frame))[1].size == 3000
    gap = len(bytes(message)) + 2049
    frame[gap] = 1
    with pytest.raises(ProtocolError, match="padding is not zero"):
        decode(parse(frame))
    frame[gap] = 0
    frame[64:66] = (2050).to_bytes(2, "little")
    _codec._recompute_crc(frame)
    with pytest.raises(ProtocolError, match="differ in size"):
        decode(parse(frame))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("ae", "unknown tag 0xae"),
        ("bf", "unknown tag 0xbf"),
        ("ca", "unknown tag 0xca"),
        ("ff", "unknown tag 0xff"),
        ("8161 00", "1 bytes follow the value"),
        ("83 6162", "truncated"),
        ("a7 05000000 61626364", "truncated"),
        ("a7 ffffffff 61", "truncated"),
        ("a8 ffffffff", "truncated"),
        ("a4 ffffffff", "truncated"),
        ("a3 00", "truncated"),
        ("82 c328", "UnicodeDecodeError"),
        ("c1 ffffffff", "4294967295 elements"),
        ("c1 40420f00 00", "truncated"),
        ("c2 01000000 8161", "truncated"),
        ("c2 02000000 8161 00 8161 00", "key twice"),
        ("c3 02000000 01 01", "element twice"),
        ("c2 01000000 c100000000 00", "unhashable"),
        ("ad 00000000", "no shared value"),
        ("e1 01000000 ad00000000", "no shared value"),
        ("c1 02000000 c100000000 ad05000000", "no shared value"),
        ("aa 00 01 8161", "integer bounds"),
        ("aa 00 01 00", "ValueError"),
        ("ac 7f", "unknown dtype code"),
        ("ac 0d 0000", "truncated"),
        ("ac 00 837c4f38", "plain values"),
        ("c5 0c 81 ffffffffffffffff", "overflows"),
        ("c5 0c 02 00000000ffffff7f 00000000ffffff7f", "overflows"),
        ("c5 0c 01 0000000000001000", "truncated"),
        ("c5 0c 41", "65 dimensions"),
        ("c6 0c 01 0100000000000000", "more arrays than buffers"),
        ("c5 00 00 c002000000 833c6934 c001000000 02", "array of arrays"),
        ("c7 02 00000000 00", "unknown form"),
        ("c8 8178 00", "not registered here"),
        ("c8 00 00", "is no text"),
        ("c8 c100000000 00", "is no text"),
        ("c9 01000000 8178 00", "not exposed here"),
        ("c9 01000000 8464617465 00", "not exposed here"),
        ("c8 8464617465 c003000000 00 00 00", "ValueError"),
        ("c8 8464617465 00", "are no tuple"),
    ],
)
def test_codec_malformed_value_is_refused(meta: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(frame_with(bytes.fromhex(meta)))


@pytest.mark.parametrize("piece", ["ab", "aa", "ac00", "c0 01000000", "c8", "c50000"])
def test_codec_nesting_without_end_is_refused(piece: str) -> None:
    with pytest.raises(ProtocolError, match="deeper than 64 levels"):
        decode(frame_with(bytes.fromhex(piece) * 100_000))


def doubled(count: int) -> bytes:
    """Return the elements of a list: a tuple, and tuples that name the last one twice."""
    elements, offset = b"", 5
    for i in range(count):
        element = b"\xe0\x02\0\0\0" + (b"\xad" + offset.to_bytes(4, "little")) * 2
        element = element if i else b"\xe0\0\0\0\0"
        offset = 5 + len(elements)
        elements += element
    return elements


@pytest.mark.parametrize("use", ["c8", "c9 00000000", "c5 00 00", "ac 00", "c3 01000000"])
def test_codec_value_that_doubles_by_references_is_never_walked(use: str) -> None:
    elements = doubled(70)
    last = b"\xad" + (5 + len(elements) - 15).to_bytes(4, "little")
    count = (71).to_bytes(4, "little")
    frame = frame_with(b"\xc1" + count + elements + bytes.fromhex(use) + last + b"\0")
    with pytest.raises(ProtocolError, match=r"no text|without identity"):
        decode(frame)


def test_codec_nested_containers_cannot_promise_the_same_bytes_twice() -> None:
    """50 lists that each claim all of a million bytes would allocate 400 MB."""
    size = 900_000
    meta = b"".join(b"\xc1" + (size - 5 * i).to_bytes(4, "little") for i in range(50))
    frame = frame_with(meta + bytes(size))
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="truncated"):
        decode(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("value", "told", "message"),
    [
        ([[[]]], [2], r"deeper than 2 levels, the limit of worker 'b'$"),
        ("x" * 5000, [64, 4000], r"exceeds 4000 bytes, the limit of worker 'b': it has 50\d\d or"),
        (
            np.ones(5000),
            [64, 4000, 999],
            r"exceed 999 bytes, the limit .*: they have 40000 or more",
        ),
        ([0] * 5, [64, 4000, 999, 4], "5 elements, 4 are allowed, the limit of worker 'b'"),
        (np.ones((5, 0)), [64, 4000, 999, 4], "5 items .*, 4 are allowed, the limit of worker 'b'"),
        (
            [np.ones(300), np.ones(301)],
            [64, 4000, 9999, 4, 1],
            "more than 1 large .* worker 'b'",
        ),
    ],
    ids=lambda part: f"{part!r:.20}",
)
def test_codec_bounds_of_the_receiver_hold_besides_the_limits(
    value: object, told: list[int], message: str
) -> None:
    with pytest.raises(SerializationError) as caught:
        encode(1, value, bounds=Bounds("b", told))
    assert re.search(message, caught.value.message)
    assert re.search(r"raise max_\w+ on worker 'b', before init_rpc", str(caught.value))
    generous = Bounds("b", [10**9, 2**40, 2**70, 2**40, 2**20, 7, 7])
    for bounds in (None, generous, Bounds("b", [])):
        assert whole(encode(1, value, bounds=bounds)) == whole(encode(1, value))


def test_codec_bounds_that_are_wider_leave_the_limits() -> None:
    old = configure(max_items=3)
    try:
        with pytest.raises(SerializationError, match=r"3 are allowed\n.*on all workers"):
            encode(1, [0] * 4, bounds=Bounds("b", [1]))
        with pytest.raises(SerializationError, match="deeper than 1 levels, the limit of worker"):
            encode(1, [[0]], bounds=Bounds("b", [1]))
        assert _codec.receivable() == (*_codec.receivable()[:3], 3, old["max_buffers"])
    finally:
        configure(**old)


def test_codec_limits_hold_for_sender_and_receiver() -> None:
    many, long = frame_of([0] * 1000), frame_of("x" * 5000)
    data = whole(encode(1, "x" * 5000))
    old = configure(max_items=999, max_meta_bytes=4000)
    try:
        with pytest.raises(SerializationError, match="1000 elements, 999 are allowed"):
            encode(1, {"k": [0] * 1000})
        with pytest.raises(SerializationError, match="exceeds 4000 bytes"):
            encode(1, "x" * 5000)
        with pytest.raises(ProtocolError, match="1000 elements, 999 are allowed"):
            decode(many)
        with pytest.raises(ProtocolError, match="5005 bytes of meta"):
            parse(data)
        assert decode(long) == "x" * 5000
        assert round_trip("x" * 3995) == "x" * 3995
    finally:
        configure(**old)


def test_codec_meta_limit_is_exact() -> None:
    old = configure(max_meta_bytes=3000)
    try:
        assert len(frame_of("x" * 2995).meta) == 3000
        with pytest.raises(SerializationError):
            encode(1, "x" * 2996)
        # A buffer table takes 16 of the bytes.
        assert len(frame_of([np.zeros(300), "x" * 2963]).meta) == 3000
        with pytest.raises(SerializationError):
            encode(1, [np.zeros(300), "x" * 2964])
    finally:
        configure(**old)


def test_codec_configure_returns_what_was_in_force() -> None:
    before = configure()
    old = configure(max_depth=10)
    assert old == before
    assert configure(**old)["max_depth"] == 10
    assert configure() == before


@pytest.mark.parametrize(
    "limit",
    [{"max_depth": 1001}, {"max_buffers": 65536}, {"max_meta_bytes": 2**32}, {"max_items": -1}],
    ids=str,
)
def test_codec_configure_refuses_what_the_format_cannot_hold(limit: dict[str, int]) -> None:
    before = configure()
    with pytest.raises(ValueError, match="cannot set"):
        configure(**limit)  # type: ignore[arg-type]
    assert configure() == before


def test_codec_crc32c_gives_the_published_values() -> None:
    """Vectors of RFC 3720, B.4."""
    vectors = {
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(range(31, -1, -1)): 0x113FDB5C,
        b"123456789": 0xE3069283,
        b"": 0,
    }
    for data, crc in vectors.items():
        assert _codec._crc32c(data) == _codec._crc32c(data, portable=True) == crc


def test_codec_crc32c_does_not_depend_on_the_processor() -> None:
    data = bytes(i * 7 % 251 for i in range(300))
    for start in range(9):
        for stop in range(290, 300):
            piece = data[start:stop]
            assert _codec._crc32c(piece) == _codec._crc32c(piece, portable=True)


def test_codec_round_trips_and_refusals_leak_nothing() -> None:
    values = [None, {"a": [1.5, "b", np.arange(3)]}, [np.zeros(600)] * 2, [[1], {2: (3,)}] * 2]

    def turn() -> None:
        for value in values:
            round_trip(value)
        with pytest.raises(SerializationError):
            encode(1, [np.zeros(600), [values, object()]])
        with pytest.raises(ProtocolError):
            decode(frame_with(bytes.fromhex("c102000000 e100000000 ff")))

    for _ in range(20):
        turn()
    gc.collect()
    blocks, references = sys.getallocatedblocks(), sys.getrefcount(None)
    for _ in range(300):
        turn()
    gc.collect()
    assert sys.getallocatedblocks() - blocks < 150
    assert sys.getrefcount(None) - references < 150
