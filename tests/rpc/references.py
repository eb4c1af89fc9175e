"""Waiting for what other threads and processes do to references."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

from distgrad import rpc

PATIENCE_S = 20.0


def counters() -> dict[str, int]:
    """Return the counters of this worker's references that are not zero."""
    info = rpc.debug_info()
    return {name: n for name, n in info.items() if name.startswith("rref.") and n}


def wait_until(
    condition: Callable[[], Any], state: Callable[[], Any] = lambda: "", *, collect: bool = True
) -> None:
    """Wait until a condition holds, which may need garbage to be collected."""
    until, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert time.monotonic() < until, f"it never happened: {state()}"
        if collect:
            gc.collect()
        pause.wait(0.002)


def wait_until_empty(rank: int) -> None:
    """Wait until nothing is counted on this worker."""
    wait_until(lambda: not counters(), counters)
