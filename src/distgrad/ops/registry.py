"""How a function on arrays becomes an operation on tensors.

Three kinds: functions with gradient rules (`defvjp`), functions made of such functions
(`implements`), and functions without gradient whose results never require grad (`constant`).
Rules follow one convention: ``rule(g, ans, *args, **kwargs)`` returns the gradient of its
argument, for the gradient ``g`` of the result ``ans``. They are written in functions that
work on arrays and on tensors alike, so a recorded backward pass can be differentiated again.
Complex gradients are conjugate, as in PyTorch: a holomorphic f' enters as its conjugate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from distgrad._core import Op, Tensor, is_grad_enabled, operation, register

__all__ = ["Rule", "conj", "constant", "defvjp", "expand", "implements", "spread", "write"]

Rule = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])


def defvjp(
    function: Callable[..., Any],
    *rules: Rule | None,
    needs: Sequence[str] | None = None,
    variadic: Rule | None = None,
    name: str | None = None,
) -> Op:
    """Give an array function its gradient rules.

    Parameters
    ----------
    function
        Takes and returns arrays.
    rules
        One for each argument; None for an argument without gradient.
    needs
        For each rule what it reads, so that the rest is not kept alive: ``x``, ``y``, ``z`` the
        first three arguments, ``a`` the result, ``s`` shapes. Default everything.
    variadic
        Instead of rules, one for any argument: ``rule(position, g, ans, *args, **kwargs)``.
    name
        For graphs and errors; default the function's.

    Returns
    -------
    Op
        The operation; call it with tensors.
    """
    op = operation(function) if name is None else Op(function, name)
    if name is not None:
        register(function, op)
    return op.defvjp(*rules, needs=needs, variadic=variadic)


def implements(*functions: Any) -> Callable[[F], F]:
    """Make the decorated function on tensors what NumPy's `functions` mean."""

    def decorate(implementation: F) -> F:
        for function in functions:
            register(function, implementation)
        return implementation

    return decorate


def constant(functions: Iterable[Callable[..., Any]]) -> None:
    """Register functions whose results never require grad."""
    for function in functions:
        register(function, Op(function, differentiable=False))


def write(out: Any, result: Any) -> Any:
    """Write a result into what was given as ``out``, and return that; without it the result."""
    target = out[0] if isinstance(out, tuple) else out
    if target is None:
        return result
    if not isinstance(target, Tensor) and isinstance(result, Tensor):
        if result.requires_grad and is_grad_enabled():
            raise TypeError(
                "cannot write a result that requires grad into an array\n"
                "hint: give a Tensor as out, or make a new one: a = a + t instead of a += t"
            )
        result = result.data
    target[...] = result
    return target


@implements("out")
def call_with_out(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operation with ``out``: it is recorded without, then the write is."""
    options = {key: value for key, value in kwargs.items() if key != "out"}
    return write(kwargs["out"], op(*args, **options))


def conj(x: Any) -> Any:
    """Conjugate of a complex value; a real one itself, without a copy."""
    complex_valued = x.dtype.kind == "c" if hasattr(x, "dtype") else isinstance(x, complex)
    return np.conjugate(x) if complex_valued else x


def spread(reduced: Any, ndim: int, axis: Any, keepdims: bool) -> Any:
    """Put axes that a reduction removed back, with extent 1."""
    if keepdims or ndim == 0:
        return reduced
    if axis is None:
        return np.reshape(reduced, (1,) * ndim)
    axes = {a % ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
    extents = iter(reduced.shape)
    return np.reshape(reduced, tuple(1 if i in axes else next(extents) for i in range(ndim)))


def expand(reduced: Any, shape: tuple[int, ...], axis: Any, keepdims: bool) -> Any:
    """Undo the shape of a reduction: repeat along the axes that it removed."""
    return np.broadcast_to(spread(reduced, len(shape), axis, keepdims), shape)
