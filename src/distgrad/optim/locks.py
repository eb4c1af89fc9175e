"""Which step may write which parameters, as a state machine without I/O.

A step takes all its locks at one worker at once, so steps cannot block each other there.
Parameters are compared by identity.
First come, first served: a step waits behind every earlier one that it shares a parameter
with, whether that one has its locks or still waits for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

__all__ = ["LockTable"]

Keys = Collection[object]


class LockTable:
    """The locks on the parameters of one worker."""

    def __init__(self) -> None:
        self._held: dict[int, Keys] = {}  # step -> parameters
        self._waiting: dict[int, Keys] = {}  # in the order of their arrival

    def acquire(self, step: int, keys: Keys, wait: bool) -> bool:
        """Lock parameters for a step.

        Returns
        -------
        bool
            Whether the step has the locks now. If not, it has none; with ``wait`` it
            stands in the queue, and `release` of another step will name it.
        """
        if self._is_free(keys, self._waiting):
            self._held[step] = keys
            return True
        if wait:
            self._waiting[step] = keys
        return False

    def release(self, step: int) -> list[int]:
        """Give back what a step holds or waits for; return the steps that have locks now."""
        self._held.pop(step, None)
        self._waiting.pop(step, None)
        granted = list(self._grant())
        for other in granted:
            self._held[other] = self._waiting.pop(other)
        return granted

    def _grant(self) -> Iterator[int]:
        earlier: dict[int, Keys] = {}
        for step, keys in self._waiting.items():
            if self._is_free(keys, earlier):
                yield step
            earlier[step] = keys

    def _is_free(self, keys: Keys, earlier: dict[int, Keys]) -> bool:
        if not self._held and not earlier:
            return True  # the usual case: what a set of the keys would cost is saved
        wanted = {id(key) for key in keys}
        return all(
            wanted.isdisjoint(id(key) for key in others)
            for table in (self._held, earlier)
            for others in table.values()
        )

    def __len__(self) -> int:
        return len(self._held) + len(self._waiting)
