"""Operations of the user: `primitive` for functions on arrays, `Function` for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distgrad._core import (
    Node,
    Op,
    Tensor,
    gradient_edge,
    is_grad_enabled,
    no_grad,
    set_history,
)
from distgrad.errors import GraphError

__all__ = ["Context", "Function", "primitive"]


def primitive(function: Callable[..., Any]) -> Op:
    """Make an operation of a function on arrays; give it gradient rules with ``defvjp``.

    ``f.defvjp(rule0, rule1, …)`` takes one rule for each argument, None for an argument
    without gradient; ``rule(g, ans, *args, **kwargs)`` returns the gradient of its argument.

    Examples
    --------
    >>> @primitive
    ... def scale(x, factor):
    ...     return x * factor
    >>> scale.defvjp(lambda g, ans, x, factor: g * factor, None)
    Op(scale)
    """
    return Op(function)


class Context(Node):
    """What ``forward`` hands to ``backward``; also the node of the graph.

    Attributes
    ----------
    needs_input_grad
        For each argument of ``forward`` whether its gradient is wanted.
    """

    needs_input_grad: tuple[bool, ...] = ()

    def __init__(self) -> None:
        self._function: type[Function] = Function
        self._saved: tuple[Any, ...] | None = ()
        self._versions: tuple[int, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._like: list[tuple[tuple[int, ...], Any]] = []
        self._fill = True
        self._constant: set[int] = set()

    def name(self) -> str:
        """Return the name of the function's class and ``Backward``."""
        return f"{self._function.__name__}Backward"

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep arguments or results of ``forward``; writing to them later is an error."""
        self._saved = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Say which results never require grad."""
        self._constant = {id(tensor) for tensor in tensors}

    def set_materialize_grads(self, value: bool) -> None:
        """Say whether missing gradients of results are zeros (the default) or None."""
        self._fill = value

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        """What ``save_for_backward`` kept."""
        if self._saved is None:
            raise GraphError(
                f"cannot run backward through {self.name()}: an earlier pass freed its values",
                hint="pass retain_graph=True to the earlier pass",
            )
        values = tuple(self._restore(value) for value in self._saved)
        versions = tuple(0 if value is None else value._version for value in values)
        if self._versions and versions != self._versions:
            raise GraphError(
                f"cannot run backward through {self.name()}: a value it saved was modified",
                hint="write into a copy: tensor.clone()",
            )
        return values

    def _restore(self, value: Any) -> Tensor | None:
        """Return a saved result with its history; nodes do not hold their own results."""
        if not isinstance(value, tuple):
            return value  # type: ignore[no-any-return]
        plain, slot = value
        result = Tensor(plain)
        set_history(result, self, slot)
        return result

    def _connect(self, args: Sequence[Any], outputs: tuple[Tensor, ...]) -> None:
        wanted = self.needs_input_grad
        edges = [
            gradient_edge(arg) if want else (None, 0)
            for arg, want in zip(args, wanted, strict=True)
        ]
        Node.__init__(self, edges, len(outputs))
        self.writes = True
        self._like = [(output.shape, output.dtype) for output in outputs]
        slots = {id(output): i for i, output in enumerate(outputs)}
        self._saved = tuple(
            (value.data, slots[id(value)]) if id(value) in slots else value
            for value in self._saved or ()
        )
        for i, output in enumerate(outputs):
            if id(output) not in self._constant and output.dtype.kind in "fc":
                set_history(output, self, i)
        self._versions = tuple(
            value._version if isinstance(value, Tensor) else 0 for value in self._saved
        )

    def apply(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run the function's ``backward``."""
        filled = [
            Tensor(np.zeros(*like)) if g is None and self._fill else g
            for g, like in zip(grads, self._like, strict=True)
        ]
        tensors = [g if g is None or isinstance(g, Tensor) else Tensor(g) for g in filled]
        results = self._function.backward(self, *tensors)
        return results if isinstance(results, tuple) else (results,)

    def release(self) -> None:
        """Drop saved tensors."""
        if self._saved:
            self._saved = None


class Function:
    """An operation given by two static methods; call it as ``MyFunction.apply(*args)``.

    Examples
    --------
    >>> class Scale(Function):
    ...     @staticmethod
    ...     def forward(ctx, x, factor):
    ...         ctx.factor = factor
    ...         return x * factor
    ...     @staticmethod
    ...     def backward(ctx, g):
    ...         return g * ctx.factor, None
    """

    @staticmethod
    def forward(ctx: Context, *args: Any, **kwargs: Any) -> Any:
        """Compute a Tensor or a tuple of them; operations inside are not recorded."""
        raise NotImplementedError("cannot apply a Function: it has no forward")

    @staticmethod
    def backward(ctx: Context, *grads: Any) -> Any:
        """Return a gradient or None for each argument, from those of the results."""
        raise NotImplementedError("cannot run a Function backward: it has no backward")

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` and record the function as one node."""
        ctx = Context()
        ctx._function = cls
        ctx.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
        with no_grad():
            results = cls.forward(ctx, *args, **kwargs)
        outputs = results if isinstance(results, tuple) else (results,)
        if not (is_grad_enabled() and any(ctx.needs_input_grad)):
            return results
        given = {id(arg) for arg in args if isinstance(arg, Tensor)}
        outputs = tuple(output.detach() if id(output) in given else output for output in outputs)
        ctx._connect(args, outputs)
        return outputs if isinstance(results, tuple) else outputs[0]
