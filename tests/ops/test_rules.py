"""Every registered function has a gradient check, of first and second order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad._core import Op, Tensor, registered
from distgrad.ops import indexing, nn
from distgrad.testing import gradcheck, gradgradcheck

RANDOM = np.random.default_rng(7)
Case = tuple[Callable[..., Any], tuple[Any, ...]]


def real(*shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    return dg.tensor(RANDOM.uniform(low, high, shape), requires_grad=True)


def positive(*shape: int) -> Tensor:
    return real(*shape, low=0.4, high=2.0)


def inside(*shape: int) -> Tensor:
    """Inside (-1, 1)."""
    return real(*shape, low=-0.8, high=0.8)


def above(*shape: int) -> Tensor:
    return real(*shape, low=1.2, high=3.0)


def distinct(*shape: int) -> Tensor:
    """No two elements closer than differences can tell apart."""
    count = int(np.prod(shape))
    return dg.tensor((RANDOM.permutation(count) - count / 2 + 0.3).reshape(shape) / 3,
                     requires_grad=True)  # fmt: skip


def matrix(n: int) -> Tensor:
    return dg.tensor(np.eye(n) * 2 + RANDOM.uniform(-0.5, 0.5, (n, n)), requires_grad=True)


def spd(x: Any) -> Any:
    return x @ x.T + np.eye(x.shape[0])


MASK = np.array([[True, False, True], [False, True, True]])
LABELS = np.array([2, 0, 2, 1])
UNARY: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((np.negative, np.positive, np.square, np.exp, np.exp2, np.expm1), real),
    **dict.fromkeys((np.sin, np.cos, np.arctan, np.sinh, np.cosh, np.tanh, np.arcsinh), real),
    **dict.fromkeys((np.degrees, np.rad2deg, np.radians, np.deg2rad, np.conjugate), real),
    **dict.fromkeys((np.real, np.imag, np.sinc, np.nan_to_num, np.copy), real),
    **dict.fromkeys((np.reciprocal, np.log, np.log2, np.log10, np.log1p, np.sqrt), positive),
    **dict.fromkeys((np.cbrt, np.angle), positive),
    **dict.fromkeys((np.absolute, np.fabs, np.sign, np.floor, np.ceil), distinct),
    **dict.fromkeys((np.trunc, np.rint, np.round), distinct),
    **dict.fromkeys((np.tan, np.arcsin, np.arccos, np.arctanh), inside),
    np.arccosh: above,
}
BINARY: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((np.add, np.subtract, np.multiply, np.logaddexp, np.logaddexp2), real),
    **dict.fromkeys((np.true_divide, np.power, np.float_power, np.hypot), positive),
    **dict.fromkeys((np.maximum, np.minimum, np.fmax, np.fmin, np.arctan2), distinct),
    **dict.fromkeys((np.remainder, np.fmod), positive),
}
CASES: dict[Any, list[Case]] = {
    np.copysign: [(lambda x: np.copysign(x, [1.0, -1.0, -1.0]), (distinct(3),))],
    np.clip: [(lambda x: np.clip(x, -0.5, 0.9), (distinct(3, 4),)),
              (lambda x: x.clip(max=0.2), (distinct(5),))],
    "__call__": [
        (lambda x, y: np.multiply(x, y, where=MASK), (real(2, 3), real(3))),
        (lambda x: np.exp(x, dtype=np.complex128).real, (real(3),)),
        (lambda x: np.add(x, 1.0, out=dg.zeros(3)), (real(3),)),
    ],
    "out": [(lambda x: np.cumsum(x, out=dg.zeros(3)), (real(3),))],
    np.sum: [(lambda x: np.sum(x, axis=1), (real(2, 3),)), (np.sum, (real(2, 3),)),
             (lambda x: x.sum((0, -1), keepdims=True), (real(2, 3, 2),)),
             (lambda x: np.sum(x, where=MASK, initial=3.0), (real(2, 3),))],
    np.mean: [(lambda x: np.mean(x, axis=0), (real(2, 3),)), (np.mean, (real(),)),
              (lambda x: np.mean(x, axis=1, where=MASK), (real(2, 3),))],
    np.var: [(lambda x: x.var(axis=1, ddof=1), (real(2, 3),))],
    np.std: [(lambda x: x.std(), (real(2, 3),))],
    np.cumsum: [(np.cumsum, (real(2, 3),)), (lambda x: x.cumsum(axis=0), (real(2, 3),))],
    (np.add, "accumulate"): [(lambda x: np.add.accumulate(x, axis=1), (real(2, 3),))],
    (np.add, "reduce"): [(lambda x: np.add.reduce(x), (real(2, 3),))],
    (np.multiply, "reduce"): [(lambda x: np.multiply.reduce(x, axis=1), (positive(2, 3),))],
    (np.maximum, "reduce"): [(lambda x: np.maximum.reduce(x, axis=1), (distinct(2, 3),))],
    (np.minimum, "reduce"): [(lambda x: np.minimum.reduce(x, where=MASK), (distinct(2, 3),))],
    np.max: [(lambda x: x.max(), (distinct(2, 3),)),
             (lambda x: x.max(axis=(0, 2), keepdims=True), (distinct(2, 3, 2),))],
    np.min: [(lambda x: np.min(x, axis=0, initial=0.1), (distinct(2, 3),))],
    np.prod: [(np.prod, (positive(2, 3),)), (lambda x: x.prod(axis=1), (positive(2, 3),)),
              (lambda x: np.prod(x * [1.0, 0.0, 1.0], axis=-1), (real(2, 3),))],
    np.reshape: [(lambda x: x.reshape(3, -1), (real(2, 3),))],
    "astype": [(lambda x: x.astype(np.complex128), (real(3),))],
    np.ravel: [(np.ravel, (real(2, 3),))],
    np.transpose: [(lambda x: x.T, (real(2, 3),)),
                   (lambda x: x.transpose(1, -1, 0), (real(2, 3, 2),))],
    np.swapaxes: [(lambda x: x.swapaxes(0, -1), (real(2, 3, 2),))],
    np.matrix_transpose: [(lambda x: x.mT, (real(2, 3, 2),))],
    np.squeeze: [(lambda x: x.squeeze(1), (real(2, 1, 2),))],
    np.expand_dims: [(lambda x: np.expand_dims(x, (0, 2)), (real(2, 3),))],
    np.broadcast_to: [(lambda x: np.broadcast_to(x, (4, 2, 3)), (real(2, 1),))],
    np.broadcast_arrays: [(lambda x, y: np.broadcast_arrays(x, y), (real(2, 1), real(3)))],
    np.moveaxis: [(lambda x: np.moveaxis(x, (0, 1), (-1, 0)), (real(2, 3, 2),))],
    np.flip: [(lambda x: np.flip(x, 1), (real(2, 3),)), (np.flip, (real(2, 3),))],
    np.roll: [(lambda x: np.roll(x, (1, -2), (0, 1)), (real(2, 3),)),
              (lambda x: np.roll(x, 2), (real(2, 3),))],
    np.concatenate: [(lambda x, y: np.concatenate([x, y, [[1.0, 2]]], 0), (real(2, 2), real(1, 2))),
                     (lambda x, y: np.concatenate([x, y], None), (real(2, 2), real(3)))],
    np.stack: [(lambda x, y: np.stack([x, y], -1), (real(2, 2), real(2, 2)))],
    np.vstack: [(lambda x, y: np.vstack([x, y]), (real(2), real(1, 2)))],
    np.hstack: [(lambda x, y: np.hstack([x, y]), (real(2, 1), real(2, 2)))],
    np.split: [(lambda x: np.split(x, [1], axis=1), (real(2, 3),))],
    np.array_split: [(lambda x: np.array_split(x, 2), (real(3),))],
    np.atleast_1d: [(np.atleast_1d, (real(),))],
    np.atleast_2d: [(lambda x: np.atleast_2d(x, x), (real(2),))],
    np.tile: [(lambda x: np.tile(x, (2, 1, 3)), (real(2, 3),))],
    np.repeat: [(lambda x: np.repeat(x, 2), (real(2, 2),)),
                (lambda x: np.repeat(x, [1, 0, 2], axis=1), (real(2, 3),))],
    operator.getitem: [(lambda x: x[1, ::2], (real(2, 3),)), (lambda x: x[MASK], (real(2, 3),)),
                       (lambda x: x[[0, 1, 1, -1]], (real(2, 3),)),
                       (lambda x: x[..., None, np.array([0, 0])], (real(2, 3),))],
    operator.setitem: [(lambda x, v: write(x, (slice(None), 1), v), (real(2, 3), real())),
                       (lambda x, v: write(x, MASK, v), (real(2, 3), real(4)))],
    np.where: [(lambda x, y: np.where(MASK, x, y), (real(2, 3), real(3)))],
    np.take: [(lambda x: x.take([2, 0, 2], axis=1), (real(2, 3),)),
              (lambda x: np.take(x, [5, 0]), (real(2, 3),))],
    np.take_along_axis: [(lambda x: np.take_along_axis(x, np.array([[2], [0]]), 1), (real(2, 3),))],
    np.sort: [(lambda x: np.sort(x, axis=0), (distinct(3, 2),))],
    np.diagonal: [(lambda x: np.diagonal(x, 1), (real(3, 4),))],
    np.trace: [(lambda x: np.trace(x, offset=-1), (real(3, 4),))],
    np.tril: [(lambda x: np.tril(x, -1), (real(2, 3),))],
    np.triu: [(lambda x: np.triu(x, 1), (real(2, 3),))],
    "scatter": [(lambda v: indexing.SCATTER(v, (3, 2), np.array([0, 0, -1])), (real(3, 2),)),
                (lambda v: indexing.SCATTER(v, (3,), [2, 0, 0]), (real(3),)),
                (lambda v: indexing.SCATTER(v, (3, 2), (1,)), (real(2),))],
    "at": [(lambda x, v: x.at[[0, 0, 1]].add(v), (real(2, 3), real(3))),
           (lambda x, v: x.at[1].set(v), (real(2, 3), real()))],
    np.matmul: [(operator.matmul, (real(*a), real(*b)))
                for a, b in [((2, 3), (3, 2)), ((3,), (3, 2)), ((2, 3), (3,)), ((3,), (3,)),
                             ((2, 1, 2, 3), (4, 3, 2)), ((3,), (2, 3, 2)), ((2, 2, 3), (3,))]],
    np.dot: [(np.dot, (real(2, 3), real(3))), (np.dot, (real(2, 3), real(2, 3, 2))),
             (np.dot, (real(), real(2)))],
    np.tensordot: [
        (lambda x, y: np.tensordot(x, y, 1), (real(2, 3), real(3, 2))),
        (lambda x, y: np.tensordot(x, y, ((0, -1), (1, 0))), (real(2, 2, 3), real(3, 2))),
    ],
    np.inner: [(np.inner, (real(2, 3), real(2, 3))), (np.inner, (real(), real(3)))],
    np.outer: [(np.outer, (real(2), real(3)))],
    np.vdot: [(np.vdot, (real(2, 2), real(2, 2)))],
    np.einsum: [(lambda x, y: np.einsum("ij,jk->ik", x, y), (real(2, 3), real(3, 2))),
                (lambda x, y: np.einsum("...i,ji", x, y), (real(2, 2, 3), real(2, 3))),
                (lambda x: np.einsum("ij->j", x), (real(2, 3),)),
                (lambda x, y, z: np.einsum("i,ij,k->k", x, y, z), (real(2), real(2, 3), real(2)))],
    np.linalg.inv: [(np.linalg.inv, (matrix(3),))],
    np.linalg.solve: [(np.linalg.solve, (matrix(3), real(3))),
                      (np.linalg.solve, (matrix(3), real(3, 2)))],
    np.linalg.det: [(np.linalg.det, (matrix(3),))],
    np.linalg.cholesky: [(lambda x: np.linalg.cholesky(spd(x)), (matrix(3),))],
    np.linalg.norm: [(np.linalg.norm, (real(2, 3),)),
                     (lambda x: np.linalg.norm(x, 3, axis=1), (positive(2, 3),)),
                     (lambda x: np.linalg.norm(x, np.inf), (distinct(3),))],
    "relu": [(nn.relu, (distinct(3),))],
    "sigmoid": [(nn.sigmoid, (real(3),))],
    "softplus": [(nn.softplus, (real(3),))],
    "gelu": [(nn.gelu, (real(3),))],
    "logsumexp": [(nn.logsumexp, (real(2, 3),)),
                  (lambda x: nn.logsumexp(x, axis=1, keepdims=True), (real(2, 3),))],
    "softmax": [(nn.softmax, (real(2, 3),)), (lambda x: nn.softmax(x, axis=0), (real(2, 3),))],
    "log_softmax": [(nn.log_softmax, (real(2, 3),))],
    "cross_entropy": [(lambda x, r=r: nn.cross_entropy(x, LABELS, r), (real(4, 3),))
                      for r in ("mean", "sum", "none")],
    "mse_loss": [(nn.mse_loss, (real(2, 3), real(3)))],
}  # fmt: skip
for function, draw in UNARY.items():
    CASES[function] = [(function, (draw(2, 3),)), (function, (draw(),))]
for function, draw in BINARY.items():
    CASES[function] = [(function, (draw(2, 3), draw(3))), (function, (draw(), draw(2)))]
ALIASES = {np.amax: np.max, np.amin: np.min}
FLAT = [(case, i) for case in CASES for i in range(len(CASES[case]))]
# The gradient of these is constant: there is nothing to differentiate again.
STEPS = (np.sign, np.floor, np.ceil, np.trunc, np.rint, np.round, np.imag)
CURVED = [(case, i) for case, i in FLAT if case not in STEPS]


def drawn(case: Any, number: int) -> Case:
    """Return a case with tensors of its own, so that none outlives its test."""
    function, arguments = CASES[case][number]
    return function, tuple(dg.tensor(a.data, requires_grad=True) for a in arguments)


def write(x: Tensor, index: Any, value: Tensor) -> Tensor:
    result = x.clone()
    result[index] = value
    return result


def label(value: Any) -> str:
    if isinstance(value, tuple) and isinstance(value[0], np.ufunc):
        return f"{value[0].__name__}.{value[1]}"
    return getattr(value, "__name__", str(value))


def names(value: Any, implementation: Any) -> set[str]:
    """Return what a test case may call a registered function."""
    if isinstance(implementation, Op) and not isinstance(value, np.ufunc):
        return {label(value), implementation.name}
    return {label(value)}


def test_rules_every_registered_function_has_a_check() -> None:
    checked = {label(case) for case in [*CASES, *ALIASES]}
    open_cases = [
        label(function)
        for function, implementation in registered().items()
        if not (isinstance(implementation, Op) and not implementation.differentiable)
        and not (isinstance(implementation, Op) and not implementation.has_rules)
        and not names(function, implementation) & checked
    ]
    assert open_cases == []


@pytest.fixture
def uncalled() -> Iterator[set[tuple[str, int]]]:
    """Yield (operation, argument) of every rule there is; one that is called drops out."""
    ops = {op for op in registered().values() if isinstance(op, Op) and op.has_rules}
    kept = {op: (op.rules, op.variadic) for op in ops}
    left: set[tuple[str, int]] = set()

    def watched(op: Op, argument: int, rule: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left.discard((op.name, argument))
            return rule(*args, **kwargs)

        if rule is not None:
            left.add((op.name, argument))
        return rule and call

    for op, (rules, variadic) in kept.items():
        watching = [watched(op, i, rule) for i, rule in enumerate(rules)]
        op.defvjp(*watching, variadic=watched(op, -1, variadic))
    yield left
    for op, (rules, variadic) in kept.items():
        op.defvjp(*rules, variadic=variadic)


def test_rules_of_every_argument_are_called_by_the_checks(uncalled: set[tuple[str, int]]) -> None:
    assert len(uncalled) > 100
    for case, number in FLAT:
        function, arguments = drawn(case, number)
        results = function(*arguments)
        parts = results if isinstance(results, tuple | list) else [results]
        dg.grad([part.sum().real for part in parts], arguments, create_graph=True)
    assert uncalled == set()


@pytest.mark.parametrize(("case", "number"), FLAT, ids=lambda v: label(v))
def test_rules_gradient_equals_differences(case: Any, number: int) -> None:
    function, arguments = drawn(case, number)
    assert gradcheck(function, arguments)


@pytest.mark.parametrize(("case", "number"), CURVED, ids=lambda v: label(v))
def test_rules_second_gradient_equals_differences(case: Any, number: int) -> None:
    function, arguments = drawn(case, number)
    assert gradgradcheck(function, arguments, atol=1e-4)


@pytest.mark.parametrize(("case", "number"), FLAT, ids=lambda v: label(v))
def test_rules_value_equals_numpy(case: Any, number: int) -> None:
    function, arguments = drawn(case, number)
    recorded = function(*arguments)
    with dg.no_grad():
        plain = function(*[a.detach() for a in arguments])
    pairs = zip(
        *[r if isinstance(r, tuple | list) else [r] for r in (recorded, plain)], strict=True
    )
    for one, other in pairs:
        assert one.requires_grad
        assert not other.requires_grad
        np.testing.assert_array_equal(one.detach().numpy(), other.numpy())
