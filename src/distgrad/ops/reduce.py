"""Reductions: functions that remove axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from distgrad._core import Op, register
from distgrad.ops.registry import conj, constant, defvjp, expand, implements, spread, write

__all__ = ["count_along"]


def count_along(shape: tuple[int, ...], axis: Any) -> int:
    """Return how many elements one result of a reduction is made of."""
    if axis is None:
        axis = tuple(range(len(shape)))
    axes = axis if isinstance(axis, tuple) else (axis,)
    count = 1
    for a in axes:
        count *= shape[a]
    return count


# ------------------------------------------------------------ sums


def total(x: Any, axis: Any = None, keepdims: Any = False, dtype: Any = None) -> Any:
    return np.add.reduce(x, axis=axis, dtype=dtype, keepdims=keepdims)


def average(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return np.mean(x, axis=axis, keepdims=keepdims)


def expand_total(
    g: Any, ans: Any, x: Any, axis: Any = None, keepdims: bool = False, dtype: Any = None
) -> Any:
    return expand(g, x.shape, axis, keepdims)


def expand_average(g: Any, ans: Any, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return expand(g / max(count_along(x.shape, axis), 1), x.shape, axis, keepdims)


SUM = defvjp(total, expand_total, needs=("s",), name="sum")
register("sum", SUM)  # what Tensor.sum looks for
MEAN = defvjp(average, expand_average, needs=("s",), name="mean")
CUMSUM = defvjp(
    np.cumsum,
    lambda g, ans, x, axis=None: np.reshape(
        np.flip(np.cumsum(np.flip(g, axis), axis=axis), axis), x.shape
    ),
    needs=("s",),
)


def reduction(*functions: Any, op: Op, combine: Any, neutral: float) -> None:
    """Make `functions` reduce over axes with all options of NumPy.

    Parameters
    ----------
    op
        The reduction without options.
    combine
        Joins a result and ``initial``.
    neutral
        Stands where ``where`` is false.
    """

    @implements(*functions)
    def reduce(
        a: Any,
        axis: Any = None,
        dtype: Any = None,
        out: Any = None,
        keepdims: bool = False,
        initial: Any = None,
        where: Any = True,
    ) -> Any:
        if where is not True:
            a = np.where(where, a, np.asarray(neutral, a.dtype))
        options = {}
        if dtype is not None and op is SUM:  # which casts as it adds
            options["dtype"] = dtype
        elif dtype is not None:
            a = a.astype(dtype)
        result = op(a, axis=axis, keepdims=keepdims, **options)
        return write(out, result if initial is None else combine(result, initial))


reduction(np.sum, (np.add, "reduce"), op=SUM, combine=np.add, neutral=0)


@implements((np.add, "accumulate"))
def accumulate(a: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
    """Return running sums along one axis."""
    result = CUMSUM(a if dtype is None else a.astype(dtype), axis=axis)
    return write(out, result)


@implements(np.mean)
def mean(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    keepdims: bool = False,
    *,
    where: Any = True,
) -> Any:
    """Average over axes."""
    if dtype is not None:
        a = a.astype(dtype)
    if where is True:
        result = MEAN(a, axis=axis, keepdims=keepdims)
    else:
        count = np.sum(np.broadcast_to(where, a.shape), axis=axis, keepdims=keepdims)
        result = np.sum(a, axis=axis, keepdims=keepdims, where=where) / count.astype(a.dtype)
    return write(out, result)


@implements(np.var)
def var(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: float = 0,
    keepdims: bool = False,
) -> Any:
    """Variance over axes, with `ddof` degrees of freedom taken off."""
    if dtype is not None:
        a = a.astype(dtype)
    distance = np.absolute(a - np.mean(a, axis=axis, keepdims=True))
    count = count_along(a.shape, axis) - ddof
    result = np.sum(np.square(distance), axis=axis, keepdims=keepdims) / count
    return write(out, result)


@implements(np.std)
def std(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
    """Return the standard deviation over axes."""
    result = np.sqrt(np.var(a, axis=axis, dtype=dtype, **options))
    return write(out, result)


# ------------------------------------------------------------ extremes


def highest(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    return np.maximum.reduce(x, axis=axis, keepdims=keepdims)


def lowest(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    return np.minimum.reduce(x, axis=axis, keepdims=keepdims)


def share_extreme(g: Any, ans: Any, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Give the gradient to the extreme element, in equal parts to equal ones."""
    chosen = np.equal(x, spread(ans, x.ndim, axis, keepdims)).astype(g.dtype)
    count = np.sum(chosen, axis=axis, keepdims=True)
    return spread(g, x.ndim, axis, keepdims) * (chosen / count)


MAX = defvjp(highest, share_extreme, needs=("xa",), name="max")
MIN = defvjp(lowest, share_extreme, needs=("xa",), name="min")


reduction((np.maximum, "reduce"), op=MAX, combine=np.maximum, neutral=-np.inf)
reduction((np.minimum, "reduce"), op=MIN, combine=np.minimum, neutral=np.inf)


@implements(np.max, np.amax)
def max_(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, **options: Any) -> Any:
    """Return the largest element over axes."""
    return np.maximum.reduce(a, axis=axis, out=out, keepdims=keepdims, **options)


@implements(np.min, np.amin)
def min_(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False, **options: Any) -> Any:
    """Return the smallest element over axes."""
    return np.minimum.reduce(a, axis=axis, out=out, keepdims=keepdims, **options)


# ------------------------------------------------------------ products


def product(x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    return np.multiply.reduce(x, axis=axis, keepdims=keepdims)


def product_rule(g: Any, ans: Any, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Product of all others: ans / x, and without division where some element is 0."""
    if not np.any(np.equal(x, 0)):
        return spread(g * conj(ans), x.ndim, axis, keepdims) / conj(x)
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    ends = tuple(range(x.ndim - len(axes), x.ndim))
    moved = np.moveaxis(x, axes, ends)
    flat = np.reshape(moved, (*moved.shape[: ends[0]], -1))
    others = np.where(np.eye(flat.shape[-1], dtype=bool), 1, flat[..., None, :])
    others = np.moveaxis(np.reshape(np.prod(others, axis=-1), moved.shape), ends, axes)
    return spread(g, x.ndim, axis, keepdims) * conj(others)


PROD = defvjp(product, product_rule, needs=("xa",), name="prod")


reduction(np.prod, (np.multiply, "reduce"), op=PROD, combine=np.multiply, neutral=1)

constant(
    [
        *(np.argmax, np.argmin, np.argsort, np.any, np.all, np.count_nonzero, np.nonzero),
        *(np.flatnonzero, np.argwhere, np.searchsorted, np.nanargmax, np.nanargmin),
    ]
)
