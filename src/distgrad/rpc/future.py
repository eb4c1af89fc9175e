"""Futures: values that arrive later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from distgrad.rpc._future import DONE, FAILED, PENDING, Future

__all__ = ["DONE", "FAILED", "PENDING", "Future", "Running", "all_ended", "collect_all", "wait_all"]


class Running(Future):
    """The result of a coroutine, which runs on when its caller gives up."""


def wait_all(futures: Iterable[Future], timeout: float | None = None) -> list[Any]:
    """Wait for all futures and return their values in order.

    The first failure in that order raises, without waiting for the futures behind it; how
    those end needs nobody to look.
    """
    members = _checked(futures, "wait_all")
    deadline = None if timeout is None else time.monotonic() + timeout
    values = []
    for future in members:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            values.append(future.wait(left))
        except BaseException:
            if future.done():
                for other in members:
                    other._observed = True
            raise
    return values


def _checked(futures: Iterable[Future], what: str) -> list[Future]:
    if isinstance(futures, Future) or not isinstance(futures, Iterable):
        kind = type(futures).__name__
        raise TypeError(f"cannot {what} futures of type {kind}: expected a list of futures")
    members = list(futures)
    for i, member in enumerate(members):
        if not isinstance(member, Future):
            raise TypeError(
                f"cannot {what} futures: futures[{i}] is {type(member).__name__}, not a Future"
            )
    return members


def collect_all(futures: Iterable[Future]) -> Future:
    """Return a future of the list of futures, complete when all of them are.

    It fails as soon as one of them does, and as that one did; how the others end needs
    nobody to look.
    """
    members = _checked(futures, "collect_all")
    gathered = Future()

    def one_done(member: Future) -> None:
        if member._state == FAILED:
            gathered._try_complete(FAILED, member.exception())

    for member in members:
        member.add_done_callback(one_done, inline=True)
    all_ended(members, lambda _: gathered._try_complete(DONE, members))
    return gathered


def all_ended(futures: Iterable[Future], action: Callable[[list[Future]], object]) -> None:
    """Call ``action(futures)`` once all are complete, on the thread that completes the last."""
    members = list(futures)
    left = list(range(len(members) + 1))  # one is taken a completion, which needs no lock

    def one_done(_: Future | None) -> None:
        if left.pop() == 0:
            action(members)

    for member in members:
        member.add_done_callback(one_done, inline=True)
    one_done(None)
