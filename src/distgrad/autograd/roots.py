# cython: annotation_typing=False
"""Where a pass starts, and the error with which it may end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distgrad._core import Tensor
from distgrad.errors import BackwardError, GraphError
from distgrad.message import Error, PassAbort
from distgrad.rpc.failures import rebuild

__all__ = ["failure", "seeds"]


def seeds(roots: Sequence[Tensor], grads: Sequence[Any] | None) -> list[tuple[Tensor, Any]]:
    """Pair each root with the gradient that the pass starts with.

    Parameters
    ----------
    roots
        Tensors that require grad.
    grads
        For each root an array of its shape, or None for one. Without it every root has
        one element and starts with 1.
    """
    if isinstance(roots, Tensor):
        raise TypeError("cannot run the backward pass: roots is a Tensor, not a list of them")
    roots = list(roots)
    if not roots:
        raise ValueError("cannot run the backward pass: there are no roots")
    if grads is None:
        return [(root, _given(root, None)) for root in roots]
    grads = list(grads)
    if len(grads) != len(roots):
        raise ValueError(f"cannot pair {len(roots)} roots with {len(grads)} gradients")
    return [(root, _given(root, grad)) for root, grad in zip(roots, grads, strict=True)]


def _checked(root: Any) -> Tensor:
    if not isinstance(root, Tensor):
        raise TypeError(
            f"cannot run the backward pass: a root is {type(root).__name__}, not a Tensor"
        )
    if not root.requires_grad:
        raise GraphError("cannot run the backward pass: a root does not require grad")
    return root


def _given(root: Any, grad: Any) -> Any:
    if grad is not None:
        return _shaped(root, grad)
    if _checked(root).size != 1:
        raise GraphError(
            f"cannot run the backward pass from shape {root.shape}: only a root with one "
            "element has an implicit gradient",
            hint="pass grads=[...], one array of its shape for each root, or reduce with .sum()",
        )
    return None  # the graph makes the one itself


def _shaped(root: Any, grad: Any) -> Any:
    array = np.asarray(grad.data if isinstance(grad, Tensor) else grad)
    if array.shape != _checked(root).shape:
        raise GraphError(
            f"cannot run the backward pass: a gradient has shape {array.shape}, "
            f"its root {root.shape}"
        )
    return array


def _detail(told: Error, local: BaseException | None) -> str | None:
    if local is None:
        return f"remote traceback:\n{told.traceback}"
    return getattr(local, "detail", None)


def failure(cause: PassAbort, local: BaseException | None) -> BackwardError:
    """Return the error that `backward` raises, with the original exception as its cause.

    Parameters
    ----------
    cause
        What the workers told each other.
    local
        The exception itself, if it happened on this worker.
    """
    told = Error(*cause.error)
    worker = told.workers[0]
    name = told.type_name.rpartition(":")[2]
    place = f", at node {cause.node}" if cause.node else ""
    site = f", recorded at {cause.site}" if cause.site else ""
    error = BackwardError(
        f"cannot finish the backward pass: {name} on worker {worker!r}{place}{site}: "
        f"{told.message}",
        detail=_detail(told, local),
    )
    error.worker = worker
    error.node = cause.node
    error.site = cause.site
    error.remote_traceback = "" if local is not None else told.traceback
    error.__cause__ = local if local is not None else rebuild(told)
    return error
