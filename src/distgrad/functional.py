"""Derivatives of functions, for those who prefer them to ``backward``.

The functions here leave ``.grad`` alone. Given tensors that require grad, their results are
recorded and may be differentiated again, so they nest: ``jacobian(jacobian(f))``. What a
function closes over counts as constant, except in `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distgrad._core import (
    AccumulateGrad,
    Node,
    Tensor,
    enable_grad,
    grad,
    gradient_edge,
    is_grad_enabled,
    set_history,
)
from distgrad.errors import GraphError

__all__ = [
    "checkpoint",
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "value_and_grad",
    "vjp",
]

Function = Callable[..., Tensor]


def _is_tracked(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and is_grad_enabled()


def _variable(value: Any) -> Tensor:
    """Return a tensor over the same values to differentiate by.

    It is a view of a tensor that requires grad, which is how derivatives nest; otherwise a
    fresh leaf, so that the caller's tensors are left alone.
    """
    if _is_tracked(value):
        tensor: Tensor = value.reshape(value.shape)
        return tensor
    plain = value.detach() if isinstance(value, Tensor) else Tensor(np.asarray(value))
    return plain.requires_grad_()


def _filled(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient, or if there is none, zeros."""
    return Tensor(np.zeros(like.shape, like.dtype)) if gradient is None else gradient


def _along(
    gradients: Sequence[Tensor],
    tangents: Sequence[Any],
    variables: Sequence[Tensor],
    create_graph: bool,
) -> tuple[Tensor, ...]:
    """Return the derivatives of gradients along tangents, summed, by each variable."""
    pairs = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g.requires_grad]
    found: tuple[Any, ...] = (None,) * len(variables)
    if pairs:
        outputs, seeds = zip(*pairs, strict=True)
        found = grad(outputs, variables, seeds, create_graph=create_graph, allow_unused=True)
    return tuple(map(_filled, found, variables))


class _Call:
    """One evaluation of a function at variables of its own."""

    def __init__(
        self, f: Function, args: Sequence[Any], kwargs: dict[str, Any], positions: Sequence[int]
    ) -> None:
        self.nested = any(map(_is_tracked, (*args, *kwargs.values())))
        self.variables = [_variable(args[i]) for i in positions]
        arguments = list(args)
        for i, variable in zip(positions, self.variables, strict=True):
            arguments[i] = variable
        with enable_grad():
            self.value = f(*arguments, **kwargs)
        if not isinstance(self.value, Tensor):
            raise TypeError(
                f"cannot differentiate {getattr(f, '__name__', f)}: it returned "
                f"{type(self.value).__name__}, not a Tensor"
            )

    def result(self) -> Tensor:
        return self.value if self.nested else self.value.detach()

    def pull(self, cotangent: Any = None, *, create_graph: bool = False) -> tuple[Tensor, ...]:
        """Return one gradient a variable, zeros where the value does not depend on it."""
        found: tuple[Any, ...] = (None,) * len(self.variables)
        if self.value.requires_grad:
            found = grad(
                self.value,
                self.variables,
                None if cotangent is None else [cotangent],
                retain_graph=True,
                create_graph=create_graph or self.nested,
                allow_unused=True,
            )
        return tuple(map(_filled, found, self.variables))

    def push(self, tangents: Sequence[Any]) -> Tensor:
        """Return the derivative along `tangents`: that of the gradient by its cotangent."""
        with enable_grad():
            seed = Tensor(np.zeros(self.value.shape, self.value.dtype), requires_grad=True)
            gradients = self.pull(seed, create_graph=True)
        return _along(gradients, tangents, [seed], self.nested)[0]


def value_and_grad(
    f: Function, argnums: int | Sequence[int] = 0
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
        call = _Call(f, args, kwargs, positions)
        gradients = call.pull()
        return call.result(), gradients[0] if isinstance(argnums, int) else gradients

    return run


def vjp(f: Function, *primals: Any) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """Return f(*primals) and the function that pulls a cotangent of it back.

    Returns
    -------
    value : Tensor
    pullback : Callable
        Takes a gradient in the shape of `value`, returns one for each primal; it may be
        called again.
    """
    call = _Call(f, primals, {}, range(len(primals)))
    return call.result(), call.pull


def jvp(f: Function, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return f(*primals) and its derivative along `tangents`.

    It costs about two backward passes: the derivative is that of a gradient by its cotangent.

    Parameters
    ----------
    f
        Returns a tensor of any shape.
    primals, tangents
        Arguments of `f`, and for each of them a direction in its shape.

    Returns
    -------
    value, derivative : Tensor
        Both in the shape of f(*primals).
    """
    call = _Call(f, primals, {}, range(len(primals)))
    return call.result(), call.push(tangents)


def hvp(
    f: Function, primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return f(*primals) and the product of its Hessian with `tangents`.

    Parameters
    ----------
    f
        Returns a tensor with one element.
    primals, tangents
        Arguments of `f`, and for each of them a direction in its shape.

    Returns
    -------
    value : Tensor
    products : tuple of Tensor
        One for each primal, in its shape.
    """
    call = _Call(f, primals, {}, range(len(primals)))
    gradients = call.pull(create_graph=True)
    return call.result(), _along(gradients, tangents, call.variables, call.nested)


def jacobian(f: Function, argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """Return a function that computes the derivatives of all elements of f.

    Each element of the value costs one backward pass.

    Parameters
    ----------
    f
        Returns a tensor of any shape.
    argnums
        Position, or positions, of the arguments to differentiate.

    Returns
    -------
    Callable
        A tensor of shape ``value.shape + argument.shape``; a tuple of them if `argnums` is a
        sequence.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def run(*args: Any, **kwargs: Any) -> Any:
        call = _Call(f, args, kwargs, positions)
        rows = []
        for i in range(call.value.size):
            seed = np.zeros(call.value.shape, call.value.dtype)
            seed.reshape(-1)[i] = 1
            rows.append(call.pull(seed))
        results = tuple(
            np.reshape(np.stack([row[k] for row in rows]), call.value.shape + variable.shape)
            if rows
            else Tensor(np.zeros(call.value.shape + variable.shape, variable.dtype))
            for k, variable in enumerate(call.variables)
        )
        return results[0] if isinstance(argnums, int) else results

    return run


def hessian(f: Function, argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """Return a function that computes the second derivatives of f.

    Parameters
    ----------
    f
        Returns a tensor with one element.
    argnums
        Position, or positions, of the arguments to differentiate.

    Returns
    -------
    Callable
        A tensor of shape ``argument.shape + argument.shape``; a tuple of tuples of tensors,
        one for each pair of arguments, if `argnums` is a sequence.
    """

    def gradient(position: int) -> Function:
        return lambda *args, **kwargs: value_and_grad(f, position)(*args, **kwargs)[1]

    if isinstance(argnums, int):
        return jacobian(gradient(argnums), argnums)
    by_row = [jacobian(gradient(i), argnums) for i in argnums]
    return lambda *args, **kwargs: tuple(row(*args, **kwargs) for row in by_row)


# ------------------------------------------------------------ memory for time


class _Checkpoint(Node):
    """Calls its function again when its gradient is needed, instead of keeping its graph."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
        self._call: Any = (f, args, kwargs)
        self._versions = [a._version for a in args if isinstance(a, Tensor)]
        self._positions = [i for i, a in enumerate(args) if _is_tracked(a)]
        self._leaves: list[Tensor] = []
        mark = Node()
        variables, outputs = self._run(nested=False)
        leaves = _closed_over(outputs, variables, mark)
        edges = [gradient_edge(args[i]) for i in self._positions]
        Node.__init__(self, [*edges, *map(gradient_edge, leaves)], len(outputs))
        self._leaves = leaves
        self.outputs = [Tensor(output.data) for output in outputs]
        for i, output in enumerate(outputs):
            if output.requires_grad and (edges or leaves):
                set_history(self.outputs[i], self, i)

    def name(self) -> str:
        return "CheckpointBackward"

    def _run(self, *, nested: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        f, args, kwargs = self._call
        with enable_grad():
            variables = [
                _variable(args[i] if nested else args[i].detach()) for i in self._positions
            ]
            arguments = list(args)
            for i, variable in zip(self._positions, variables, strict=True):
                arguments[i] = variable
            results = f(*arguments, **kwargs)
        return variables, results if isinstance(results, tuple) else (results,)

    def apply(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run the function, recorded, and differentiate it."""
        if self._call is None:
            raise GraphError(
                "cannot run backward through checkpoint: an earlier pass freed its arguments",
                hint="pass retain_graph=True to the earlier pass",
            )
        if self._versions != [a._version for a in self._call[1] if isinstance(a, Tensor)]:
            raise GraphError("cannot run backward through checkpoint: an argument was modified")
        create_graph = is_grad_enabled()
        variables, outputs = self._run(nested=create_graph)
        given = [
            (output, g)
            for output, g in zip(outputs, grads, strict=True)
            if g is not None and output.requires_grad
        ]
        return grad(
            [output for output, _ in given],
            [*variables, *self._leaves],
            [g for _, g in given],
            create_graph=create_graph,
            allow_unused=True,
        )

    def release(self) -> None:
        """Drop the arguments."""
        self._call = None


def _closed_over(
    outputs: Sequence[Tensor], variables: Sequence[Tensor], mark: Node
) -> list[Tensor]:
    """Return the leaves, other than `variables`, that outputs made since `mark` depend on."""
    own = {id(variable) for variable in variables}
    found: dict[int, Tensor] = {}
    node: Any
    seen: set[Node | None] = {None}
    ahead: list[Node | None] = [gradient_edge(o)[0] for o in outputs if o.requires_grad]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, AccumulateGrad):
            if id(node.variable) not in own:
                found[id(node.variable)] = node.variable
        elif node._sequence_nr() < mark._sequence_nr():
            raise GraphError(
                f"cannot checkpoint: the function uses a result of {node.name()} that is not "
                "among its arguments",
                hint="pass it as an argument",
            )
        ahead += [target for target, _ in node.next_functions]
    return list(found.values())


def checkpoint(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return f(*args, **kwargs) without keeping its graph: it runs again during backward.

    Parameters
    ----------
    f
        Returns a tensor or a tuple of them, the same ones for the same arguments. Leaves that
        it closes over, such as the weights of a layer, get their gradients too.
    args
        Tensors among them that require grad get gradients; they are kept until backward.
    kwargs
        Passed on.

    Returns
    -------
    Tensor or tuple of Tensor

    Raises
    ------
    GraphError
        If `f` uses a computed tensor that is not among `args`.
    """
    if not is_grad_enabled():
        return f(*args, **kwargs)
    node = _Checkpoint(f, args, kwargs)
    outputs = tuple(node.__dict__.pop("outputs"))
    return outputs if len(outputs) > 1 else outputs[0]
