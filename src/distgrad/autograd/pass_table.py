# cython: annotation_typing=False
"""The passes of one context on one worker: which run, which are over, who must be told.

Nothing here performs input or output, as in `distgrad.autograd.protocol`.

Invariants
    1. A pass that is over is never begun again. Messages of it may still come; if it failed,
       or if they report to the root, they are answered with how it ended.
    2. The end of a pass waits until this worker sends to the peer again, or for release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distgrad.autograd.terms import LATE, OVER, Message, last_word
from distgrad.message import PassAbort, PassBegin, PassComplete, PassEnd, PropagateGradients

__all__ = ["PassTable"]

_REMEMBERED = 512  # passes of one context that are over, at least; the newest


class PassTable:
    """The passes of one context on one worker.

    Calls must not overlap; a driver with threads holds the lock of the context.

    Parameters
    ----------
    worker
        This worker.
    make
        Makes a pass from worker, pass id and flags.

    Attributes
    ----------
    passes
        Those that are not over, by id.
    owes
        Whether somebody must be told that a pass is over.
    """

    __slots__ = ("_early", "_over", "_owed", "make", "owes", "passes", "worker")

    def __init__(self, worker: int, make: Callable[[int, int, int], Any]) -> None:
        self.worker = worker
        self.make = make
        self.passes: dict[int, Any] = {}
        self._over: dict[int, PassAbort | None] = {}  # why it failed; oldest first
        self._early: dict[int, list[int]] | None = None  # by pass: see `early`
        self._owed: dict[int, list[PassEnd]] | None = None  # by peer: ends not sent yet
        self.owes = False

    def open(self, pass_id: int, flags: int) -> Any:
        """Start to know a pass."""
        opened = self.passes[pass_id] = self.make(self.worker, pass_id, flags)
        return opened

    def route(self, message: Any) -> Any:
        """Return the pass that a message is for, or None if nobody needs the message."""
        pass_id = message.pass_id
        known = self.passes.get(pass_id)
        if known is not None or pass_id in self._over:
            return known
        kind: Any = type(message)
        if kind is PropagateGradients or kind is PassBegin:
            flags = message.flags
            if not flags & LATE:
                return self.open(pass_id, flags)
            if self._early is None:
                self._early = {}
            self._early.setdefault(pass_id, []).extend([m for m, _ in message.entries])
        elif kind is not PassComplete:
            self._remember(pass_id, message if kind is PassAbort else None)
        return None

    def answer(self, message: Message) -> PassAbort | PassEnd | None:
        """Return what the sender of a message that `route` did not take must hear, or None."""
        return last_word(message, self._over.get(message.pass_id))

    def early(self, pass_id: int) -> Sequence[int]:
        """Return, once, the sends for which late nones came before the pass was opened."""
        return self._early.pop(pass_id, ()) if self._early else ()

    def close(self, finished: Any) -> None:
        """Stop to know a pass that is over or failed; at the root, owe all others the end."""
        self.passes.pop(finished.pass_id, None)
        self._remember(finished.pass_id, finished.cause)
        if finished.closure is not None and finished.state is OVER:
            end = PassEnd(finished.pass_id)
            if self._owed is None:
                self._owed = {}
            self.owes = True
            for peer in finished.closure.reports:  # all that take part
                if peer != self.worker:
                    self._owed.setdefault(peer, []).append(end)

    def ends_for(self, peer: int) -> Sequence[PassEnd]:
        """Return, once, the ends that ``peer`` has not been told of.

        They are not sent when a pass ends but before whatever this worker sends to the
        peer next in this context; release tells of them too.
        """
        return self._owed.pop(peer, ()) if self._owed else ()

    def all_ends(self) -> Sequence[tuple[int, PassEnd]]:
        """Return, once, all ends that were not sent yet, with their receivers."""
        if not self._owed:
            return ()
        owed, self._owed, self.owes = self._owed, None, False
        return [(peer, end) for peer, ends in owed.items() for end in ends]

    def _remember(self, pass_id: int, cause: PassAbort | None) -> None:
        if self._early:
            self._early.pop(pass_id, None)
        self._over[pass_id] = cause
        if len(self._over) > 2 * _REMEMBERED:
            for oldest in list(self._over)[:_REMEMBERED]:
                del self._over[oldest]
