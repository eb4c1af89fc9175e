"""The core: tensors, the graph they leave behind, and the backward pass over it."""

from distgrad._core.engine import GraphTask, grad
from distgrad._core.gradient import GradientTable
from distgrad._core.node import (
    AccumulateGrad,
    Node,
    Op,
    RemovableHandle,
    Spec,
    enable_grad,
    gradient_edge,
    is_grad_enabled,
    no_grad,
    operation,
    register,
    registered,
    set_grad_enabled,
    set_history,
)
from distgrad._core.tensor import Tensor

__all__ = [
    "AccumulateGrad",
    "GradientTable",
    "GraphTask",
    "Node",
    "Op",
    "RemovableHandle",
    "Spec",
    "Tensor",
    "enable_grad",
    "grad",
    "gradient_edge",
    "is_grad_enabled",
    "no_grad",
    "operation",
    "register",
    "registered",
    "set_grad_enabled",
    "set_history",
]
