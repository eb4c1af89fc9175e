# cython: annotation_typing=False
"""Ids of contexts that are finished, so that late messages cannot bring them back."""

from __future__ import annotations

import time
from collections import deque

from distgrad.config import config

__all__ = ["Tombstones"]

#: Most ids that are remembered. Messages of a context that are still under way when it is
#: released arrive within as many contexts, or are harmless: they leave an empty context.
_MOST = 16384


class Tombstones:
    """Remembers ids for ``config.tombstone_s`` seconds, the newest `_MOST` at most.

    Not locked: the caller serialises `add`.
    """

    __slots__ = ("_order", "_times")

    def __init__(self) -> None:
        self._times: dict[int, float] = {}
        self._order: deque[int] = deque()  # oldest first

    def add(self, identifier: int) -> None:
        """Remember an id, and forget what is too old."""
        times, order = self._times, self._order
        if identifier in times:
            return
        now = times[identifier] = time.monotonic()
        order.append(identifier)
        while len(order) > _MOST or times[order[0]] < now - config.tombstone_s:
            del times[order.popleft()]
            if not order:
                return

    def __contains__(self, identifier: int) -> bool:
        return identifier in self._times

    def when(self, identifier: int) -> float | None:
        """Return when an id was added (`time.monotonic`), or None."""
        return self._times.get(identifier)
