"""What a distributed optimizer leaves on a worker that owns parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distgrad import autograd
from distgrad.optim.adam import Adam, AdamW
from distgrad.optim.adaptive import Adadelta, Adagrad, Adamax, RMSprop, Rprop
from distgrad.optim.optimizer import Array, Gradients, Optimizer, PreparedStep, Work
from distgrad.optim.sgd import SGD
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
        self._staged: dict[str, Any] | None = None
        worker.extensions["optim"].add(number, self)

    def settings(self) -> list[dict[str, Any]]:
        """Return the settings of each group."""
        return [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]

    def step(self, gradients: Gradients, settings: Sequence[dict[str, Any]]) -> None:
        """Step in place, at once."""
        self._optimizer.change_settings(settings)
        self._optimizer.step(gradients)

    def gather(self, gradients: Gradients) -> list[Work]:
        """Find the parameters that have gradients."""
        return self._optimizer.gather(gradients)

    def prepare(self, work: Sequence[Work], settings: Sequence[dict[str, Any]]) -> PreparedStep:
        """Compute a step of what was gathered aside."""
        self._optimizer.change_settings(settings)
        return self._optimizer.prepare_gathered(work)

    def square_of_gradients(self, context_id: int) -> float:
        """Return the sum of squares of all gradients of the parameters in a context."""
        arrays = self._gradients(context_id)
        return float(sum(np.vdot(array, array).real for array in arrays))

    def scale_gradients(self, context_id: int, factor: float) -> None:
        """Multiply all gradients of the parameters in a context, in place."""
        for array in self._gradients(context_id):
            array *= factor

    def _gradients(self, context_id: int) -> list[Array]:
        """Return the gradients of the parameters, to be read or written."""
        if not autograd.is_valid_context(context_id):
            return []
        gathered = self.gather(autograd.get_gradients(context_id))
        return [array for _, _, arrays in gathered for array in arrays]

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state."""
        return self._optimizer.state_dict()

    def stage_state(self, state_dict: dict[str, Any]) -> None:
        """Keep a state that can be loaded until it is known whether all owners have one."""
        self._optimizer.check_state_dict(state_dict)
        self._staged = state_dict

    def settle_state(self, wanted: bool) -> None:
        """Take over the state that was staged, or let go of it."""
        staged, self._staged = self._staged, None
        if wanted and staged is not None:
            self._optimizer.load_state_dict(staged)


def _with_tensors(group: dict[str, Any]) -> dict[str, Any]:
    rrefs: list[RRef] = group["params"]
    return {**group, "params": [rref.local_value() for rref in rrefs]}
