"""Check gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from distgrad._core import Tensor, grad

__all__ = ["gradcheck", "gradgradcheck"]

Array = np.ndarray[Any, Any]


def gradcheck(
    f: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    seed: int = 0,
) -> bool:
    """Compare the gradients of `f` with central differences, for a random cotangent.

    Parameters
    ----------
    f
        Returns a tensor, or a tuple of them; must give the same values in each call.
    inputs
        Arguments of `f`; tensors that require grad are checked and must be float64 or
        complex128 leaves.
    eps
        Step of the differences; `f` should be smooth within it.
    atol, rtol
        Largest error: ``atol + rtol * |difference|``.
    seed
        For the cotangents.

    Returns
    -------
    bool
        True.

    Raises
    ------
    AssertionError
        If a gradient is wrong, naming the input and the largest error.
    """
    arguments = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    checked = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    for leaf in checked:
        if leaf.dtype not in (np.float64, np.complex128):
            raise ValueError(f"cannot check gradients in {leaf.dtype}: use float64 or complex128")
    outputs = _differentiable(f(*arguments))
    if not outputs:
        raise ValueError("cannot check gradients: no output requires grad")
    random = np.random.default_rng(seed)
    cotangents = [_draw(random, output) for output in outputs]
    found = grad(outputs, checked, cotangents, allow_unused=True)
    for position, (leaf, gradient) in enumerate(zip(checked, found, strict=True)):
        expected = _differences(f, arguments, leaf, cotangents, eps)
        actual = np.zeros_like(leaf.data) if gradient is None else gradient.detach().numpy()
        _compare(position, actual, expected, atol, rtol)
    return True


def gradgradcheck(
    f: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    seed: int = 0,
) -> bool:
    """Check second derivatives: `gradcheck` of the gradient of `f`, cotangents included.

    Parameters
    ----------
    f, inputs, eps, atol, rtol, seed
        As for `gradcheck`.

    Returns
    -------
    bool
        True.
    """
    arguments = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    outputs = _differentiable(f(*arguments))
    random = np.random.default_rng(seed + 1)
    cotangents = [Tensor(_draw(random, output), requires_grad=True) for output in outputs]

    def first(*values: Any) -> tuple[Tensor, ...]:
        given, seeds = values[: len(arguments)], values[len(arguments) :]
        checked = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
        results = _differentiable(f(*given))
        found = grad(results, checked, seeds, create_graph=True, allow_unused=True)
        return tuple(g for g in found if g is not None)

    return gradcheck(first, [*arguments, *cotangents], eps=eps, atol=atol, rtol=rtol, seed=seed)


def _differentiable(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple | list) else [result]
    return [r for r in results if isinstance(r, Tensor) and r.requires_grad]


def _draw(random: np.random.Generator, like: Tensor) -> Array:
    values = random.uniform(0.5, 1.5, like.shape)
    if like.dtype.kind == "c":
        values = values + 1j * random.uniform(0.5, 1.5, like.shape)
    drawn: Array = values.astype(like.dtype) if like.ndim else np.asarray(values, like.dtype)
    return drawn


def _projection(f: Callable[..., Any], arguments: list[Any], cotangents: list[Array]) -> float:
    """Return Re(sum(conj(cotangent) * output)), whose gradient the pass computes."""
    outputs = _differentiable(f(*arguments))
    return float(
        sum(
            np.sum((np.conjugate(c) * o.detach().numpy()).real)
            for c, o in zip(cotangents, outputs, strict=True)
        )
    )


def _differences(
    f: Callable[..., Any], arguments: list[Any], leaf: Tensor, cotangents: list[Array], eps: float
) -> Array:
    """Central differences in every element of `leaf`, real and imaginary part."""
    result: Array = np.zeros_like(leaf.data)
    for index, values in _perturbed(leaf):
        for direction in (1.0, 1j) if leaf.dtype.kind == "c" else (1.0,):
            ends = []
            for sign in (1, -1):
                moved = values.copy()
                moved[index] += sign * eps * direction
                ends.append(_projection(f, _replace(arguments, leaf, moved), cotangents))
            result[index] += direction * (ends[0] - ends[1]) / (2 * eps)
    return result


def _perturbed(leaf: Tensor) -> Iterator[tuple[tuple[int, ...], Array]]:
    values = leaf.detach().numpy().copy()
    for index in np.ndindex(*values.shape):
        yield index, values


def _replace(arguments: list[Any], leaf: Tensor, values: Array) -> list[Any]:
    moved = Tensor(values, requires_grad=True)
    return [moved if a is leaf else a for a in arguments]


def _compare(position: int, actual: Array, expected: Array, atol: float, rtol: float) -> None:
    error = np.abs(actual - expected)
    if np.all(error <= atol + rtol * np.abs(expected)):
        return
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(error), np.inf, error))), error.shape)
    raise AssertionError(
        f"cannot confirm the gradient of input {position}: at {tuple(map(int, worst))} it is "
        f"{actual[worst]}, differences say {expected[worst]}"
    )
