"""For every rule that is not of single elements: how to draw a call of its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distgrad as dg
from distgrad.ops import indexing, nn

Function = Callable[..., Any]
Checked = Any  # a function and the tensors to check it with
Case = Callable[["Drawn"], Checked]
PAIRS = hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3)


def draw(seed: int, shape: tuple[int, ...], *, complex_valued: bool = False) -> dg.Tensor:
    """Values between 0.3 and 0.8, no two of them equal."""
    random = np.random.default_rng(seed)
    values: Any = random.uniform(0.3, 0.8, shape)
    if complex_valued:
        values = values + 1j * random.uniform(0.3, 0.8, shape)
    return dg.tensor(np.asarray(values), requires_grad=True)


class Drawn:
    """Shapes, axes and tensors of one example."""

    def __init__(self, data: Any, seed: int, complex_valued: bool) -> None:
        self.data, self.seed, self.complex_valued = data, seed, complex_valued

    def integer(self, low: int, high: int) -> int:
        return int(self.data.draw(st.integers(low, high)))

    def shape(self, least: int = 0, most: int = 3, min_side: int = 0) -> tuple[int, ...]:
        sides = st.integers(min_side, 2 if most > 2 else 3)
        return tuple(self.data.draw(st.lists(sides, min_size=least, max_size=most)))

    def axis(self, tensor: dg.Tensor) -> int:
        return self.integer(-tensor.ndim, tensor.ndim - 1)

    def indices(self, extent: int, *shape: int) -> Any:
        return self.data.draw(hnp.arrays(np.intp, shape, elements=st.integers(-extent, extent - 1)))

    def of(self, *shape: int) -> dg.Tensor:
        self.seed += 1
        return draw(self.seed, shape, complex_valued=self.complex_valued)

    def any(self, least: int = 0, most: int = 3, min_side: int = 0) -> dg.Tensor:
        return self.of(*self.shape(least, most, min_side))

    def pair(self) -> tuple[dg.Tensor, dg.Tensor]:
        first, other = self.data.draw(PAIRS).input_shapes
        return self.of(*first), self.of(*other)


def along(function: Function, least: int = 1, **options: Any) -> Case:
    """Check a function of a tensor and an axis."""

    def case(d: Drawn) -> Checked:
        x = d.any(least)
        axis = d.axis(x)
        return lambda x: function(x, axis=axis, **options), x

    return case


def shaped(function: Function, least: int = 0, min_side: int = 0) -> Case:
    """Check a function of a tensor alone."""
    return lambda d: (function, d.any(least, min_side=min_side))


def axes_of(d: Drawn, x: dg.Tensor) -> tuple[int, ...]:
    return tuple(d.data.draw(st.permutations(range(x.ndim))))


def permuted(function: Function) -> Case:
    """Check a function of a tensor and an order of its axes."""

    def case(d: Drawn) -> Checked:
        x = d.any()
        axes = axes_of(d, x)
        return lambda x: function(x, axes), x

    return case


def two_axes(function: Function) -> Case:
    def case(d: Drawn) -> Checked:
        x = d.any(2)
        first, other = axes_of(d, x)[:2]
        return lambda x: function(x, first, other), x

    return case


def joined(function: Function, least: int, new_axis: bool = False) -> Case:
    """Check a join of two tensors that differ, if they may, in the first axis."""

    def case(d: Drawn) -> Checked:
        shape = d.shape(least)
        longer = shape if new_axis else (d.integer(0, 2), *shape[1:])
        return lambda x, y: function([x, y]), d.of(*shape), d.of(*longer)

    return case


def offset(function: Function) -> Case:
    """Check a function of a tensor and the number of a diagonal."""

    def case(d: Drawn) -> Checked:
        x, k = d.any(2, min_side=1), d.integer(-2, 2)
        return lambda x: function(x, k), x

    return case


def counted(function: Function) -> Case:
    """Check a function of a tensor and a count along its first axis."""

    def case(d: Drawn) -> Checked:
        x, count = d.any(1), d.integer(1, 3)
        return lambda x: function(x, count), x

    return case


def product(function: Function, columns: bool = False) -> Case:
    """Check a product over the last axis of both tensors, or the last of one, first of other."""

    def case(d: Drawn) -> Checked:
        n, m, k = d.shape(3)
        other = (n, k) if columns else (k, n)
        vectors = d.integer(0, 3)
        first, second = ((n,), other) if vectors == 1 else ((m, n), other)
        if vectors >= 2:
            second = (n,)
        return function, d.of(*first), d.of(*second)

    return case


def matrices(function: Function) -> Case:
    """Check a function of stacked square matrices far from singular ones."""

    def case(d: Drawn) -> Checked:
        n = d.integer(0, 3)
        return lambda x: function(x + 2 * np.eye(n)), d.of(*d.shape(0, 1), n, n)

    return case


def solved(d: Drawn) -> Checked:
    n = d.integer(1, 3)
    right = (n,) if d.integer(0, 1) else (n, d.integer(0, 2))
    return lambda a, b: np.linalg.solve(a + 2 * np.eye(n), b), d.of(n, n), d.of(*right)


def contracted(d: Drawn) -> Checked:
    i, j, k = d.shape(3)
    return lambda x, y: np.einsum("...ij,jk->...ik", x, y), d.of(2, i, j), d.of(j, k)


def written(d: Drawn) -> Checked:
    x = d.any(1, min_side=1)
    index = d.data.draw(hnp.basic_indices(x.shape))
    value = d.of(*np.shape(x.data[index]))

    def write(x: dg.Tensor, value: dg.Tensor) -> dg.Tensor:
        result = x.clone()
        result[index] = value
        return result

    return write, x, value


def added(d: Drawn) -> Checked:
    x = d.any(1, min_side=1)
    index = d.indices(x.shape[0], d.integer(0, 3))
    return lambda x, v: x.at[index].add(v), x, d.of(len(index), *x.shape[1:])


def scattered(d: Drawn) -> Checked:
    shape = d.shape(1, 2, 1)
    index = d.indices(shape[0], d.integer(0, 3))
    return lambda v: indexing.SCATTER(v, shape, index), d.of(len(index), *shape[1:])


def taken(d: Drawn) -> Checked:
    x = d.any(1, min_side=1)
    axis = d.axis(x)
    index = d.indices(x.shape[axis], *d.shape(0, 2))
    return lambda x: np.take(x, index, axis=axis), x


def taken_along(d: Drawn) -> Checked:
    rows, columns = d.shape(2, 2, 1)
    index = d.indices(columns, rows, d.integer(0, 3))
    return lambda x: np.take_along_axis(x, index, 1), d.of(rows, columns)


def chosen(d: Drawn) -> Checked:
    x, y = d.pair()
    shape = np.broadcast_shapes(x.shape, y.shape)
    mask = d.data.draw(hnp.arrays(bool, shape))
    return lambda x, y: np.where(mask, x, y), x, y


def called_with_where(d: Drawn) -> Checked:
    x, y = d.pair()
    mask = d.data.draw(hnp.arrays(bool, np.broadcast_shapes(x.shape, y.shape)))
    return lambda x, y: np.multiply(x, y, where=mask), x, y


def repeated_to(d: Drawn) -> Checked:
    x, wider = d.any(), d.shape(0, 1)
    return lambda x: np.broadcast_to(x, (*wider, *x.shape)), x


def labelled(d: Drawn) -> Checked:
    rows, classes = d.integer(0, 3), d.integer(1, 3)
    labels = d.data.draw(hnp.arrays(np.intp, rows, elements=st.integers(0, classes - 1)))
    reduction = d.data.draw(st.sampled_from(["mean", "sum", "none"] if rows else ["sum", "none"]))
    return lambda x: nn.cross_entropy(x, labels, reduction), d.of(rows, classes)


def compared(d: Drawn) -> Checked:
    x = d.any(1, min_side=1)
    return nn.mse_loss, x, d.of(*x.shape[1:])


def single_axis(d: Drawn) -> Checked:
    shape = d.shape(0, 2)
    return lambda x: np.squeeze(x, 0), d.of(1, *shape)


def spread_out(d: Drawn) -> Checked:
    x = d.any(1, min_side=2)
    return np.std, x


# Everything else that is registered, under the name that the registry or its Op gives it.
CASES: dict[str, Case] = {
    "__call__": called_with_where,
    "angle": lambda d: (np.angle, d.any()),
    "arccosh": lambda d: (lambda x: np.arccosh(x + 1), d.any()),
    "array_split": counted(np.array_split),
    "astype": shaped(lambda x: x.astype(np.complex128)),
    "at": added,
    "atleast_1d": shaped(np.atleast_1d),
    "atleast_2d": shaped(np.atleast_2d),
    "add.accumulate": along(np.add.accumulate),
    "broadcast_arrays": lambda d: (np.broadcast_arrays, *d.pair()),
    "broadcast_to": repeated_to,
    "cholesky": matrices(lambda x: np.linalg.cholesky(x @ np.conj(np.swapaxes(x, -1, -2)))),
    "clip": shaped(lambda x: np.clip(x, 0.45, 0.65)),
    "concatenate": joined(np.concatenate, 1),
    "copysign": lambda d: (lambda x: np.copysign(x, -1.0), d.any()),
    "cross_entropy": labelled,
    "cumsum": along(np.cumsum),
    "det": matrices(np.linalg.det),
    "diagonal": offset(np.diagonal),
    "dot": product(np.dot, columns=True),
    "einsum": contracted,
    "expand_dims": lambda d: (lambda x: np.expand_dims(x, (0, -1)), d.any()),
    "flip": along(np.flip),
    "getitem": counted(lambda x, n: x[..., ::n]),
    "hstack": joined(np.hstack, 1, new_axis=True),
    "inner": product(np.inner),
    "inv": matrices(np.linalg.inv),
    "log_softmax": lambda d: (nn.log_softmax, d.any(1, min_side=1)),
    "matmul": product(np.matmul, columns=True),
    "matrix_transpose": shaped(np.matrix_transpose, 2),
    "moveaxis": two_axes(np.moveaxis),
    "mse_loss": compared,
    "out": shaped(lambda x: np.cumsum(x, out=dg.zeros(x.size, x.dtype))),
    "outer": lambda d: (np.outer, d.any(0, 2), d.any(0, 2)),
    "ravel": shaped(np.ravel),
    "repeat": counted(np.repeat),
    "reshape": shaped(lambda x: np.reshape(x, (1, *x.shape[::-1]))),
    "roll": counted(lambda x, n: np.roll(x, n, 0)),
    "scatter": scattered,
    "setitem": written,
    "softmax": lambda d: (nn.softmax, d.any(1, min_side=1)),
    "solve": solved,
    "sort": along(np.sort),
    "split": along(lambda x, axis: np.split(x, [1], axis)),
    "squeeze": single_axis,
    "stack": joined(np.stack, 0, new_axis=True),
    "std": spread_out,
    "swapaxes": two_axes(np.swapaxes),
    "take": taken,
    "take_along_axis": taken_along,
    "tensordot": product(lambda x, y: np.tensordot(x, y, (-1, 0)), columns=True),
    "tile": counted(np.tile),
    "trace": offset(np.trace),
    "transpose": permuted(np.transpose),
    "tril": offset(np.tril),
    "triu": offset(np.triu),
    "vdot": lambda d: (lambda x: np.vdot(x, 2 * x), d.any()),
    "vstack": joined(np.vstack, 2),
    "where": chosen,
}
#: NumPy has no loop for complex values.
REAL_ONLY = {"copysign"}
