"""Worlds, gradient checks and the transport contract, for tests of all kinds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgrad.testing.gradients import gradcheck, gradgradcheck
    from distgrad.testing.world import World

__all__ = ["World", "gradcheck", "gradgradcheck"]

_HOMES = {"World": "world", "gradcheck": "gradients", "gradgradcheck": "gradients"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
