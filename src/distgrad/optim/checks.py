"""What settings and groups of an optimizer must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["check_at_least", "check_betas", "check_groups", "check_pair"]


def check_at_least(low: float, **settings: float) -> None:
    """Raise ValueError for a setting below ``low``."""
    for name, value in settings.items():
        try:
            fits = bool(value >= low)
        except (TypeError, ValueError):
            raise TypeError(f"cannot use {name}={value!r}: expected a number") from None
        if not fits:
            raise ValueError(f"cannot use {name}={value!r}: it must be at least {low:g}")


def check_pair(name: str, pair: Any, fits: Callable[[Any, Any], bool], expected: str) -> None:
    """Raise ValueError for a setting that is not two numbers as expected."""
    try:
        first, second = pair
        good = bool(fits(first, second))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"cannot use {name}={pair!r}: {expected}")


def check_betas(betas: Any) -> None:
    """Raise ValueError for what cannot be the betas of the Adam family."""
    expected = "there are two, each must be in [0, 1)"
    check_pair("betas", betas, lambda a, b: 0 <= a < 1 and 0 <= b < 1, expected)


def check_groups(groups: Sequence[Any]) -> None:
    """Raise TypeError for what is no parameter group."""
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(
                f"cannot use parameter group {number}: expected a dict with 'params', as the "
                f"first one is, not {group!r}"
            )
