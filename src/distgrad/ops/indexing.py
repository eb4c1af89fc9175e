"""Reading and writing parts of a tensor."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from distgrad._core import Tensor
from distgrad.ops.registry import constant, defvjp, implements

__all__ = ["At", "is_basic", "plain", "scatter"]


def plain(value: Any) -> Any:
    """Return the array of a tensor of positions."""
    return value.data if isinstance(value, Tensor) else value


def is_basic(index: Any) -> bool:
    """Tell whether an index selects each element at most once, by slices and integers."""
    parts = index if isinstance(index, tuple) else (index,)
    plain = (int, slice, type(None), type(Ellipsis), np.integer)
    return all(isinstance(part, plain) and not isinstance(part, bool) for part in parts)


def scatter(values: Any, shape: tuple[int, ...], index: Any) -> Any:
    """Return zeros of `shape` to which `values` were added at `index`, repeated ones too."""
    result = np.zeros(shape, values.dtype)
    if is_basic(index):
        result[index] = values
    elif isinstance(index, np.ndarray) and index.dtype.kind in "iu" and len(shape) > 1:
        scatter_rows(result, index, values)
    else:
        np.add.at(result, index, values)
    return result


def scatter_rows(result: Any, index: Any, values: Any) -> None:
    """Add rows, those for one place together: much faster than ``np.add.at``."""
    order = np.argsort(index, axis=None, kind="stable")
    places = index.reshape(-1)[order] % max(len(result), 1)
    if places.size == 0:
        return
    if np.any(places[1:] < places[:-1]):  # negative indices broke the order
        order = order[np.argsort(places, kind="stable")]
        places = index.reshape(-1)[order] % len(result)
    starts = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1]]))
    rows = values.reshape(-1, *result.shape[1:])[order]
    result[places[starts]] = np.add.reduceat(rows, starts, axis=0)


SCATTER = defvjp(scatter, lambda g, ans, values, shape, index: g[index], needs=("",))


def overwritten(g: Any, ans: Any, x: Any, value: Any, index: Any) -> Any:
    """What was there before the write gets no gradient where it was overwritten."""
    mask = np.ones(x.shape, bool)
    mask[index] = False
    return np.where(mask, g, np.zeros((), g.dtype))


defvjp(operator.getitem, lambda g, ans, x, index: SCATTER(g, x.shape, index), needs=("s",))
defvjp(
    operator.setitem,
    overwritten,
    lambda g, ans, x, value, index: g[index],
    needs=("s", "s"),
)
defvjp(
    np.where,
    None,
    lambda g, ans, condition, x, y: np.where(condition, g, np.zeros((), g.dtype)),
    lambda g, ans, condition, x, y: np.where(condition, np.zeros((), g.dtype), g),
    needs=("", "x", "x"),
)


@implements(np.take)
def take(
    a: Any, indices: Any, axis: int | None = None, out: Any = None, mode: str = "raise"
) -> Any:
    """Return elements along an axis, by their positions."""
    if out is not None or mode != "raise":
        raise TypeError("cannot record numpy.take with out or another mode than 'raise'")
    if axis is None:
        return np.ravel(a)[indices]
    return a[(slice(None),) * (axis % a.ndim) + (indices,)]


@implements(np.take_along_axis)
def take_along_axis(arr: Any, indices: Any, axis: int | None = -1) -> Any:
    """Return elements along one axis, by positions for each line."""
    indices = plain(indices)
    if axis is None:
        return np.ravel(arr)[indices]
    axis %= arr.ndim
    grid = np.ogrid[tuple(slice(n) for n in indices.shape)]
    return arr[tuple(indices if i == axis else grid[i] for i in range(arr.ndim))]


@implements(np.sort)
def sort(a: Any, axis: int | None = -1, kind: Any = None, order: Any = None) -> Any:
    """Return the elements in ascending order along an axis."""
    if axis is None:
        a, axis = np.ravel(a), 0
    return np.take_along_axis(a, np.argsort(a, axis=axis, kind=kind), axis)


@implements(np.diagonal)
def diagonal(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """Return the diagonals of the matrices in two axes, as the last axis."""
    a = np.moveaxis(a, (axis1, axis2), (-2, -1))
    rows, columns = a.shape[-2:]
    count = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    steps = np.arange(count)
    return a[..., steps + max(-offset, 0), steps + max(offset, 0)]


@implements(np.trace)
def trace(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """Sum the diagonals of the matrices in two axes."""
    return np.sum(np.diagonal(a, offset, axis1, axis2), axis=-1)


@implements(np.tril)
def tril(m: Any, k: int = 0) -> Any:
    """Keep what is on and below a diagonal."""
    return np.where(np.tri(m.shape[-2], m.shape[-1], k, dtype=bool), m, np.zeros((), m.dtype))


@implements(np.triu)
def triu(m: Any, k: int = 0) -> Any:
    """Keep what is on and above a diagonal."""
    return np.where(np.tri(m.shape[-2], m.shape[-1], k - 1, dtype=bool), np.zeros((), m.dtype), m)


class At:
    """What ``tensor.at`` returns; ``tensor.at[index]`` is a place for a written copy."""

    def __init__(self, tensor: Any, index: Any = None) -> None:
        self._tensor = tensor
        self._index = index

    def __getitem__(self, index: Any) -> At:
        return At(self._tensor, index)

    def set(self, value: Any) -> Any:
        """Return a copy with `value` at the index."""
        result = self._tensor.clone()
        result[self._index] = value
        return result

    def add(self, value: Any) -> Any:
        """Return a copy with `value` added at the index; repeated positions add up."""
        index = plain(self._index)
        like = self._tensor.data[index]
        values = np.broadcast_to(value, like.shape)
        return self._tensor + SCATTER(values, self._tensor.shape, index)


implements("at")(At)
constant([np.unravel_index, np.ravel_multi_index])
