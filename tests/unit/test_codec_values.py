"""Plain values come back as they were: same type, same bits."""

from __future__ import annotations

import datetime
import io
import zoneinfo
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
from wire_values import frame_of, frame_with, round_trip, same, whole

from distgrad._codec import decode, encode, parse, register_type
from distgrad.errors import ProtocolError, SerializationError

VALUES: list[Any] = [
    *(None, True, False, ...),
    *(0, 1, 127, 128, -1, 2**31, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**4000, -(2**4000)),
    *(0.0, -0.0, 2.5, float("inf"), -float("inf"), float("nan"), 5e-324),
    *(0j, complex(1, -0.0), complex(float("nan"), float("inf"))),
    *("", "a", "x" * 31, "x" * 32, "é", "日本語" * 20, "😀" * 8, "nul\0", "\ud800", "\udcff" * 40),
    *(b"", b"a", b"\0\xff" * 100, b"x" * 5000),
    *((), (1,), [], [[], ()], {}, {"a": {"b": [1, {"c": None}]}}),
    *({1: "a", "1": 2, (1, (2, b"x")): [3], None: 4, 2.5: 5, frozenset({1}): 6},),
    *(set(), {1, "a", (2, 3)}, frozenset(), frozenset({frozenset({1}), "b"})),
    *(range(0), range(5), range(10, -3, -2), range(2**70, 2**70 + 5)),
    *(slice(None), slice(1, None, -2), slice("a", [1], 2.5)),
    *((slice(1), ..., None, 3),),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value!r:.40}")
def test_codec_plain_value_comes_back_the_same(value: object) -> None:
    assert same(round_trip(value), value)


def test_codec_value_inside_containers_comes_back_the_same() -> None:
    assert same(
        round_trip([VALUES, tuple(VALUES), {"all": VALUES}]),
        [VALUES, tuple(VALUES), {"all": VALUES}],
    )


TIMES: list[Any] = [
    datetime.date(2024, 2, 29),
    datetime.time(23, 59, 58, 999_999),
    datetime.time(1, 2, fold=1),
    datetime.datetime(1, 1, 1),
    datetime.datetime(2024, 10, 27, 2, 30, 1, 5, fold=1),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    datetime.datetime(9999, 12, 31, tzinfo=datetime.timezone(datetime.timedelta(hours=-5), "EST")),
    datetime.timedelta(-5, 3, 7),
    datetime.UTC,
    datetime.timezone(datetime.timedelta(minutes=330)),
    datetime.timezone(datetime.timedelta(0), "GMT"),
    zoneinfo.ZoneInfo("America/Argentina/Buenos_Aires"),
    datetime.time(1, 2, tzinfo=zoneinfo.ZoneInfo("Etc/GMT+3")),
    datetime.datetime(2024, 10, 27, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Paris"), fold=1),
]


@pytest.mark.parametrize("value", TIMES, ids=str)
def test_codec_datetime_comes_back_the_same(value: Any) -> None:
    back = round_trip(value)
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_codec_small_values_take_one_byte() -> None:
    def meta_of(value: object) -> bytes:
        return frame_of(value).meta

    assert [len(meta_of(value)) for value in (0, 127, None, True, "")] == [1] * 5
    assert meta_of("abc") == b"\x83abc"
    assert meta_of("x" * 31)[0] == 0x9F


@pytest.mark.parametrize("number", [np.longdouble(1.5), np.clongdouble(2 - 1j)], ids=repr)
def test_codec_long_double_takes_nothing_along_that_lay_in_memory(number: Any) -> None:
    """An x87 number has 80 bits in an item of 128."""
    if np.finfo(np.longdouble).nmant != 63:
        pytest.skip("long doubles have no holes here")
    item = np.longdouble().itemsize
    for _ in range(20):
        np.full(number.itemsize, 0xAB, np.uint8)  # litter: NumPy uses its memory again
        meta = frame_of(number).meta[-number.itemsize :]
        assert all(not any(meta[at + 10 : at + item]) for at in range(0, len(meta), item))


def test_codec_short_string_cache_never_mixes_strings_up() -> None:
    texts = [
        f"{prefix}{i}" for prefix in ("a", "abcdefgh", "abcdefghijklmnopqrs") for i in range(3000)
    ]
    assert round_trip(texts) == texts
    assert round_trip(texts[::-1]) == texts[::-1]


def test_codec_empty_and_zero_strings_differ() -> None:
    assert round_trip(["", "\0", "\0\0"]) == ["", "\0", "\0\0"]


class Pair(NamedTuple):
    left: object
    right: object


def test_codec_named_tuple_at_the_top_is_a_plain_tuple() -> None:
    assert same(round_trip(Pair(1, [2])), (1, [2]))


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [object(), len, int, OrderedDict(), Text("a"), [Pair(1, 2)], bytearray(b"a"), memoryview(b"a")],
    ids=lambda value: type(value).__name__,
)
def test_codec_value_without_a_form_is_refused(value: object) -> None:
    with pytest.raises(SerializationError, match="has no form on the wire"):
        encode(1, value)


class Zone(zoneinfo.ZoneInfo):
    pass


def test_codec_subclass_of_time_zone_is_refused_with_the_path() -> None:
    with pytest.raises(SerializationError, match=r"value\[0\]: a value of type .*Zone has no form"):
        encode(1, [Zone("UTC")])


def test_codec_time_zone_travels_once() -> None:
    zone = zoneinfo.ZoneInfo("Europe/Paris")
    days = [datetime.datetime(2024, month, 1, tzinfo=zone) for month in range(1, 13)]
    back = round_trip({"days": days, zone: 1})
    assert back == {"days": days, zone: 1}
    assert {id(day.tzinfo) for day in back["days"]} == {id(next(reversed(back)))}
    assert frame_of(days).meta.count(b"Europe/Paris") == 1


@pytest.mark.parametrize("key", [None, "Europe/Paris"])
def test_codec_time_zone_of_a_file_is_refused_with_the_path(key: str | None) -> None:
    """Its rules are those of the file, and nobody else may have them."""
    header = b"TZif" + bytes(16 + 4 * 4) + b"\0\0\0\1" + b"\0\0\0\4"
    zone = zoneinfo.ZoneInfo.from_file(io.BytesIO(header + b"\0\0\x0e\x10\0\0CET\0"), key=key)
    when = datetime.datetime(2024, 1, 1, tzinfo=zone)
    assert when.utcoffset() == datetime.timedelta(hours=1)
    with pytest.raises(
        SerializationError, match=r"value\[0\]\['at'\].*: a time zone .* a file"
    ) as caught:
        encode(1, [{"at": when}])
    assert "by its key" in str(caught.value)


def zone_frame(key: object) -> Any:
    return frame_with(b"\xc8" + frame_of("zoneinfo").meta + frame_of(key).meta)


def test_codec_time_zone_that_is_unknown_here_fails_the_message_only() -> None:
    """It is no fault of the peer: a `SerializationError` leaves the connection alone."""
    with pytest.raises(SerializationError, match="'Europe/Atlantis' is not known here") as caught:
        decode(zone_frame("Europe/Atlantis"))
    assert "tzdata" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        *("", "/etc/passwd", "../UTC", "Europe/../UTC", "Europe//Paris", "a.b", "UTC\0", "é"),
        *("x" * 256, b"UTC", 1),
    ],
)
def test_codec_text_that_is_no_key_is_never_looked_up(
    key: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoneinfo, "ZoneInfo", None)
    with pytest.raises(ProtocolError, match="the key of a time zone"):
        decode(zone_frame(key))


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "value"),
        ([1, object()], r"value\[1\]"),
        ((0, {"model": [object()]}), r"value\[1\]\['model'\]\[0\]"),
        ({("a", len): 1}, r"value\.keys\(\)\[1\]"),
        ({1, len}, r"value\{\.\.\.\}"),
        (Pair(1, ([], {"x": object()})), r"right\[1\]\['x'\]"),
        ([{2: {"long key " * 10: len}}], r"value\[0\]\[2\]\['long key "),
    ],
)
def test_codec_refusal_names_the_path(value: object, path: str) -> None:
    with pytest.raises(SerializationError, match=f"^cannot send {path}"):
        encode(1, value)


def test_codec_deep_path_is_shortened() -> None:
    value: object = object()
    for _ in range(60):
        value = {"a long key": value}
    with pytest.raises(SerializationError) as caught:
        encode(1, value)
    assert len(caught.value.message) < 400
    assert " ... " in caught.value.message


def test_codec_int_of_many_bytes_is_refused() -> None:
    assert round_trip(2 ** (8 * 65535)) == 2 ** (8 * 65535)
    with pytest.raises(SerializationError, match="65537 bytes"):
        encode(1, 2 ** (8 * 65536))


def test_codec_changing_list_is_noticed() -> None:
    class Grower:
        def __init__(self, items: list[object]) -> None:
            self.items = items

    def grow(grower: Grower, session: object) -> object:
        grower.items.append(1)
        return None

    register_type(Grower, "test.Grower", grow, lambda value, session: value)
    items: list[object] = []
    items.append(Grower(items))
    with pytest.raises(SerializationError, match="changed while it was written"):
        encode(1, items)


def test_codec_frame_is_decoded_the_same_twice() -> None:
    frame = frame_of([1, "a", {"b": 2.5}])
    assert decode(frame) == decode(frame) == [1, "a", {"b": 2.5}]


def test_codec_value_that_ends_early_or_late_is_refused() -> None:
    whole_frame = whole(encode(1, "abc"))
    with pytest.raises(ProtocolError):
        parse(whole_frame[:-1])
    with pytest.raises(ProtocolError):
        parse(whole_frame + b"\0")


def test_codec_large_container_round_trips() -> None:
    value = {i: [float(i), str(i)] for i in range(20_000)}
    assert round_trip(value) == value


def test_codec_numpy_scalar_keeps_type_and_dtype() -> None:
    scalars = [
        *(np.float32(1.5), np.float64(-0.0), np.int8(-1), np.uint64(2**64 - 1), np.bool_(True)),
        *(np.float16(2), np.complex64(1 + 2j), np.longdouble("1.25"), np.clongdouble(1j)),
        *(np.str_("né"), np.str_(""), np.bytes_(b"ab"), np.bytes_(b"")),
        *(
            np.datetime64("2024-01-01T00:00:01.5"),
            np.timedelta64(3, "D"),
            np.datetime64("NaT", "s"),
        ),
        *(np.void(b"xyz"), np.zeros((), [("a", "<i4"), ("b", ">f8", (2,))])[()]),
    ]
    for scalar in scalars:
        back = round_trip(scalar)
        assert same(back, scalar), scalar


def test_codec_numpy_scalar_subclass_is_refused() -> None:
    class Celsius(np.float64):
        pass

    with pytest.raises(SerializationError, match="Celsius"):
        encode(1, Celsius(3))
