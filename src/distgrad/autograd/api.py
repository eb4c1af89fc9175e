"""What users call: contexts, passes, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distgrad._core import GradientTable, Tensor
from distgrad.autograd import collecting, waiting  # noqa: F401  expose what others ask for
from distgrad.autograd._current import current
from distgrad.autograd.context import DistAutogradContext
from distgrad.autograd.engine import Engine
from distgrad.autograd.recording import Recorder
from distgrad.errors import ContextError
from distgrad.rpc import Worker
from distgrad.rpc._exchange import current_extension

__all__ = [
    "backward",
    "context",
    "current_context",
    "debug_info",
    "get_gradients",
    "gradients_here",
    "install",
    "is_valid_context",
    "retrieve_context",
]


def install(worker: Worker) -> None:
    """Give a worker its contexts; rpc calls this when a worker starts."""
    engine = Engine(worker)
    worker.extensions["autograd"] = engine
    worker.payload_hook = Recorder(engine)


def _engine() -> Engine:
    engine: Engine = current_extension("autograd")
    return engine


def context() -> DistAutogradContext:
    """Return a new autograd context, to be used in a ``with`` statement.

    Returns
    -------
    DistAutogradContext
        An int: the context's id.
    """
    return _engine().new_context()


def backward(
    context_id: int,
    roots: Sequence[Tensor],
    retain_graph: bool = False,
    *,
    grads: Sequence[Any] | None = None,
    create_graph: bool = False,
    accumulate_into: str = "context",
    timeout: float | None = None,
) -> None:
    """Run a backward pass from ``roots`` through all workers of a context.

    Blocks until the pass has ended everywhere. Each leaf's gradient is accumulated on the
    worker where the leaf lives; see `get_gradients` there. Any worker that knows the
    context may run a pass, any number of passes may run one after another or at once.

    Parameters
    ----------
    context_id
        The context.
    roots
        Tensors of this worker that require grad; with one element each, unless ``grads``
        says what to start from.
    retain_graph
        Keep what the graph saved, on every worker, so that another pass can run it.
    grads
        For each root an array of its shape, or None for one.
    create_graph
        Not supported across workers yet.
    accumulate_into
        ``"context"``, or ``"grad"`` to add to ``.grad`` of the leaves on all workers.
    timeout
        Seconds after which the pass fails; None or 0 for no limit beyond the deadline of the
        call that is being served. A rule or hook that runs on this thread is not interrupted.

    Raises
    ------
    ContextError
        If this worker has no such context, or it is finished.
    ValueError, TypeError, GraphError
        If the roots cannot start a pass. Nothing has run then.
    BackwardError
        If the pass failed, on any worker. Names the worker and the node; its cause is the
        original exception. No worker keeps anything of the pass; what the pass had
        accumulated before it failed stays.
    """
    _engine().backward(
        context_id,
        roots,
        retain_graph,
        grads=grads,
        create_graph=create_graph,
        accumulate_into=accumulate_into,
        timeout=timeout,
    )


def get_gradients(context_id: int) -> dict[Tensor, Tensor]:
    """Return the gradients of this worker's leaves in a context.

    Returns
    -------
    dict
        Leaf to gradient, in the order in which they first came. Leaves that got no
        gradient are absent. ``.grad`` is not involved.

    Raises
    ------
    ContextError
        If this worker has no such context, or it is finished.
    """
    return _engine().existing(context_id).gradients.as_dict()


def gradients_here(context_id: int) -> GradientTable:
    """Return the gradients of this worker's leaves as passes accumulate them, only to be read.

    Empty where this worker has no such context: it may never have heard of it.
    """
    part = _engine().parts.get(context_id)
    return GradientTable() if part is None else part.gradients


def current_context() -> DistAutogradContext:
    """Return the context of this thread or task.

    Raises
    ------
    ContextError
        If there is none.
    """
    part = current.get()
    if part is None:
        raise ContextError(
            "cannot find the current autograd context: this thread has none",
            hint="wrap the code in `with distgrad.autograd.context():`",
        )
    if part.released:
        raise part.host.missing(part.context_id)
    return DistAutogradContext(part)


def retrieve_context(context_id: int) -> DistAutogradContext:
    """Return a context that this worker knows.

    Raises
    ------
    ContextError
        If this worker has no such context, or it is finished.
    """
    return DistAutogradContext(_engine().existing(context_id))


def is_valid_context(context_id: int) -> bool:
    """Return whether this worker knows a context that is not finished."""
    return context_id in _engine().parts


def debug_info() -> dict[str, int]:
    """Return counters of the current worker: contexts, passes, recorded messages."""
    return _engine().debug_info()
