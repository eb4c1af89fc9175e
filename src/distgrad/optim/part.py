"""What a distributed optimizer does on a worker that owns parameters.

A step has two phases there. `OptimizerPart.prepare` locks the parameters and computes
their new values aside; `commit` puts these in place, `abort` drops them. Both give the
locks back. A step whose coordinator is lost in between is aborted.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distgrad import autograd
from distgrad._core import Tensor
from distgrad.errors import DistgradError
from distgrad.optim.adam import Adam, AdamW
from distgrad.optim.adaptive import Adadelta, Adagrad, Adamax, RMSprop, Rprop
from distgrad.optim.locks import LockTable
from distgrad.optim.optimizer import Optimizer, PreparedStep
from distgrad.optim.sgd import SGD
from distgrad.rpc import Future, Worker, current_worker, expose, functions
from distgrad.rref import RRef

__all__ = ["OptimizerPart", "StepTable"]

for _optimizer in (SGD, Adam, AdamW, Adagrad, RMSprop, Adadelta, Adamax, Rprop):
    expose(_optimizer)


class StepTable:
    """The steps of distributed optimizers that are under way at one worker.

    Parameters
    ----------
    worker
        Whose parameters are written. Steps of lost workers are aborted.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._locks = LockTable()
        self._granted: dict[int, Future] = {}  # waiting step -> future of True
        self._prepared: dict[int, PreparedStep] = {}
        self._begun: set[int] = set()
        self._aborted: set[int] = set()  # before they began
        self._lost: set[int] = set()  # workers
        worker.on_lost.append(self._on_lost)

    def begin(self, step: int, params: Sequence[Tensor], wait: bool) -> Future:
        """Lock parameters for a step; a future of whether that was possible."""
        keys = frozenset(map(id, params))
        granted = Future(agent=self._worker.agent)
        with self._lock:
            if step in self._aborted or step >> 48 in self._lost:
                self._aborted.discard(step)
                raise DistgradError(f"cannot prepare step {step:#x}: it was aborted")
            outcome = self._locks.acquire(step, keys, wait)
            if outcome or wait:
                self._begun.add(step)
            if wait and not outcome:
                self._granted[step] = granted
                return granted
        granted.set_result(outcome)
        return granted

    def keep(self, step: int, prepared: PreparedStep) -> None:
        """Keep the outcome of a step until it is committed or aborted."""
        with self._lock:
            if step in self._begun:
                self._prepared[step] = prepared

    def commit(self, step: int) -> None:
        """Apply a step and give its locks back."""
        with self._lock:
            prepared = self._prepared.pop(step, None)
        if prepared is None:
            raise DistgradError(f"cannot commit step {step:#x}: it is not prepared here")
        prepared.commit()
        self.end(step)

    def end(self, step: int) -> None:
        """Forget a step and give its locks back, wherever it stands."""
        with self._lock:
            if step not in self._begun:
                self._aborted.add(step)
                return
            self._begun.discard(step)
            self._prepared.pop(step, None)
            given_up = self._granted.pop(step, None)
            granted = [self._granted.pop(other) for other in self._locks.release(step)]
        if given_up is not None:
            given_up.set_result(False)
        for future in granted:
            future.set_result(True)

    def _on_lost(self, peer: int, reason: Exception) -> None:
        with self._lock:
            self._lost.add(peer)
            self._aborted = {step for step in self._aborted if step >> 48 != peer}
            orphans = [step for step in self._begun if step >> 48 == peer]
        for step in orphans:
            self.end(step)

    def debug_info(self) -> dict[str, int]:
        """Return counters; all are 0 while no step is under way."""
        return {"optim.steps": len(self._begun), "optim.locks": len(self._locks)}


@expose
class OptimizerPart:
    """The optimizer of one owner, driven by a `distgrad.optim.DistributedOptimizer`.

    Parameters
    ----------
    optimizer
        Name of the optimizer's class, which this worker must expose.
    groups
        Parameter groups with RRefs to tensors of this worker.
    args, kwargs
        Further arguments of the class.
    """

    def __init__(
        self,
        optimizer: str,
        groups: Sequence[dict[str, Any]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        worker = current_worker()
        cls = worker.exposure.resolve(optimizer)
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise TypeError(f"cannot optimize with {optimizer}: it is no Optimizer")
        self._steps: StepTable = worker.extensions["optim"]
        self._optimizer = cls([_with_tensors(group) for group in groups], *args, **kwargs)

    def settings(self) -> list[dict[str, Any]]:
        """Return the settings of each group."""
        return [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]

    @functions.async_execution
    def prepare(
        self, step: int, context_id: int, settings: Sequence[dict[str, Any]], wait: bool
    ) -> Future:
        """Lock the parameters that have gradients in a context and compute their new values.

        Returns
        -------
        Future
            True once that is done; False if another step holds them and ``wait`` is false.
        """
        gradients = _gradients(context_id)
        params = [
            param
            for group in self._optimizer.param_groups
            for param in group["params"]
            if param in gradients
        ]
        granted = self._steps.begin(step, params, wait)
        return granted.then(
            lambda granted: granted.wait() and self._prepare(step, gradients, settings)
        )

    def _prepare(
        self, step: int, gradients: dict[Tensor, Tensor], settings: Sequence[dict[str, Any]]
    ) -> bool:
        try:
            for group, changed in zip(self._optimizer.param_groups, settings, strict=True):
                group.update(changed)
            self._steps.keep(step, self._optimizer.prepare(gradients))
        except BaseException:
            self._steps.end(step)
            raise
        return True

    def commit(self, step: int) -> None:
        """Apply a prepared step."""
        self._steps.commit(step)

    def abort(self, step: int) -> None:
        """Drop a step, whether it is prepared or not."""
        self._steps.end(step)

    def square_of_gradients(self, context_id: int) -> float:
        """Return the sum of squares of all gradients of the parameters in a context."""
        gradients = _gradients(context_id)
        return float(
            sum(
                np.vdot(gradients[param].data, gradients[param].data).real
                for group in self._optimizer.param_groups
                for param in group["params"]
                if param in gradients
            )
        )

    def scale_gradients(self, context_id: int, factor: float) -> None:
        """Multiply all gradients of the parameters in a context, in place."""
        gradients = _gradients(context_id)
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param in gradients:
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


def _gradients(context_id: int) -> dict[Tensor, Tensor]:
    """Return the gradients of a context; none where it never reached this worker."""
    if not autograd.is_valid_context(context_id):
        return {}
    return autograd.get_gradients(context_id)
