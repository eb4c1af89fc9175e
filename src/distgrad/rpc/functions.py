"""Decorators for functions that are called remotely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["async_execution"]

F = TypeVar("F", bound=Callable[..., Any])


def async_execution(function: F) -> F:
    """Let a function answer later: it returns a `Future`, and the answer is its result.

    No thread waits in between. Put this decorator below `expose`, `staticmethod` and
    `classmethod`.
    """
    function._distgrad_answers_later = True  # type: ignore[attr-defined]
    return function


def answers_later(function: Any) -> bool:
    """Return whether a function was decorated with `async_execution`."""
    return bool(getattr(function, "_distgrad_answers_later", False))
