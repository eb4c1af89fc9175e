"""Products and linear algebra."""

from __future__ import annotations

from typing import Any

import numpy as np

from distgrad.ops.registry import conj, defvjp, implements

__all__ = ["adjoint", "swap"]


def swap(x: Any) -> Any:
    """Swap the last two axes."""
    return np.swapaxes(x, -1, -2)


def adjoint(x: Any) -> Any:
    """Swap the last two axes and conjugate."""
    return swap(conj(x))


# ------------------------------------------------------------ products


def matmul_left(g: Any, ans: Any, x: Any, y: Any) -> Any:
    if y.ndim == 1:
        return np.expand_dims(g, -1) * conj(y)
    if g.ndim < y.ndim:  # the left one is a vector
        return np.squeeze(conj(y) @ np.expand_dims(g, -1), -1)
    return g @ adjoint(y)


def matmul_right(g: Any, ans: Any, x: Any, y: Any) -> Any:
    if x.ndim == 1:
        return conj(x) * g if g.ndim == 0 else conj(x)[:, None] * np.expand_dims(g, -2)
    if g.ndim < x.ndim:  # the right one is a vector
        return np.squeeze(adjoint(x) @ np.expand_dims(g, -1), -1)
    return adjoint(x) @ g


defvjp(np.matmul, matmul_left, matmul_right, needs=("y", "x"))


@implements(np.dot)
def dot(a: Any, b: Any, out: Any = None) -> Any:
    """Sum products over the last axis of `a` and the last but one of `b`."""
    if out is not None:
        raise TypeError("cannot record numpy.dot with out")
    ndim_a, ndim_b = np.ndim(a), np.ndim(b)
    if ndim_a == 0 or ndim_b == 0:
        return np.multiply(a, b)
    if ndim_a <= 2 and ndim_b <= 2:
        return np.matmul(a, b)
    return np.tensordot(a, b, ((ndim_a - 1,), (max(ndim_b - 2, 0),)))


@implements(np.tensordot)
def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    """Sum products over pairs of axes."""
    if isinstance(axes, int | np.integer):
        axes = (tuple(range(a.ndim - axes, a.ndim)), tuple(range(axes)))
    pairs = [(x,) if isinstance(x, int | np.integer) else tuple(x) for x in axes]
    left, right = [i % a.ndim for i in pairs[0]], [i % b.ndim for i in pairs[1]]
    keep_a = [i for i in range(a.ndim) if i not in left]
    keep_b = [i for i in range(b.ndim) if i not in right]
    shape = tuple(a.shape[i] for i in keep_a) + tuple(b.shape[i] for i in keep_b)
    inner = int(np.prod([a.shape[i] for i in left], dtype=np.intp))
    rows = int(np.prod([a.shape[i] for i in keep_a], dtype=np.intp))
    columns = int(np.prod([b.shape[i] for i in keep_b], dtype=np.intp))
    flat_a = np.reshape(np.transpose(a, (*keep_a, *left)), (rows, inner))
    flat_b = np.reshape(np.transpose(b, (*right, *keep_b)), (inner, columns))
    return np.reshape(np.matmul(flat_a, flat_b), shape)


@implements(np.inner)
def inner(a: Any, b: Any) -> Any:
    """Sum products over the last axes."""
    if np.ndim(a) == 0 or np.ndim(b) == 0:
        return np.multiply(a, b)
    return np.tensordot(a, b, (-1, -1))


@implements(np.outer)
def outer(a: Any, b: Any, out: Any = None) -> Any:
    """Multiply each element of `a` with each of `b`."""
    if out is not None:
        raise TypeError("cannot record numpy.outer with out")
    return np.expand_dims(np.ravel(a), 1) * np.ravel(b)


@implements(np.vdot)
def vdot(a: Any, b: Any) -> Any:
    """Sum products of all elements, those of `a` conjugate."""
    return np.matmul(np.conjugate(np.ravel(a)), np.ravel(b))


# ------------------------------------------------------------ einsum


def contract(*operands: Any, subscripts: str) -> Any:
    return np.einsum(subscripts, *operands, optimize=len(operands) > 2)


def contract_rule(position: int, g: Any, ans: Any, *operands: Any, subscripts: str) -> Any:
    """Contract the gradient with all other operands; summed-out letters are repeated."""
    inputs, output = subscripts.split("->")
    letters = inputs.split(",")
    own = letters[position]
    if len(set(own)) < len(own):
        raise TypeError(f"cannot differentiate numpy.einsum: {own!r} repeats a letter")
    others = [(t, conj(x)) for i, (t, x) in enumerate(zip(letters, operands, strict=True))
              if i != position]  # fmt: skip
    known = set(output).union(*(set(t) for t, _ in others))
    kept = "".join(letter for letter in own if letter in known)
    terms = ",".join([output, *(t for t, _ in others)])
    result = np.einsum(f"{terms}->{kept}", g, *(x for _, x in others))
    shape = operands[position].shape
    gaps = tuple(n if letter in known else 1 for letter, n in zip(own, shape, strict=True))
    return np.broadcast_to(np.reshape(result, gaps), shape)


EINSUM = defvjp(contract, variadic=contract_rule, name="einsum")


@implements(np.einsum)
def einsum(subscripts: Any, *operands: Any, out: Any = None, **options: Any) -> Any:
    """Sum products over named axes."""
    if out is not None or not isinstance(subscripts, str):
        raise TypeError("cannot record numpy.einsum with out or without a subscript text")
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "..." in inputs:
        terms, dots = name_dots(terms, operands)
        output = output.replace("...", dots) if arrow else output
        implicit = dots
    else:
        implicit = ""
    if not arrow:
        letters = sorted(set("".join(terms)) - set(implicit))
        output = implicit + "".join(x for x in letters if "".join(terms).count(x) == 1)
    return EINSUM(*operands, subscripts=f"{','.join(terms)}->{output}")


def name_dots(terms: list[str], operands: tuple[Any, ...]) -> tuple[list[str], str]:
    """Give the axes behind each ellipsis letters of their own."""
    used = set("".join(terms))
    free = [x for x in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if x not in used]
    depths = [np.ndim(x) - len(t.replace("...", "")) for t, x in zip(terms, operands, strict=True)]
    most = max(d for d, t in zip(depths, terms, strict=True) if "..." in t)
    dots = "".join(free[:most])
    return [t.replace("...", dots[most - d :]) for t, d in zip(terms, depths, strict=True)], dots


# ------------------------------------------------------------ matrices

defvjp(np.linalg.inv, lambda g, ans, x: -adjoint(ans) @ g @ adjoint(ans), needs=("a",))


def solve_matrix(g: Any, ans: Any, a: Any, b: Any) -> Any:
    if b.ndim == 1:
        return -np.expand_dims(np.linalg.solve(adjoint(a), g), -1) * conj(ans)
    return -np.linalg.solve(adjoint(a), g) @ adjoint(ans)


defvjp(
    np.linalg.solve,
    solve_matrix,
    lambda g, ans, a, b: np.linalg.solve(adjoint(a), g),
    needs=("xya", "x"),
)
defvjp(
    np.linalg.det,
    lambda g, ans, x: np.expand_dims(g * conj(ans), (-1, -2)) * adjoint(np.linalg.inv(x)),
    needs=("xa",),
)


def cholesky_rule(g: Any, ans: Any, x: Any, **options: Any) -> Any:
    """Murray, Differentiation of the Cholesky decomposition, 2016, in level-3 form."""
    middle = np.tril(adjoint(ans) @ g)
    middle = middle - np.eye(ans.shape[-1]) * middle / 2
    half = np.linalg.solve(adjoint(ans), adjoint(np.linalg.solve(adjoint(ans), adjoint(middle))))
    return (half + adjoint(half)) / 2


defvjp(np.linalg.cholesky, cholesky_rule, needs=("a",))


@implements(np.linalg.norm)
def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """Return the Euclidean norm over axes; a vector's ``inf``, ``1`` and other orders too."""
    if ord is None or (ord == 2 and (x.ndim == 1 or isinstance(axis, int))) or ord == "fro":
        return np.sqrt(np.sum(np.square(np.absolute(x)), axis=axis, keepdims=keepdims))
    if x.ndim != 1 and not isinstance(axis, int):
        raise TypeError(f"cannot differentiate numpy.linalg.norm of matrices with ord={ord!r}")
    if ord == np.inf:
        return np.max(np.absolute(x), axis=axis, keepdims=keepdims)
    return np.sum(np.absolute(x) ** ord, axis=axis, keepdims=keepdims) ** (1.0 / ord)
