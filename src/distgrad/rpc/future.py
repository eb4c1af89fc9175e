"""Futures: values that arrive later."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from distgrad.rpc._future import DONE, FAILED, PENDING, Future

__all__ = ["DONE", "FAILED", "PENDING", "Future", "collect_all", "wait_all"]


def wait_all(futures: Iterable[Future], timeout: float | None = None) -> list[Any]:
    """Wait for all futures and return their values in order; the first failure raises."""
    deadline = None if timeout is None else time.monotonic() + timeout
    return [
        f.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        for f in list(futures)
    ]


def collect_all(futures: Iterable[Future]) -> Future:
    """Return a future of the list of futures, complete when all of them are."""
    members = list(futures)
    gathered = Future()
    if not members:
        gathered.set_result(members)
        return gathered
    left = list(range(len(members)))  # one is taken a completion, which needs no lock

    def one_done(_: Future) -> None:
        if left.pop() == 0:
            gathered.set_result(members)

    for member in members:
        member.add_done_callback(one_done, inline=True)
    return gathered
