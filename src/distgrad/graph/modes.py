"""Whether operations are recorded: a context variable, so it follows threads and tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any, Self, TypeVar

__all__ = ["enable_grad", "grad_mode", "is_grad_enabled", "no_grad", "set_grad_enabled"]

F = TypeVar("F", bound=Callable[..., Any])

#: True while operations are recorded.
grad_mode: ContextVar[bool] = ContextVar("distgrad.grad_mode", default=True)


def is_grad_enabled() -> bool:
    """Tell whether operations are recorded in this thread or task."""
    return grad_mode.get()


class _GradMode(ContextDecorator):
    """Switch recording inside a ``with`` block or a decorated function; may be entered again."""

    mode = True

    def __init__(self) -> None:
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> Self:
        self._tokens.append(grad_mode.set(self.mode))
        return self

    def __exit__(self, *exc: object) -> None:
        grad_mode.reset(self._tokens.pop())

    def _recreate_cm(self) -> _GradMode:
        return type(self)()


class no_grad(_GradMode):
    """Do not record operations: context manager and decorator."""

    mode = False


class enable_grad(_GradMode):
    """Record operations, also inside `no_grad`: context manager and decorator."""


class set_grad_enabled(_GradMode):
    """Switch recording on or off at once; as a context manager, restore it on leaving.

    Parameters
    ----------
    mode
        Whether operations are recorded.
    """

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.mode = bool(mode)
        self._tokens.append(grad_mode.set(self.mode))

    def __enter__(self) -> Self:
        return self

    def __call__(self, function: F) -> F:
        """Decorate: undo the switch now, and make it again during each call."""
        self.__exit__()
        switch = enable_grad if self.mode else no_grad
        return switch()(function)
