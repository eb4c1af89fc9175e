"""Transports that fail on purpose: connections that break, wait, or end their worker.

`installed` puts them in the place of the shipped ones, in this process and those it forks.
Faults are planned by number: the n-th message of a backward pass that a worker sends.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distgrad.message import (
    PassAbort,
    PassBegin,
    PassComplete,
    PassEnd,
    PropagateGradients,
    code_of,
)
from distgrad.transport import registry
from distgrad.transport.base import Connection

__all__ = ["FaultyConnection", "Plan", "installed", "plan"]

KINDS = {
    code_of(kind) for kind in (PropagateGradients, PassBegin, PassComplete, PassEnd, PassAbort)
}
Fault = tuple[str, bool, float]


class Plan:
    """What happens to this worker's messages; one a process.

    A fault is (action, before, seconds): ``"delay"`` waits, ``"drop"`` breaks the connection
    and ``"kill"`` ends the process, before or after the message is sent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.longest = 0.0  # seconds; if set, every message waits at random, most hardly
        self.arm({})

    def arm(self, faults: dict[int, Fault]) -> None:
        """Start to count anew."""
        self.faults = dict(faults)
        self.sent = 0
        self.injected: Counter[str] = Counter()

    def next(self, kind: int) -> Fault:
        """Count a message; return what is to happen to it."""
        if self.longest:
            return "delay", True, random.random() ** 8 * self.longest
        if kind not in KINDS:
            return "", False, 0.0
        with self._lock:
            self.sent += 1
            fault = self.faults.pop(self.sent, ("", False, 0.0))
            if fault[0]:
                self.injected[fault[0]] += 1
        return fault


plan = Plan()


class FaultyConnection(Connection):
    """A connection whose messages meet the faults of `plan`; equal to the one inside."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __hash__(self) -> int:
        return hash(self.inner)

    def __eq__(self, other: object) -> bool:
        return getattr(other, "inner", other) is self.inner

    @property
    def closed(self) -> bool:
        return bool(self.inner.closed)

    def send(self, message: Any) -> bool:
        action, before, seconds = plan.next(message.kind)
        if action == "delay":
            time.sleep(seconds)  # the fault itself
        elif action and before:
            self.fail(action)
        whole = bool(self.inner.send(message))
        if action in ("drop", "kill") and not before:
            self.fail(action)
        return whole

    def fail(self, action: str) -> None:
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.inner.abort()

    def flushed(self) -> bool:
        return bool(self.inner.flushed())

    def close(self) -> None:
        self.inner.close()

    def abort(self) -> None:
        self.inner.abort()


def faulty(transport: type[Any]) -> type[Any]:
    """Return a transport like another, whose connections are faulty."""

    class Faulty(transport):  # type: ignore[misc]
        def listen(
            self, poller: Any, handshake: Any, on_connection: Callable[..., None], **rest: Any
        ) -> Any:
            def accept(connection: Any, identity: Any) -> None:
                on_connection(FaultyConnection(connection), identity)

            return super().listen(poller, handshake, accept, **rest)

        def connect(self, *args: Any) -> Any:
            return FaultyConnection(super().connect(*args))

    return Faulty


@contextmanager
def installed(*transports: type[Any]) -> Iterator[None]:
    """Serve the schemes of these transports by faulty ones meanwhile."""
    before = dict(registry._registered)
    for transport in transports:
        registry.register_transport(transport.scheme, faulty(transport))
    try:
        yield
    finally:
        registry._registered.clear()
        registry._registered.update(before)
