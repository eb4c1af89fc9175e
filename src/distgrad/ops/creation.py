"""Making tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from distgrad._core import Tensor

__all__ = [
    "arange",
    "empty",
    "empty_like",
    "eye",
    "from_numpy",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
]

Shape = int | tuple[int, ...]


def tensor(
    data: ArrayLike | Tensor,
    *,
    dtype: DTypeLike | None = None,
    requires_grad: bool = False,
    device: str | None = None,
) -> Tensor:
    """Copy data into a new leaf tensor.

    Parameters
    ----------
    data
        Array, number, nested sequence or Tensor.
    dtype
        Default that of the data.
    requires_grad
        Record operations on it; float and complex dtypes only.
    device
        Only ``"cpu"`` so far.

    Raises
    ------
    GraphError
        If it shall require grad and its dtype has no gradient.
    """
    source = data.detach().numpy() if isinstance(data, Tensor) else data
    return Tensor(np.array(source, dtype=dtype), requires_grad).to(device or "cpu")


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor over the memory of an array; writes to one are seen in the other."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"cannot share memory: {type(array).__name__} is not an ndarray")
    return Tensor(array)


def zeros(shape: Shape, dtype: DTypeLike = float, *, requires_grad: bool = False) -> Tensor:
    """Return a tensor filled with 0."""
    return Tensor(np.zeros(shape, dtype), requires_grad)


def ones(shape: Shape, dtype: DTypeLike = float, *, requires_grad: bool = False) -> Tensor:
    """Return a tensor filled with 1."""
    return Tensor(np.ones(shape, dtype), requires_grad)


def empty(shape: Shape, dtype: DTypeLike = float, *, requires_grad: bool = False) -> Tensor:
    """Return a tensor whose values are not set."""
    return Tensor(np.empty(shape, dtype), requires_grad)


def full(
    shape: Shape, value: Any, dtype: DTypeLike | None = None, *, requires_grad: bool = False
) -> Tensor:
    """Return a tensor filled with `value`."""
    return Tensor(np.full(shape, value, dtype), requires_grad)


def arange(
    start: float,
    stop: float | None = None,
    step: float = 1,
    dtype: Any = None,
    *,
    requires_grad: bool = False,
) -> Tensor:
    """Return evenly spaced values: ``arange(stop)`` or ``arange(start, stop, step)``."""
    ends: Any = (start,) if stop is None else (start, stop)
    make: Any = np.arange
    return Tensor(make(*ends, step=step, dtype=dtype), requires_grad)


def linspace(
    start: float,
    stop: float,
    num: int = 50,
    dtype: DTypeLike | None = None,
    *,
    requires_grad: bool = False,
) -> Tensor:
    """Return `num` evenly spaced values from `start` to `stop`, both included."""
    return Tensor(np.linspace(start, stop, num, dtype=dtype), requires_grad)


def eye(
    rows: int, columns: int | None = None, dtype: DTypeLike = float, *, requires_grad: bool = False
) -> Tensor:
    """Return a matrix with 1 on the diagonal."""
    return Tensor(np.eye(rows, columns, dtype=dtype), requires_grad)


def zeros_like(
    like: Tensor, dtype: DTypeLike | None = None, *, requires_grad: bool = False
) -> Tensor:
    """Return a tensor of the same shape filled with 0."""
    return Tensor(np.zeros_like(like.data, dtype), requires_grad)


def ones_like(
    like: Tensor, dtype: DTypeLike | None = None, *, requires_grad: bool = False
) -> Tensor:
    """Return a tensor of the same shape filled with 1."""
    return Tensor(np.ones_like(like.data, dtype), requires_grad)


def empty_like(
    like: Tensor, dtype: DTypeLike | None = None, *, requires_grad: bool = False
) -> Tensor:
    """Return a tensor of the same shape whose values are not set."""
    return Tensor(np.empty_like(like.data, dtype), requires_grad)


def full_like(
    like: Tensor, value: Any, dtype: DTypeLike | None = None, *, requires_grad: bool = False
) -> Tensor:
    """Return a tensor of the same shape filled with `value`."""
    return Tensor(np.full_like(like.data, value, dtype), requires_grad)
