"""Own loops for small arrays give NumPy's bits, dtypes and warnings."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distgrad as dg
from distgrad.ops import nn

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]
NUMBERS = st.one_of(
    st.floats(-1e6, 1e6), st.integers(-(2**60), 2**60), st.sampled_from([0, -0.0, 1e300, np.inf])
)
Function = Callable[..., Any]


def quiet(function: Function, *arguments: Any) -> Any:
    with np.errstate(all="ignore"):
        return function(*arguments)


def assert_same(tensor: dg.Tensor, array: Any) -> None:
    assert tensor.dtype == array.dtype
    assert tensor.shape == array.shape
    np.testing.assert_array_equal(tensor.detach().numpy(), array)
    np.testing.assert_array_equal(np.signbit(tensor.data), np.signbit(array))


@pytest.mark.parametrize("function", OPERATORS)
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64, np.int64, np.complex128]))
@settings(max_examples=40)
def test_operator_on_arrays_equals_numpy(function: Function, data: Any, dtype: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=4))
    first, second = (
        data.draw(hnp.arrays(dtype, shape, elements={"allow_nan": False})
                  if np.dtype(dtype).kind in "f" else hnp.arrays(dtype, shape))
        for _ in range(2)
    )  # fmt: skip
    expected = np.asarray(quiet(function, first, second))
    result = quiet(function, dg.from_numpy(first), dg.from_numpy(second))
    if expected.dtype.kind == "c":
        np.testing.assert_array_equal(result.data, expected)
    else:
        assert_same(result, expected)


@pytest.mark.parametrize("function", OPERATORS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(number=NUMBERS)
@settings(max_examples=60)
def test_operator_with_number_equals_numpy(function: Function, dtype: Any, number: Any) -> None:
    array = np.array([0.1, -2.5, 3e5], dtype)
    tensor = dg.from_numpy(array)
    assert_same(quiet(function, tensor, number), quiet(function, array, number))
    assert_same(quiet(function, number, tensor), quiet(function, number, array))


@pytest.mark.parametrize(
    ("function", "value"),
    [(lambda t: t / 0.0, 1.0), (lambda t: t * t, 1e200), (lambda t: t - t, np.inf)],
)
def test_operator_exception_follows_errstate(function: Function, value: float) -> None:
    tensor = dg.tensor([value])
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        function(tensor)
    with np.errstate(all="ignore"):
        function(tensor)


@pytest.mark.parametrize("layout", [lambda a: a[::2], lambda a: a.T, lambda a: a[:, ::-1]])
def test_operator_on_strided_arrays_equals_numpy(layout: Function) -> None:
    array = layout(np.arange(36.0).reshape(6, 6))
    assert_same(dg.from_numpy(array) * dg.from_numpy(array), array * array)


def test_operator_on_swapped_bytes_equals_numpy() -> None:
    array = np.arange(4.0).astype(">f8")
    assert (dg.from_numpy(array) * dg.from_numpy(array)).tolist() == [0.0, 1.0, 4.0, 9.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "function",
    [
        *(lambda x: x * x, lambda x: x / 3.0, lambda x: 3.0 / x, lambda x: 1.0 - x, lambda x: -x),
        *(np.exp, np.tanh, np.sqrt, np.square, nn.relu, nn.sigmoid),
    ],
)
def test_gradient_of_small_equals_that_of_large(function: Function, dtype: Any) -> None:
    values = np.linspace(0.1, 2.0, 8, dtype=dtype)
    small = dg.tensor(values, requires_grad=True)
    large = dg.tensor(np.tile(values, 1000), requires_grad=True)
    function(small).sum().backward()
    function(large).sum().backward()
    assert small.grad.dtype == dtype
    expected = large.grad.numpy().reshape(1000, 8)[0]
    np.testing.assert_allclose(small.grad.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sum_equals_numpy_to_the_bit(dtype: Any) -> None:
    random = np.random.default_rng(3)
    shapes = [(n,) for n in (*range(140), 255, 777, 1024, 1025)] + [(), (3, 5), (31, 33), (0, 4)]
    for shape in shapes:
        array = np.asarray(random.standard_normal(shape), dtype)
        assert_same(dg.from_numpy(array).sum(), array.sum())


def test_sum_that_overflows_warns_as_numpy() -> None:
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert dg.tensor([1e308, 1e308]).sum().item() == np.inf


@pytest.mark.parametrize("n", [1, 7, 16, 1000, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accumulated_gradients_equal_sums(n: int, dtype: Any) -> None:
    first, second = np.random.default_rng(4).standard_normal((2, n)).astype(dtype)
    x = dg.tensor(np.zeros(n, dtype), requires_grad=True)
    for part in (first, second, first):
        x.backward(part)
    np.testing.assert_array_equal(x.grad.data, first + second + first)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accumulation_into_any_place_touches_nothing_else(dtype: Any) -> None:
    for place, n in itertools.product(range(17), (0, 1, 5, 40, 100)):
        around = np.arange(place + n + 3, dtype=dtype)
        expected = around.copy()
        expected[place : place + n] += 0.5
        x = dg.tensor(np.zeros(n, dtype), requires_grad=True)
        x.grad = dg.from_numpy(around[place : place + n])
        x.backward(np.full(n, 0.5, dtype))
        np.testing.assert_array_equal(around, expected)


def test_gradient_that_overlaps_the_sum_is_added_as_if_apart() -> None:
    x = dg.tensor(np.zeros(4), requires_grad=True)
    x.backward(np.arange(4.0))
    x.backward(x.grad.data[::-1])
    assert x.grad.tolist() == [3.0, 3.0, 3.0, 3.0]


BIG = (300, 400)  # more than is filled with one number

SCALED = {
    "times": lambda x: x * 2.5,
    "by_int": lambda x: 3 * x,
    "by_array_without_axes": lambda x: x * np.float32(0.1),
    "over": lambda x: x / 3.0,
    "negative": lambda x: -x,
    "from": lambda x: 2.0 - x,
    "mixed": lambda x: -((x * 3.0) / 7.0) * 0.1,
}
REDUCED = {
    "all": lambda y: y.sum(),
    "rows": lambda y: (y.sum(axis=0) * np.arange(400.0)).sum(),
    "columns": lambda y: (y.sum(axis=1, keepdims=True) * np.arange(300.0)[:, None]).sum(),
    "mean": lambda y: y.mean(),
    "and_dense": lambda y: y.sum() + (y * np.linspace(0.0, 1.0, 400)).sum(),
}


@pytest.mark.parametrize("reduced", REDUCED)
@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_gradients_that_repeat_stay_exact(scaled: str, reduced: str, dtype: type) -> None:
    x = dg.tensor(np.ones(BIG, dtype), requires_grad=True)
    REDUCED[reduced](SCALED[scaled](x)).backward()
    y = dg.tensor(np.ones(BIG, dtype), requires_grad=True)
    middle = SCALED[scaled](y)
    REDUCED[reduced](middle * np.ones(BIG, dtype)).backward()  # makes them dense on the way
    assert x.grad.dtype == dtype
    np.testing.assert_array_equal(np.asarray(x.grad), np.asarray(y.grad))
    x.grad[0, 0] = -1e6  # the leaf's own
    assert np.count_nonzero(np.asarray(x.grad) == -1e6) == 1
