"""Ids of contexts that are finished, so that late messages cannot bring them back."""

from __future__ import annotations

import time

from distgrad.config import config

__all__ = ["Tombstones"]

#: Most ids that are remembered. Messages of a context that are still under way when it is
#: released arrive within as many contexts, or are harmless: they leave an empty context.
_MOST = 16384


class Tombstones:
    """Remembers ids for ``config.tombstone_s`` seconds, the newest `_MOST` at most.

    Not locked: the caller serialises `add`.
    """

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times: dict[int, float] = {}

    def add(self, identifier: int) -> None:
        """Remember an id, and forget what is too old."""
        now = time.monotonic()
        times = self._times
        times[identifier] = now
        while len(times) > 1:
            oldest = next(iter(times))
            if len(times) <= _MOST and times[oldest] >= now - config.tombstone_s:
                return
            del times[oldest]

    def __contains__(self, identifier: int) -> bool:
        return identifier in self._times

    def when(self, identifier: int) -> float | None:
        """Return when an id was added (`time.monotonic`), or None."""
        return self._times.get(identifier)
