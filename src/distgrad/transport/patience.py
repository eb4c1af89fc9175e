"""How long a peer may take, judged only by who is awake."""

from __future__ import annotations

import time
from collections.abc import Callable

from distgrad.transport._poller import Poller

__all__ = ["Patience"]

_LATE_S = 0.05  # a poller that is later than this did not poll when the time was up
_MOST_PAUSES = 3  # so that a worker that is always late does not wait for ever


class Patience:
    """Calls back when a peer has taken too long; runs in the polling thread.

    A process that was stopped, or whose polling thread could not run, has not seen what the
    peer did meanwhile: it gives it the same time again.

    Parameters
    ----------
    poller
        Whose thread judges.
    timeout_s
        How long the peer may take.
    on_end
        Called once, unless cancelled before.
    """

    def __init__(self, poller: Poller, timeout_s: float, on_end: Callable[[], object]) -> None:
        self._poller = poller
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._pauses = 0
        self._wait()

    def _wait(self) -> None:
        self._due = time.monotonic() + self._timeout_s
        self._timer = self._poller.call_later(self._timeout_s, self._judge)

    def _judge(self) -> None:
        if time.monotonic() > self._due + _LATE_S and self._pauses < _MOST_PAUSES:
            self._pauses += 1
            self._wait()
        else:
            self._on_end()

    def cancel(self) -> None:
        """Do not call back. Idempotent."""
        self._timer.cancel()
