"""Decorators for functions that are called remotely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["async_execution"]

#: The attribute that marks such a function.
ANSWERS_LATER = "_distgrad_answers_later"

F = TypeVar("F", bound=Callable[..., Any])


def async_execution(function: F) -> F:
    """Let a function answer later: it returns a `Future`, and the answer is its result.

    No thread waits in between. Put this decorator below `expose`, `staticmethod` and
    `classmethod`.
    """
    setattr(function, ANSWERS_LATER, True)
    return function
