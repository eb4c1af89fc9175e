"""Functions that move elements without computing."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np

from distgrad.ops.registry import constant, defvjp, implements

__all__ = ["cast"]


defvjp(np.reshape, lambda g, ans, x, shape=None, **order: np.reshape(g, x.shape), needs=("s",))
defvjp(np.copy, lambda g, ans, x, **order: g, needs=("",))


def cast(x: Any, dtype: Any, copy: bool = True) -> Any:
    """Return an array in another dtype."""
    return x.astype(dtype, copy=copy)


CAST = defvjp(cast, lambda g, ans, x, dtype, copy=True: g, needs=("",), name="astype")


@implements("astype", *([np.astype] if hasattr(np, "astype") else []))
def astype(x: Any, dtype: Any, /, *, copy: bool = True, device: Any = None) -> Any:
    """Return a tensor in another dtype; its gradient is cast back."""
    return CAST(x, np.dtype(dtype), copy=copy)


@implements(np.ravel)
def ravel(a: Any, order: str = "C") -> Any:
    """Return all elements in one axis."""
    if order != "C":
        a = np.transpose(a)
    return np.reshape(a, (-1,))


# ------------------------------------------------------------ axes


def transpose_back(g: Any, ans: Any, x: Any, axes: Any = None) -> Any:
    if axes is None:
        return np.transpose(g)
    return np.transpose(g, tuple(int(i) for i in np.argsort([a % g.ndim for a in axes])))


defvjp(np.transpose, transpose_back, needs=("",))
defvjp(np.swapaxes, lambda g, ans, x, axis1, axis2: np.swapaxes(g, axis1, axis2), needs=("",))
defvjp(np.squeeze, lambda g, ans, x, axis=None: np.reshape(g, x.shape), needs=("s",))
defvjp(np.expand_dims, lambda g, ans, x, axis: np.reshape(g, x.shape), needs=("s",))
defvjp(np.broadcast_to, lambda g, ans, x, shape, subok=False: g, needs=("",))


@implements(np.matrix_transpose)
def matrix_transpose(x: Any) -> Any:
    """Swap the last two axes."""
    return np.swapaxes(x, -1, -2)


@implements(np.moveaxis)
def moveaxis(a: Any, source: Any, destination: Any) -> Any:
    """Move axes to new positions; the others keep their order."""
    sources = [s % a.ndim for s in np.atleast_1d(source)]
    targets = [d % a.ndim for d in np.atleast_1d(destination)]
    rest = iter(i for i in range(a.ndim) if i not in sources)
    by_target = dict(zip(targets, sources, strict=True))
    return np.transpose(
        a, tuple(int(by_target[i]) if i in by_target else next(rest) for i in range(a.ndim))
    )


@implements(np.flip)
def flip(m: Any, axis: Any = None) -> Any:
    """Reverse the elements along axes."""
    axes = range(m.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    reversed_axes = {a % m.ndim for a in axes}
    return m[tuple(slice(None, None, -1 if i in reversed_axes else 1) for i in range(m.ndim))]


@implements(np.roll)
def roll(a: Any, shift: Any, axis: Any = None) -> Any:
    """Shift elements along an axis; those that fall off come back at the other end."""
    if axis is None:
        return np.reshape(np.roll(np.ravel(a), shift, 0), a.shape)
    shifts, axes = np.broadcast_arrays(np.atleast_1d(shift), np.atleast_1d(axis))
    for s, ax in zip(shifts.tolist(), axes.tolist(), strict=True):
        extent = a.shape[ax]
        if extent and s % extent:
            cut = extent - s % extent
            a = np.concatenate([take_slice(a, ax, cut, None), take_slice(a, ax, None, cut)], ax)
    return a


def take_slice(a: Any, axis: int, start: int | None, stop: int | None) -> Any:
    return a[(builtins.slice(None),) * (axis % a.ndim) + (builtins.slice(start, stop),)]


# ------------------------------------------------------------ joining and splitting


def join(*arrays: Any, axis: int = 0) -> Any:
    return np.concatenate(arrays, axis=axis)


def join_rule(position: int, g: Any, ans: Any, *arrays: Any, axis: int = 0) -> Any:
    """Each part gets its slice of the gradient."""
    axis %= g.ndim
    start = sum(np.shape(a)[axis] for a in arrays[:position])
    return take_slice(g, axis, start, start + np.shape(arrays[position])[axis])


JOIN = defvjp(join, needs=("s",) * 8, variadic=join_rule, name="concatenate")


@implements(np.concatenate)
def concatenate(
    arrays: Any, axis: int | None = 0, out: Any = None, dtype: Any = None, casting: Any = None
) -> Any:
    """Join along an axis that exists."""
    if out is not None or casting is not None:
        raise TypeError("cannot record numpy.concatenate with out or casting")
    parts = list(arrays)
    if axis is None:
        parts, axis = [np.ravel(part) for part in parts], 0
    if dtype is not None:
        parts = [part.astype(dtype) for part in parts]
    return JOIN(*parts, axis=axis)


@implements(np.stack)
def stack(arrays: Any, axis: int = 0, **options: Any) -> Any:
    """Join along a new axis."""
    return np.concatenate([np.expand_dims(a, axis) for a in arrays], axis, **options)


@implements(np.vstack)
def vstack(tup: Any, **options: Any) -> Any:
    """Join along the first axis, vectors as rows."""
    return np.concatenate([np.atleast_2d(a) for a in tup], 0, **options)


@implements(np.hstack)
def hstack(tup: Any, **options: Any) -> Any:
    """Join along the second axis, vectors along their only one."""
    parts = [np.atleast_1d(a) for a in tup]
    return np.concatenate(parts, 0 if parts and parts[0].ndim == 1 else 1, **options)


@implements(np.array_split, np.split)
def split(ary: Any, indices_or_sections: Any, axis: int = 0) -> list[Any]:
    """Cut into parts along an axis."""
    if isinstance(indices_or_sections, int | np.integer):
        extent, count = ary.shape[axis], int(indices_or_sections)
        sizes = [extent // count + (i < extent % count) for i in range(count)]
        cuts = np.cumsum(sizes)[:-1].tolist()
    else:
        cuts = [int(cut) for cut in indices_or_sections]
    return [
        take_slice(ary, axis, start, stop)
        for start, stop in zip([None, *cuts], [*cuts, None], strict=True)
    ]


def at_least(ndim: int) -> Any:
    def implementation(*arrays: Any) -> Any:
        results = [reach(a, ndim) for a in arrays]
        return results[0] if len(results) == 1 else tuple(results)

    return implementation


def reach(a: Any, ndim: int) -> Any:
    return np.reshape(a, (1,) * (ndim - a.ndim) + a.shape) if a.ndim < ndim else a


implements(np.atleast_1d)(at_least(1))
implements(np.atleast_2d)(at_least(2))


@implements(np.tile)
def tile(A: Any, reps: Any) -> Any:
    """Repeat the whole array along axes."""
    counts = (int(reps),) if np.ndim(reps) == 0 else tuple(int(r) for r in reps)
    counts = (1,) * (A.ndim - len(counts)) + counts
    extents = (1,) * (len(counts) - A.ndim) + A.shape
    paired = [extent for e in extents for extent in (1, e)]
    wide = [extent for r, e in zip(counts, extents, strict=True) for extent in (r, e)]
    repeated = np.broadcast_to(np.reshape(A, tuple(paired)), tuple(wide))
    return np.reshape(repeated, tuple(r * e for r, e in zip(counts, extents, strict=True)))


@implements(np.repeat)
def repeat(a: Any, repeats: Any, axis: int | None = None) -> Any:
    """Repeat each element along an axis."""
    if axis is None:
        a, axis = np.ravel(a), 0
    return np.take(a, np.repeat(np.arange(a.shape[axis]), repeats), axis=axis)


@implements(np.broadcast_arrays)
def broadcast_arrays(*arrays: Any, subok: bool = False) -> tuple[Any, ...]:
    """Broadcast all to their common shape."""
    shape = np.broadcast_shapes(*(np.shape(a) for a in arrays))
    return tuple(np.broadcast_to(a, shape) for a in arrays)


for function in (np.shape, np.ndim, np.size, np.shares_memory, np.may_share_memory):
    constant([function])
constant([np.array_repr, np.array_str, np.array2string])
