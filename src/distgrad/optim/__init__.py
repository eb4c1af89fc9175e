"""Optimizers: update parameters from ``.grad``, given gradients, or a distributed context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distgrad.optim import lr_scheduler
from distgrad.optim.adam import Adam, AdamW
from distgrad.optim.adaptive import Adadelta, Adagrad, Adamax, RMSprop, Rprop
from distgrad.optim.clip import clip_grad_norm_
from distgrad.optim.optimizer import Optimizer
from distgrad.optim.sgd import SGD

if TYPE_CHECKING:
    from distgrad.optim.distributed import DistributedOptimizer
    from distgrad.rpc import Worker

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "DistributedOptimizer",
    "Optimizer",
    "RMSprop",
    "Rprop",
    "clip_grad_norm_",
    "install",
    "lr_scheduler",
]


def install(worker: Worker) -> None:
    """Let a worker take part in distributed steps; rpc calls this when a worker starts."""
    from distgrad.optim import part  # noqa: F401  (exposes what distributed optimizers call)
    from distgrad.optim.steps import StepTable

    worker.extensions["optim"] = StepTable(worker)


def __getattr__(name: str) -> Any:
    # Loaded on first touch: who optimizes locally needs no remote calls.
    if name == "DistributedOptimizer":
        from distgrad.optim.distributed import DistributedOptimizer

        return DistributedOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
