"""Whatever can be sent comes back the same."""

from __future__ import annotations

import datetime
import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from wire_values import round_trip, same

from distgrad._codec import register_record


@dataclass(frozen=True)
class Settings:
    name: object
    values: object = ()


class Pair(NamedTuple):
    left: object
    right: object


class Direction(enum.Enum):
    UP = 1
    DOWN = "down"


for cls in (Settings, Pair, Direction):
    register_record(cls, f"property.{cls.__name__}")

text = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates too
zones = st.timezones() | st.just(datetime.timezone(datetime.timedelta(minutes=-90), "half"))
times = st.one_of(
    st.dates(), st.times(), st.timedeltas(), st.datetimes(), st.datetimes(timezones=zones)
)
numbers = st.one_of(
    st.integers(),
    st.integers(-(2**700), 2**700),
    st.floats(),
    st.complex_numbers(),
    st.booleans(),
)
bounds = st.none() | st.integers(-(2**70), 2**70)
ranges = st.builds(range, st.integers(), st.integers(), st.integers().filter(bool))
keys = st.recursive(
    st.one_of(numbers, text, st.binary(), st.none(), times, st.sampled_from(Direction)),
    lambda inner: st.tuples(inner, inner) | st.builds(Pair, inner, inner) | st.frozensets(inner),
    max_leaves=4,
)

dtypes = st.one_of(
    hnp.scalar_dtypes(),
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(min_len=1),
    hnp.array_dtypes(hnp.scalar_dtypes(), max_size=3),
    hnp.nested_dtypes(max_leaves=4),
).filter(lambda dtype: dtype.subdtype is None)


@st.composite
def string_arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of strings of any length, whole, transposed or with gaps."""
    marks = draw(st.sampled_from([{}, {"na_object": None}, {"na_object": np.nan}]))
    dtype: Any = np.dtypes.StringDType(coerce=draw(st.booleans()), **marks)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    items = st.text(max_size=20) | st.sampled_from(list(marks.values()) or [""])
    array = np.empty(shape, dtype)
    for place in np.ndindex(shape):
        array[place] = draw(items)
    if draw(st.booleans()):
        array = array.T
    return array[::2] if array.ndim and draw(st.booleans()) else array


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of any dtype, byte order and shape, whole, transposed or with gaps."""
    dtype = draw(dtypes)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12))
    array = np.zeros(shape, dtype)
    if dtype.kind in "iufcmM":
        raw = np.resize(
            np.frombuffer(draw(st.binary(min_size=8, max_size=64)), np.uint8), array.nbytes
        )
        array = np.frombuffer(raw.tobytes() or b"", dtype).reshape(shape)
    if draw(st.booleans()):
        array = array.T
    if array.ndim and draw(st.booleans()):
        array = array[::2]
    return array


scalars = arrays().filter(lambda array: array.size > 0).map(lambda array: array.flat[0])
leaves = st.one_of(
    keys, scalars, arrays(), ranges, st.builds(slice, bounds, bounds, bounds), st.just(...)
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(keys, max_size=4),
        st.builds(Settings, inner, inner),
        st.lists(inner, max_size=3).map(lambda items: [items, items, (items,)]),
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(values)
def test_codec_any_value_comes_back_the_same(value: object) -> None:
    assert same(round_trip(value), value)


@given(arrays())
def test_codec_any_array_comes_back_the_same(array: np.ndarray[Any, Any]) -> None:
    back = round_trip(array)
    assert same(back, array)
    assert back.flags.writeable
    assert back.flags.aligned
    assert back.flags.f_contiguous >= (array.flags.f_contiguous and not array.flags.c_contiguous)


@given(string_arrays())
def test_codec_any_array_of_strings_comes_back_the_same(array: np.ndarray[Any, Any]) -> None:
    back = round_trip(array)
    assert same(back, array)
    assert back.flags.writeable
    assert back.flags.f_contiguous >= (array.flags.f_contiguous and not array.flags.c_contiguous)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_codec_any_sharing_comes_back_the_same(picks: list[int]) -> None:
    pool: list[list[object]] = [[] for _ in range(8)]
    for number, pick in enumerate(picks):
        pool[pick].append(pool[pick + 1] if pick < 7 and number % 3 else number)
    back = round_trip(pool)
    assert back == pool

    def pattern(lists: list[list[object]]) -> list[list[int]]:
        order = {id(items): i for i, items in enumerate(lists)}
        return [[order.get(id(item), -1) for item in items] for items in lists]

    assert pattern(back) == pattern(pool)
