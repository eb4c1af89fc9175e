# cython: annotation_typing=False
"""Ids of contexts that are finished, so that late messages cannot bring them back."""

from __future__ import annotations

from collections import deque
from time import monotonic

from distgrad.autograd.terms import worker_of
from distgrad.config import config

__all__ = ["Tombstones"]

#: Most ids that are remembered. A message that arrives later, or is served later, brings its
#: context back; but it is found to be `doubtful`, and its creator ends it again.
_MOST = 16384


class Tombstones:
    """Remembers ids for ``config.tombstone_s`` seconds, the newest `_MOST` at most.

    Of those that it forgets it keeps the highest of each creator: ids of a creator ascend.

    Not locked: the caller serialises `add`.
    """

    __slots__ = ("_forgotten", "_order", "_times")

    def __init__(self) -> None:
        self._forgotten: dict[int, int] = {}  # creator -> highest id
        self._times: dict[int, float] = {}
        self._order: deque[int] = deque()  # oldest first

    def add(self, identifier: int) -> None:
        """Remember an id, and forget what is too old."""
        times, order = self._times, self._order
        if identifier in times:
            return
        now = times[identifier] = monotonic()
        order.append(identifier)
        while len(order) > _MOST or times[order[0]] < now - config.tombstone_s:
            self._forget(order.popleft())
            if not order:
                return

    def _forget(self, identifier: int) -> None:
        del self._times[identifier]
        creator = worker_of(identifier)
        self._forgotten[creator] = max(identifier, self._forgotten.get(creator, 0))

    def doubtful(self, identifier: int) -> bool:
        """Whether an id that is not here may be a forgotten one: it is no higher than one."""
        return identifier <= self._forgotten.get(worker_of(identifier), -1)

    def __contains__(self, identifier: int) -> bool:
        return identifier in self._times

    def when(self, identifier: int) -> float | None:
        """Return when an id was added (`time.monotonic`), or None."""
        return self._times.get(identifier)
