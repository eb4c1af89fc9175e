# cython: annotation_typing=False
"""Autograd contexts as users see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import ref

from distgrad._core import GradientTable, Tensor
from distgrad.autograd._current import current
from distgrad.autograd.functions import RecvRpcBackward, SendRpcBackward
from distgrad.autograd.part import Host, Part, Run
from distgrad.rpc import register_type

if TYPE_CHECKING:
    from os import PathLike

    from distgrad.autograd.engine import Engine

__all__ = ["ContextPart", "DistAutogradContext"]


class ContextPart(Part):
    """One context on one worker, with the gradients of the leaves that live there.

    Attributes
    ----------
    gradients
        Of the leaves of this worker.
    roots
        Of the last pass that was started here, for pictures.
    """

    __slots__ = ("gradients", "roots")

    host: Engine

    def __init__(self, host: Host, context_id: int) -> None:
        super().__init__(host, context_id)
        self.gradients = GradientTable()
        self.roots: list[ref[Tensor]] = []

    def resume(self, run: Run) -> None:
        """Take the events of a pass in a `contextvars.Context` that nobody needs afterwards."""
        current.set(self)
        Part.drain(self, run)

    def drain(self, run: Run) -> None:
        """Take the events of a pass; hooks and rules that make calls stay in the context."""
        outer = current.get()
        if outer is self:
            Part.drain(self, run)
            return
        current.set(self)
        try:
            Part.drain(self, run)
        finally:
            current.set(outer)


class DistAutogradContext(int):
    """An autograd context; as a number, its id: 16 bits of the creator, 48 of a counter.

    Made by `context`. While its ``with`` block runs, calls to other workers record what
    `backward` needs, wherever they are made on behalf of the block: in this thread or task, in
    functions called on other workers, in callbacks. Leaving the block releases the context
    on every worker that took part.

    The properties show the part of the worker on which the object was obtained.
    """

    _part: ContextPart
    _outer: ContextPart | None

    def __new__(cls, part: ContextPart) -> Self:
        self = super().__new__(cls, part.context_id)
        self._part = part
        return self

    def __enter__(self) -> Self:
        self._part.host.open(self._part)
        self._outer = current.get()
        current.set(self._part)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        current.set(self._outer)
        self._part.host.leave(self._part.context_id)

    @contextmanager
    def use(self) -> Iterator[Self]:
        """Make this the current context of another thread, without releasing it at the end."""
        if self._part.released:
            raise self._part.host.missing(self._part.context_id)
        outer = current.get()
        current.set(self._part)
        try:
            yield self
        finally:
            current.set(outer)

    @property
    def context_id(self) -> int:
        """The id, as a plain int."""
        return int(self)

    @property
    def send_functions(self) -> dict[int, SendRpcBackward]:
        """What was sent, by autograd message id in ascending order."""
        return dict(sorted(self._part.sends.items()))

    @property
    def recv_functions(self) -> dict[int, RecvRpcBackward]:
        """What was received, by autograd message id in ascending order."""
        return dict(sorted(self._part.recvs.items()))

    @property
    def known_worker_ids(self) -> set[int]:
        """Workers that this one sent messages of the context to."""
        return set(self._part.known)

    def backward(self, *roots: Tensor, **options: Any) -> None:
        """Run a backward pass from ``roots``; see `distgrad.autograd.backward`."""
        self._part.host.backward(int(self), list(roots), **options)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of this worker's leaves."""
        return self._part.host.existing(int(self)).gradients.as_dict()

    def gradient(self, tensor: Tensor) -> Tensor | None:
        """Return the gradient of one leaf of this worker, or None if it got none."""
        found: Tensor | None = self._part.host.existing(int(self)).gradients.get(tensor)
        return found

    def why_waiting(self, timeout: float = 1.0) -> str:
        """Return a report of what the passes of this context wait for, on all workers.

        Names the sends that have no gradient yet, with the call that made them, and with
        ``config.trace_graph`` where. Meant for another thread than the one that waits in
        `backward`, whose time-out error has the same report.

        Parameters
        ----------
        timeout
            Seconds for the answers of all workers; those that give none are named.
        """
        from distgrad.autograd.waiting import why_waiting

        return why_waiting(self._part.host, int(self), timeout)

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw the graph across all workers into an SVG file, or DOT if it ends so.

        Shows what messages carried, and on this worker what led to the roots of the last
        pass, as far as that still exists.
        """
        from distgrad.autograd.drawing import draw

        draw(self._part.host, int(self), path)

    def __repr__(self) -> str:
        worker, number = self >> 48, self & (1 << 48) - 1
        return f"<{type(self).__name__} {number} of worker {worker}>"


# A context is named in the arguments of calls, as in torch; it arrives as its number.
register_type(
    DistAutogradContext,
    int,
    int,  # type: ignore[arg-type]
    name="distgrad.DistAutogradContext",
)
