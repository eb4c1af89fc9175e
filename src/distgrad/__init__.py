"""Distributed reverse-mode autograd on NumPy arrays.

Tensors and local gradients live here; `distgrad.rpc`, `distgrad.autograd`, `distgrad.optim`
and the other parts load when they are first touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distgrad import ops as _ops  # noqa: F401  (registers the gradient rules)
from distgrad._core import (
    Node,
    Tensor,
    enable_grad,
    grad,
    is_grad_enabled,
    no_grad,
    set_grad_enabled,
)
from distgrad.errors import DistgradError, GraphError
from distgrad.ops.creation import (
    arange,
    empty,
    empty_like,
    eye,
    from_numpy,
    full,
    full_like,
    linspace,
    ones,
    ones_like,
    tensor,
    zeros,
    zeros_like,
)
from distgrad.ops.custom import Function, primitive

__version__ = "0.1.0"

__all__ = [
    "DistgradError",
    "Function",
    "GraphError",
    "Node",
    "Tensor",
    "arange",
    "autograd",
    "config",
    "empty",
    "empty_like",
    "enable_grad",
    "eye",
    "from_numpy",
    "full",
    "full_like",
    "functional",
    "grad",
    "is_grad_enabled",
    "linspace",
    "no_grad",
    "ones",
    "ones_like",
    "optim",
    "primitive",
    "rpc",
    "set_grad_enabled",
    "tensor",
    "testing",
    "zeros",
    "zeros_like",
]

_PARTS = ("autograd", "functional", "optim", "rpc", "testing", "transport")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"distgrad.{name}")
    raise AttributeError(f"module 'distgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
