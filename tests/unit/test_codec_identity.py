"""One object stays one object; cycles and endless nesting are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wire_values import frame_of, frame_with, round_trip, same

from distgrad._codec import TAGS, configure, decode, encode, register_type
from distgrad.errors import ProtocolError, SerializationError


class Point:
    def __init__(self, at: object) -> None:
        self.at = at


register_type(Point, "test.Point", lambda point, session: point.at, lambda at, session: Point(at))


@pytest.mark.parametrize(
    "make",
    [lambda: [1], lambda: {"a": 1}, lambda: {1}, lambda: (object, [1])[1:],
     lambda: frozenset([1, 2]), lambda: np.zeros(3), lambda: np.zeros(3000), lambda: Point(1)],
    ids=["list", "dict", "set", "tuple", "frozenset", "array", "buffer", "extension"],
)  # fmt: skip
def test_codec_shared_object_stays_one_object(make: Any) -> None:
    shared = make()
    first, (second, inner), third = round_trip((shared, [shared, {"k": shared}], shared))
    assert first is second is inner["k"] is third
    assert type(first) is type(shared)


def test_codec_equal_objects_stay_two_objects() -> None:
    a, b = round_trip([[1], [1]])
    assert a is not b


def test_codec_shared_array_is_sent_once() -> None:
    array = np.zeros(1000)
    assert encode(1, [array, array, array]).nbytes < 8200
    first, second = round_trip([array, array])
    assert first is second


def test_codec_many_shared_objects_are_all_found() -> None:
    shared = [[i] for i in range(5000)]
    left, right = round_trip([list(shared), list(reversed(shared))])
    assert all(a is b for a, b in zip(left, reversed(right), strict=True))
    assert [item[0] for item in left] == list(range(5000))


def test_codec_unshared_containers_leave_no_mark() -> None:
    tags = [tag for tag in frame_of([[], {}, [[]]]).meta if tag >= TAGS["tuple"]]
    assert all(tag & 0x20 == 0 for tag in tags)


def test_codec_temporary_of_a_hook_is_not_taken_for_another() -> None:
    """A freed object's address may come back within one message (invariant 2)."""
    points = [Point([i, [i]]) for i in range(500)]
    back = round_trip(points)
    assert [point.at for point in back] == [[i, [i]] for i in range(500)]


def cyclic_list() -> object:
    items: list[object] = [1]
    items.append({"again": items})
    return items


def cyclic_tuple() -> object:
    inner: list[object] = []
    outer = (inner,)
    inner.append(outer)
    return outer


def cyclic_extension() -> object:
    point = Point(None)
    point.at = [point]
    return point


@pytest.mark.parametrize("make", [cyclic_list, cyclic_tuple, cyclic_extension])
def test_codec_cycle_is_refused_with_the_path(make: Any) -> None:
    with pytest.raises(SerializationError, match=r"cannot send value\[.*it contains itself"):
        encode(1, [make()])


def nested(depth: int) -> object:
    value: object = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_codec_depth_has_a_limit_on_both_sides() -> None:
    assert same(round_trip(nested(64)), nested(64))
    with pytest.raises(SerializationError, match="deeper than 64 levels"):
        encode(1, nested(65))
    deep = frame_of(nested(20))
    old = configure(max_depth=19)
    try:
        with pytest.raises(ProtocolError, match="deeper than 19 levels"):
            decode(deep)
    finally:
        configure(**old)


def test_codec_slices_count_as_depth() -> None:
    value: object = None
    for _ in range(64):
        value = slice(value)
    assert same(round_trip(value), value)
    for _ in range(100_000):
        value = slice(value)
    with pytest.raises(SerializationError, match="deeper than 64 levels"):
        encode(1, value)


def test_codec_highest_depth_fits_on_the_stack() -> None:
    old = configure(max_depth=1000)
    try:
        back = round_trip(nested(1000))
        for _ in range(999):
            (back,) = back
        assert back == []
        keys: object = ()
        for _ in range(900):
            keys = (keys,)
        assert round_trip({keys: 1}) == {keys: 1}
    finally:
        configure(**old)


def test_codec_extension_in_keys_and_values_stays_one_object() -> None:
    point = Point(1)
    points, in_set, table = round_trip([[point], {point}, {point: point}])
    assert points[0] in in_set
    assert table[points[0]] is points[0]


def test_codec_tuple_in_keys_is_written_again() -> None:
    key = (1, (2, 3))
    table, pair = round_trip([{key: key, (key, key): 1}, key])
    assert table == {key: key, (key, key): 1}
    assert pair == key
    assert table[key] is pair


def test_codec_doubling_inside_of_keys_is_refused_by_both_sides() -> None:
    """A few tuples by reference would need 2**n steps to hash."""
    value: object = ("x",)
    for _ in range(16):
        value = (value, value)
    old = configure(max_meta_bytes=100_000)
    try:
        with pytest.raises(SerializationError, match="exceeds 100000 bytes"):
            encode(1, {value: 1})
    finally:
        configure(**old)
    by_reference = bytes.fromhex("c102000000 e001000000 01 c201000000 c001000000 ad05000000 00")
    with pytest.raises(ProtocolError, match="without identity inside a key"):
        decode(frame_with(by_reference))


def test_codec_doubling_outside_of_keys_stays_small() -> None:
    value: object = ["x"]
    for _ in range(60):
        value = [value, value]
    assert encode(1, value).nbytes < 1000
    back = round_trip(value)
    assert back[0] is back[1]
