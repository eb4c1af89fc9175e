"""Registered types, records and tensors."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from wire_values import frame_of, frame_with, round_trip, same

from distgrad._codec import (
    decode,
    encode,
    register_record,
    register_type,
    set_tensor_type,
)
from distgrad.errors import DistgradError, ProtocolError, SerializationError


class Handle:
    def __init__(self, number: object) -> None:
        self.number = number


def lookup(value: Any, session: Any) -> Handle:
    if isinstance(value, str) and value == "gone":
        raise DistgradError("cannot find handle: it is gone")
    return Handle(session[value] if session else value)


register_type(Handle, "test.Handle", lambda handle, session: handle.number, lookup)


def test_codec_registered_type_travels_as_its_value() -> None:
    assert round_trip(Handle(5)).number == 5
    assert round_trip([Handle(np.arange(3))])[0].number.sum() == 3
    assert round_trip(Handle(Handle("inner"))).number.number == "inner"


def test_codec_session_reaches_the_hooks() -> None:
    frame = frame_of(Handle("a"), None)
    assert decode(frame, {"a": 7}).number == 7


def test_codec_subclass_of_a_registered_type_is_refused() -> None:
    class Special(Handle):
        pass

    with pytest.raises(SerializationError, match="Special"):
        encode(1, Special(1))


def test_codec_error_of_a_decode_hook_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="KeyError") as caught:
        decode(frame_of(Handle("b")), {"a": 7})
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(DistgradError, match="it is gone") as own:
        decode(frame_of(Handle("gone")), {"a": 7})
    assert not isinstance(own.value, ProtocolError)


def test_codec_error_of_an_encode_hook_comes_through() -> None:
    class Broken:
        pass

    register_type(Broken, "test.Broken", lambda obj, session: 1 // 0, lambda value, session: value)
    with pytest.raises(ZeroDivisionError):
        encode(1, [Broken()])
    assert round_trip([1]) == [1]


def test_codec_name_of_a_type_belongs_to_one_class() -> None:
    class Other:
        pass

    with pytest.raises(ValueError, match="belongs to Handle"):
        register_type(Other, "test.Handle", lambda obj, session: 1, lambda value, session: value)
    register_type(Handle, "test.Handle", lambda handle, session: handle.number, lookup)


@dataclass
class Options:
    name: str
    sizes: list[int]
    rate: float = 0.5
    extra: dict[str, int] = field(default_factory=dict)
    seen: int = field(default=3, init=False)

    def __post_init__(self) -> None:
        self.sizes = [*self.sizes, 0]


@dataclass(frozen=True, slots=True)
class Frozen:
    key: tuple[int, ...]


class Size(NamedTuple):
    rows: int
    columns: int = 1


class Color(enum.Enum):
    RED = object()
    GREEN = 2
    LIME = GREEN


class Mode(enum.IntFlag):
    READ = 1
    WRITE = 2


for number, cls in enumerate((Options, Frozen, Size, Color, Mode)):
    register_record(cls, f"test.record{number}")


def test_codec_dataclass_travels_without_its_constructor() -> None:
    options = Options("a", [1, 2], extra={"k": 1})
    options.seen = 9
    assert round_trip(options) == options
    assert round_trip([Frozen((1, 2))]) == [Frozen((1, 2))]
    assert round_trip({Frozen((1,)): 1}) == {Frozen((1,)): 1}


def test_codec_named_tuple_keeps_its_class() -> None:
    assert same(round_trip([Size(3, 4)]), [Size(3, 4)])
    assert same(round_trip(Size(3, 4)), Size(3, 4))


def test_codec_enum_member_is_the_same_object() -> None:
    assert round_trip(Color.RED) is Color.RED
    assert round_trip([Color.LIME, Color.LIME])[1] is Color.GREEN
    assert round_trip(Mode.READ | Mode.WRITE) is Mode.READ | Mode.WRITE
    assert same(round_trip({Mode.READ: Mode(0)}), {Mode.READ: Mode(0)})


def record(name: str, *values: object) -> Any:
    """Return what arrives for a record with these values."""
    parts = [frame_of(name).meta, *(frame_of(value).meta for value in values)]
    return decode(frame_with(b"\xc9" + len(values).to_bytes(4, "little") + b"".join(parts)))


def test_codec_record_of_an_older_sender_takes_defaults() -> None:
    assert vars(record("test.record0", "a", [1])) == {
        "name": "a",
        "sizes": [1],
        "rate": 0.5,
        "extra": {},
        "seen": 3,
    }
    assert record("test.record2", 5) == Size(5, 1)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("test.record0", ["a"], "the field 'sizes' is missing"),
        ("test.record0", ["a", [], 1.0, {}, 1, 2], "has fewer fields here"),
        ("test.record2", [], "KeyError"),
        ("test.record3", ["BLUE"], "KeyError"),
        ("test.record3", [2], "no member"),
        ("test.record3", [], "ValueError"),
        ("test.record4", ["NONE"], "KeyError"),
        ("test.record4", [2.5], "no member"),
        ("test.Handle", [1], "not exposed here"),
    ],
)
def test_codec_record_that_does_not_fit_is_refused(
    name: str, values: list[object], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        record(name, *values)


def test_codec_path_goes_through_fields() -> None:
    options = Options("a", [1])
    options.extra["lock"] = len  # type: ignore[assignment]
    with pytest.raises(SerializationError, match=r"^cannot send value\[0\]\.extra\['lock'\]:"):
        encode(1, [options])
    with pytest.raises(SerializationError, match=r"^cannot send value\[0\]\.columns:"):
        encode(1, [Size(1, len)])  # type: ignore[arg-type]
    del options.name
    with pytest.raises(SerializationError, match="the field 'name' is not set"):
        encode(1, options)


def test_codec_unregistered_record_is_refused_with_a_hint() -> None:
    @dataclass
    class Unknown:
        x: int = 1

    with pytest.raises(SerializationError, match="Unknown") as caught:
        encode(1, Unknown())
    assert "expose its class" in str(caught.value)


@dataclass
class WithNew:
    x: int

    def __new__(cls, x: int) -> WithNew:
        return super().__new__(cls)


class NotARecord:
    pass


@pytest.mark.parametrize(
    "cls", [NotARecord, int, Options("a", []), dataclass(type("E", (Exception,), {}))]
)
def test_codec_other_classes_are_no_records(cls: Any) -> None:
    with pytest.raises(TypeError):
        register_record(cls, "test.none")


class Leaf:
    def __init__(self, data: Any, requires_grad: bool = False, slot: int = -1) -> None:
        self.data, self.requires_grad, self.slot = data, requires_grad, slot


@pytest.fixture
def leaves() -> Iterator[None]:
    """Make `Leaf` the class of the tensors."""

    def unwrap(leaf: Leaf, session: Any) -> tuple[Any, bool, int]:
        return leaf.data, leaf.requires_grad, leaf.slot

    old = set_tensor_type(Leaf, unwrap, lambda *parts: Leaf(*parts[:3]))
    yield
    set_tensor_type(*old)


@pytest.mark.usefixtures("leaves")
@pytest.mark.parametrize("size", [3, 3000])
def test_codec_tensor_travels_through_its_hooks(size: int) -> None:
    leaf = Leaf(np.arange(float(size)), True, 7)
    back = round_trip({"w": leaf})["w"]
    assert (back.requires_grad, back.slot) == (True, 7)
    assert same(back.data, leaf.data)


@pytest.mark.usefixtures("leaves")
def test_codec_tensor_stays_one_object_in_keys_and_values() -> None:
    leaf, other = Leaf(np.zeros(2)), Leaf(np.zeros(2))
    params, grads = round_trip([[leaf, other], {leaf: other}])
    assert grads[params[0]] is params[1]


@pytest.mark.usefixtures("leaves")
def test_codec_array_of_two_tensors_stays_one_array() -> None:
    data = np.zeros(1000)
    first, second, plain = round_trip([Leaf(data), Leaf(data), data])
    assert first.data is second.data is plain


@pytest.mark.usefixtures("leaves")
def test_codec_subclass_of_tensor_arrives_as_tensor() -> None:
    class Parameter(Leaf):
        pass

    assert type(round_trip(Parameter(np.zeros(2)))) is Leaf


@pytest.mark.usefixtures("leaves")
def test_codec_tensors_inside_tensors_are_refused() -> None:
    with pytest.raises(ProtocolError, match="deeper than 64 levels"):
        decode(frame_with(bytes.fromhex("c701ffffffff") * 100_000))
    with pytest.raises(ProtocolError, match="without an array"):
        decode(frame_with(bytes.fromhex("c701ffffffff 00")))


@pytest.mark.usefixtures("leaves")
def test_codec_tensor_without_an_array_is_refused() -> None:
    with pytest.raises(SerializationError, match=r"builtins\.list"):
        encode(1, Leaf([1]))
    with pytest.raises(SerializationError, match="dtype object"):
        encode(1, Leaf(np.zeros(2, object)))
