"""What a distributed optimizer leaves on a worker that owns parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distgrad._core import Tensor
from distgrad.optim.adam import Adam, AdamW
from distgrad.optim.adaptive import Adadelta, Adagrad, Adamax, RMSprop, Rprop
from distgrad.optim.optimizer import Optimizer, PreparedStep
from distgrad.optim.sgd import SGD
from distgrad.optim.steps import gradients_of
from distgrad.rpc import current_worker, expose
from distgrad.rref import RRef

__all__ = ["OptimizerPart"]

for _optimizer in (SGD, Adam, AdamW, Adagrad, RMSprop, Adadelta, Adamax, Rprop):
    expose(_optimizer)


@expose
class OptimizerPart:
    """The optimizer of one owner, driven by a `distgrad.optim.DistributedOptimizer`.

    Parameters
    ----------
    number
        Id of the distributed optimizer.
    optimizer
        Name of the optimizer's class, which this worker must expose.
    groups
        Parameter groups with RRefs to tensors of this worker.
    args, kwargs
        Further arguments of the class.
    """

    def __init__(
        self,
        number: int,
        optimizer: str,
        groups: Sequence[dict[str, Any]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        worker = current_worker()
        cls = worker.exposure.resolve(optimizer)
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise TypeError(f"cannot optimize with {optimizer}: it is no Optimizer")
        self._optimizer = cls([_with_tensors(group) for group in groups], *args, **kwargs)
        worker.extensions["optim"].add(number, self)

    def settings(self) -> list[dict[str, Any]]:
        """Return the settings of each group."""
        return [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]

    def params_with(self, gradients: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """Return the parameters that have gradients."""
        return [
            param
            for group in self._optimizer.param_groups
            for param in group["params"]
            if param in gradients
        ]

    def step(self, gradients: Mapping[Tensor, Tensor], settings: Sequence[dict[str, Any]]) -> None:
        """Step in place, at once."""
        self._change(settings)
        self._optimizer.step(gradients)

    def prepare(
        self, gradients: Mapping[Tensor, Tensor], settings: Sequence[dict[str, Any]]
    ) -> PreparedStep:
        """Compute a step aside."""
        self._change(settings)
        return self._optimizer.prepare(gradients)

    def _change(self, settings: Sequence[dict[str, Any]]) -> None:
        for group, changed in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(changed)

    def square_of_gradients(self, context_id: int) -> float:
        """Return the sum of squares of all gradients of the parameters in a context."""
        gradients = gradients_of(context_id)
        arrays = [gradients[param].data for param in self.params_with(gradients)]
        return float(sum(np.vdot(array, array).real for array in arrays))

    def scale_gradients(self, context_id: int, factor: float) -> None:
        """Multiply all gradients of the parameters in a context, in place."""
        gradients = gradients_of(context_id)
        for param in self.params_with(gradients):
            gradients[param].data[...] *= factor

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self._optimizer.load_state_dict(state_dict)


def _with_tensors(group: dict[str, Any]) -> dict[str, Any]:
    rrefs: list[RRef] = group["params"]
    return {**group, "params": [rref.local_value() for rref in rrefs]}
