"""What the workers of a pass talk about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, Protocol

from distgrad.errors import WorkerLostError
from distgrad.message import PassAbort, PassBegin, PassComplete, PassEnd, PropagateGradients

__all__ = [
    "COMPLETE",
    "FAILED",
    "INTO_GRAD",
    "LATE",
    "NEW",
    "OVER",
    "RETAIN",
    "RUNNING",
    "Boundary",
    "Gradients",
    "Graph",
    "Message",
    "State",
    "last_word",
    "lost_worker",
    "made",
    "refuse",
    "worker_of",
]

#: Flags of a pass, which every participant learns from its first message.
RETAIN = 1  # keep what the nodes saved, so that another pass can run them
INTO_GRAD = 2  # accumulate into ``.grad`` of the leaves instead of the context

#: Flag of a message: nones for late recvs. It invites nobody into the pass.
LATE = 4

Gradients = tuple[Any, ...] | None
Message = PropagateGradients | PassBegin | PassComplete | PassEnd | PassAbort

_WORKER_SHIFT = 48


def worker_of(identifier: int) -> int:
    """Return the worker that made a context, message or pass id."""
    return identifier >> _WORKER_SHIFT


class Boundary(Protocol):
    """A send or recv node: one end of a message of the forward pass."""

    message_id: int
    peer: int


class Graph(Protocol):
    """The local part of the graph in one pass; see `distgrad._core.GraphTask`."""

    @property
    def done(self) -> bool:
        """Whether every send is resolved and every node was run."""

    def reaches(self, node: Any) -> bool:
        """Return whether the roots or sends lead to this recv."""

    def deliver(self, node: Any, grads: Sequence[Any] | None) -> None:
        """Resolve a send."""

    def run(self) -> Sequence[tuple[Any, Gradients]]:
        """Run what is ready; return the recvs that became complete."""


class State(Enum):
    """How far a pass is on this worker."""

    NEW = "new"  # known, the snapshot is not taken
    RUNNING = "running"
    COMPLETE = "complete"  # this part is done and reported; the pass goes on elsewhere
    OVER = "over"
    FAILED = "failed"


# The members as names: looking them up on the class is slow.
NEW, RUNNING, COMPLETE, OVER, FAILED = State

_CLOSING = (PassAbort, PassEnd)


#: Return a message of a kind from its fields; the kind itself does that in Python, slowly.
made: Callable[..., Any] = tuple.__new__


def last_word(message: Message, cause: PassAbort | None) -> PassAbort | PassEnd | None:
    """Return what the sender of a message must hear if the pass is over, or None.

    Whoever reports to the root waits for its word; whoever takes part in a pass that failed
    may have joined too late to be told by others.
    """
    if isinstance(message, _CLOSING) or getattr(message, "flags", 0) & LATE:
        return None
    reports = getattr(message, "complete", None) is not None
    return cause or (PassEnd(message.pass_id) if reports else None)


def refuse(lost: Iterable[int]) -> None:
    """Raise if there is anybody among these workers."""
    for worker in lost:
        raise lost_worker(worker)


def lost_worker(worker: int) -> WorkerLostError:
    """Return the error of a pass that needs a worker that is gone."""
    return WorkerLostError(
        f"cannot run the backward pass: worker {worker}, which it needs, is lost"
    )
