"""Derivatives of functions, for those who prefer them to ``backward``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distgrad._core import Tensor, enable_grad, grad

__all__ = ["grad", "value_and_grad", "vjp"]


def _variable(value: Any) -> Tensor:
    """Return a fresh leaf over the same values, so that the caller's tensors are left alone."""
    plain = value.detach() if isinstance(value, Tensor) else Tensor(value)
    return plain.requires_grad_()


def value_and_grad(
    f: Callable[..., Tensor], argnums: int | Sequence[int] = 0
) -> Callable[..., tuple[Tensor, Any]]:
    """Return a function that computes f and its gradient.

    Parameters
    ----------
    f
        Returns a tensor with one element.
    argnums
        Position, or positions, of the arguments to differentiate.

    Returns
    -------
    Callable
        ``(value, gradient)``; a tuple of gradients if `argnums` is a sequence.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        variables = [_variable(args[i]) for i in positions]
        arguments = list(args)
        for i, variable in zip(positions, variables, strict=True):
            arguments[i] = variable
        with enable_grad():
            value = f(*arguments, **kwargs)
        gradients = grad(value, variables)
        return value.detach(), gradients[0] if isinstance(argnums, int) else gradients

    return run


def vjp(
    f: Callable[..., Tensor], *primals: Any
) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """Return f(*primals) and the function that pulls a cotangent of it back.

    Returns
    -------
    value : Tensor
    pullback : Callable
        Takes a gradient in the shape of `value`, returns one for each primal; it may be
        called again.
    """
    variables = [_variable(primal) for primal in primals]
    with enable_grad():
        value = f(*variables)

    def pullback(cotangent: Any) -> tuple[Tensor, ...]:
        return grad(value, variables, cotangent, retain_graph=True)

    return value.detach(), pullback
