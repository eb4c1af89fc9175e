"""Bounding gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from distgrad._core import Tensor
from distgrad.optim.checks import check_at_least
from distgrad.optim.optimizer import Array

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    gradients: Mapping[Tensor, Tensor] | None = None,
) -> float:
    """Scale gradients down, in place, to a norm over all of them together.

    Parameters
    ----------
    parameters
        Whose gradients; those without one count nothing.
    max_norm
        The largest norm that is left as it is.
    norm_type
        2 for the Euclidean norm, ``inf`` for the largest absolute value, or any other p.
    gradients
        Parameter to gradient; None takes ``.grad``.

    Returns
    -------
    float
        The norm before. If it is not finite, the gradients stay as they are.
    """
    check_at_least(0, max_norm=max_norm, norm_type=norm_type)
    chosen = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for parameter in chosen:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"cannot clip gradients of {type(parameter).__name__}: it is no tensor")
    found = [p.grad if gradients is None else gradients.get(p) for p in chosen]
    arrays: list[Array] = [gradient.data for gradient in found if gradient is not None]
    norms = [np.linalg.norm(array.reshape(-1), norm_type) for array in arrays]
    norm = float(np.linalg.norm(norms, norm_type)) if norms else 0.0
    if max_norm < norm < np.inf:
        for array in arrays:
            array *= max_norm / norm
    return norm
