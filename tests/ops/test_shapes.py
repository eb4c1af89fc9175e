"""Rules for any shapes: broadcasting, without dimensions, without elements."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distgrad as dg
from distgrad.testing import gradcheck

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
BROADCAST = hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=3, max_dims=4)
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, shape: tuple[int, ...]) -> dg.Tensor:
    return dg.tensor(np.random.default_rng(seed).uniform(0.5, 2.0, shape), requires_grad=True)


@pytest.mark.parametrize(
    "function", [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
)
@given(shapes=BROADCAST, seed=SEEDS)
@settings(max_examples=25)
def test_operator_broadcast_shapes_gradient_equals_differences(
    function: Callable[..., Any], shapes: Any, seed: int
) -> None:
    first, second = shapes.input_shapes
    assert gradcheck(function, (draw(seed, first), draw(seed + 1, second)))


@pytest.mark.parametrize("function", [np.sum, np.mean, np.exp, np.prod])
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=25)
def test_function_any_shape_gradient_equals_differences(
    function: Callable[..., Any], shape: tuple[int, ...], seed: int
) -> None:
    if function is np.mean and 0 in shape:
        return
    assert gradcheck(function, draw(seed, shape))


@given(data=st.data(), shape=hnp.array_shapes(min_dims=1, max_dims=4, max_side=3), seed=SEEDS)
@settings(max_examples=50)
def test_getitem_any_basic_index_gradient_equals_differences(
    data: st.DataObject, shape: tuple[int, ...], seed: int
) -> None:
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    assert gradcheck(lambda x: x[index], draw(seed, shape))


@given(shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=3), data=st.data(), seed=SEEDS)
@settings(max_examples=50)
def test_getitem_any_integer_index_gradient_equals_differences(
    data: st.DataObject, shape: tuple[int, ...], seed: int
) -> None:
    index = data.draw(hnp.integer_array_indices(shape))
    assert gradcheck(lambda x: x[index], draw(seed, shape))


@given(shape=SHAPES, seed=SEEDS, keepdims=st.booleans(), data=st.data())
@settings(max_examples=50)
def test_sum_any_axes_gradient_equals_differences(
    shape: tuple[int, ...], seed: int, keepdims: bool, data: st.DataObject
) -> None:
    axes = data.draw(
        st.lists(st.integers(0, len(shape) - 1), unique=True) if shape else st.just([])
    )
    assert gradcheck(lambda x: np.sum(x, axis=tuple(axes), keepdims=keepdims), draw(seed, shape))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
def test_gradient_any_dtype_has_that_of_its_leaf(dtype: Any) -> None:
    leaf = dg.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    other = dg.tensor([[1.5], [2.5]], dtype=np.complex128, requires_grad=True)
    np.sum(np.exp(leaf * other) / 2).backward(np.ones((), complex))
    assert (leaf.grad.dtype, leaf.grad.shape) == (dtype, (2,))
    assert (other.grad.dtype, other.grad.shape) == (np.complex128, (2, 1))


@pytest.mark.parametrize(
    "function", [np.multiply, np.true_divide, np.power, np.add, np.matmul, np.vdot]
)
def test_complex_function_gradient_equals_differences(function: Callable[..., Any]) -> None:
    random = np.random.default_rng(3)
    x, y = (
        dg.tensor(random.uniform(0.5, 1, 3) + 1j * random.uniform(0.5, 1, 3), requires_grad=True)
        for _ in range(2)
    )
    assert gradcheck(function, (x, y))


@pytest.mark.parametrize(
    "function", [np.exp, np.log, np.sqrt, np.sin, np.tanh, np.absolute, np.real, np.imag, np.angle]
)
def test_complex_unary_gradient_equals_differences(function: Callable[..., Any]) -> None:
    x = dg.tensor(np.array([0.3 + 0.7j, 1.1 - 0.4j]), requires_grad=True)
    assert gradcheck(function, x)


def test_integer_leaf_requiring_grad_raises() -> None:
    with pytest.raises(dg.GraphError, match="int64 has no gradient"):
        dg.tensor([1, 2], requires_grad=True)
