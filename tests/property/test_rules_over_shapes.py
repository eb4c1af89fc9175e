"""Gradients of first and second order over drawn shapes, broadcasting, dtypes and axes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drawn_rules import CASES, PAIRS, REAL_ONLY, Drawn, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distgrad as dg
from distgrad._core import Op, registered
from distgrad.ops import nn
from distgrad.testing import gradcheck, gradgradcheck

Function = Callable[..., Any]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
SEEDS = st.integers(0, 2**16)

# Where each is smooth: an interval that all of them share.
UNARY: list[Function] = [
    *(np.negative, np.positive, np.square, np.reciprocal, np.exp, np.exp2, np.expm1, np.log),
    *(np.log2, np.log10, np.log1p, np.sqrt, np.sin, np.cos, np.tan, np.arcsin, np.arccos),
    *(np.arctan, np.sinh, np.cosh, np.tanh, np.arcsinh, np.arctanh, np.absolute, np.conjugate),
    *(np.sinc, np.cbrt, np.degrees, np.radians, np.fabs, np.nan_to_num, np.copy),
    *(np.rad2deg, np.deg2rad, np.real, nn.relu, nn.sigmoid, nn.softplus, nn.gelu),
]
# All but those for which NumPy has no complex loop.
NO_COMPLEX_UNARY: list[Function] = [
    *(np.cbrt, np.degrees, np.radians, np.rad2deg, np.deg2rad, np.fabs, nn.softplus),
]
COMPLEX_UNARY: list[Function] = [
    *(f for f in UNARY if f not in NO_COMPLEX_UNARY),
    *(np.imag, np.sign),
]
BINARY: list[Function] = [
    *(np.add, np.subtract, np.multiply, np.true_divide, np.power, np.float_power, np.hypot),
    *(np.arctan2, np.logaddexp, np.logaddexp2, np.maximum, np.minimum, np.fmax, np.fmin),
    *(np.remainder, np.fmod),
]
# Their gradient is zero and depends on nothing, so it is not recorded. What is checked to the
# second order is their product with the argument.
STEPS: list[Function] = [np.sign, np.floor, np.ceil, np.trunc, np.rint, np.round, np.imag]
COMPLEX_BINARY: list[Function] = [
    *(np.add, np.subtract, np.multiply, np.true_divide, np.power, np.float_power),
    *(np.maximum, np.minimum, np.fmax, np.fmin),
]
REDUCTIONS: list[Function] = [
    *(np.sum, np.mean, np.var, np.prod, np.max, np.min, np.amax, np.amin, nn.logsumexp),
    *(np.add.reduce, np.multiply.reduce, np.maximum.reduce, np.minimum.reduce, np.linalg.norm),
]


def check(function: Function, *arguments: dg.Tensor) -> None:
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments, atol=1e-4)


@pytest.mark.parametrize("function", UNARY, ids=lambda f: getattr(f, "__name__", "op"))
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=6)
def test_unary_rules_hold_for_any_shape(function: Function, shape: Any, seed: int) -> None:
    check(function, draw(seed, shape))


@pytest.mark.parametrize("function", COMPLEX_UNARY, ids=lambda f: getattr(f, "__name__", "op"))
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=4)
def test_unary_rules_hold_for_complex_values(function: Function, shape: Any, seed: int) -> None:
    check(function, draw(seed, shape, complex_valued=True))


@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.__name__)
@given(shapes=PAIRS, seed=SEEDS)
@settings(max_examples=8)
def test_binary_rules_hold_under_broadcasting(function: Function, shapes: Any, seed: int) -> None:
    first, other = shapes.input_shapes
    check(function, draw(seed, first), draw(seed + 1, other))


@pytest.mark.parametrize("function", COMPLEX_BINARY, ids=lambda f: f.__name__)
@given(shapes=PAIRS, seed=SEEDS, mixed=st.booleans())
@settings(max_examples=5)
def test_binary_rules_hold_for_complex_values(
    function: Function, shapes: Any, seed: int, mixed: bool
) -> None:
    first, other = shapes.input_shapes
    check(
        function,
        draw(seed, first, complex_valued=True),
        draw(seed + 1, other, complex_valued=not mixed),
    )


@pytest.mark.parametrize("function", REDUCTIONS, ids=lambda f: getattr(f, "__name__", "op"))
@given(data=st.data(), seed=SEEDS, keepdims=st.booleans(), complex_valued=st.booleans())
@settings(max_examples=12)
def test_reductions_hold_for_any_axes(
    function: Function, data: Any, seed: int, keepdims: bool, complex_valued: bool
) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=3))
    axis = data.draw(st.one_of(st.none(), hnp.valid_tuple_axes(len(shape), min_size=1)))
    x = draw(seed, shape, complex_valued=complex_valued)
    check(lambda x: function(x, axis=axis, keepdims=keepdims), x)


@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=15)
def test_sum_of_empty_and_0d_arrays_has_a_gradient(shape: Any, seed: int) -> None:
    check(lambda x: x.sum(), draw(seed, shape))
    check(lambda x: x.reshape(-1), draw(seed, shape))


@pytest.mark.parametrize("function", STEPS, ids=lambda f: f.__name__)
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=4)
def test_steps_hold_for_any_shape(function: Function, shape: Any, seed: int) -> None:
    x = draw(seed, shape)
    assert gradcheck(function, x)
    check(lambda x: x * function(x), x)


@pytest.mark.parametrize("name", sorted(CASES))
@given(data=st.data(), seed=SEEDS, complex_valued=st.booleans())
@settings(max_examples=8)
def test_rules_hold_for_any_shape(name: str, data: Any, seed: int, complex_valued: bool) -> None:
    drawn = Drawn(data, seed, complex_valued and name not in REAL_ONLY)
    function, *arguments = CASES[name](drawn)
    check(function, *arguments)


def name_of(key: Any) -> str:
    """Return what errors and test identifiers call a registered function."""
    if isinstance(key, tuple):
        return f"{key[0].__name__}.{key[1]}"
    return getattr(key, "__name__", str(key))


def test_every_registered_rule_is_drawn() -> None:
    functions = [*UNARY, *BINARY, *STEPS, *REDUCTIONS]
    drawn = {*CASES, *(f.name if isinstance(f, Op) else f.__name__ for f in functions)}
    drawn |= {f"{ufunc.__name__}.reduce" for ufunc in (np.add, np.multiply, np.maximum, np.minimum)}
    left = {
        name_of(key)
        for key, implementation in registered().items()
        if not (isinstance(implementation, Op) and not implementation.has_rules)
        and not {name_of(key), getattr(implementation, "name", "")} & drawn
    }
    assert left == set()


@given(data=st.data(), seed=SEEDS)
@settings(max_examples=40)
def test_indexing_holds_for_any_index(data: Any, seed: int) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=3))
    index = data.draw(
        st.one_of(
            hnp.basic_indices(shape, allow_newaxis=True),
            hnp.integer_array_indices(shape),
            hnp.arrays(bool, shape),
        )
    )
    check(operator.itemgetter(index), draw(seed, shape))


@given(dtype=st.sampled_from([np.float16, np.float32, np.complex64]), shapes=PAIRS, seed=SEEDS)
@settings(max_examples=20)
def test_gradients_have_dtype_and_shape_of_their_leaves(dtype: Any, shapes: Any, seed: int) -> None:
    first, other = shapes.input_shapes
    narrow = dg.tensor(draw(seed, first).data.astype(dtype), requires_grad=True)
    wide = draw(seed, other)
    (narrow * wide + narrow).sum().real.backward()
    assert (narrow.grad.dtype, narrow.grad.shape) == (narrow.dtype, first)
    assert (wide.grad.dtype, wide.grad.shape) == (wide.dtype, other)


WRONG: list[tuple[str, Function]] = [
    ("factor", lambda g, ans, x: g * 2.0001 * x * 1.01),
    ("sign", lambda g, ans, x: -2 * g * x),
    ("nothing", lambda g, ans, x: np.zeros_like(g)),
    ("one element", lambda g, ans, x: g * 2 * x + (np.arange(g.size).reshape(g.shape) == 1) * 0.01),
    ("nan", lambda g, ans, x: g * np.nan),
]


@pytest.mark.parametrize("rule", [rule for _, rule in WRONG], ids=[name for name, _ in WRONG])
@given(shape=hnp.array_shapes(min_dims=1, max_dims=2, min_side=2, max_side=3), seed=SEEDS)
@settings(max_examples=8)
def test_checker_finds_wrong_rules(rule: Function, shape: Any, seed: int) -> None:
    @dg.primitive
    def square(x: Any) -> Any:
        return x * x

    square.defvjp(rule)
    with pytest.raises(AssertionError, match="cannot confirm the gradient of input 0"):
        gradcheck(square, draw(seed, shape))


def test_checker_finds_a_wrong_second_derivative() -> None:
    @dg.primitive
    def cube(x: Any) -> Any:
        return x**3

    cube.defvjp(lambda g, ans, x: g * 3 * dg.tensor(x.data if hasattr(x, "grad_fn") else x) ** 2)
    assert gradcheck(lambda x: cube(x), draw(0, (2,)))
    with pytest.raises(AssertionError):
        gradgradcheck(lambda x: cube(x), draw(0, (2,)))


def test_sinc_at_zero_has_the_derivatives_of_its_parabola() -> None:
    assert gradcheck(np.sinc, dg.zeros(1, requires_grad=True))
    x = dg.zeros(1, requires_grad=True)
    slope = dg.grad(np.sinc(x).sum(), x, create_graph=True)[0]
    assert slope.item() == 0
    assert dg.grad(slope.sum(), x)[0].item() == pytest.approx(-(np.pi**2) / 3)
