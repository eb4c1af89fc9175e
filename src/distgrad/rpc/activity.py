"""What the current thread or task is doing, and for which worker.

One context variable holds an `Activity`: the worker, and while a call is served its chain
and deadline, which the calls made by the handler inherit.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from distgrad.errors import DistgradError
from distgrad.rpc._activity import Activity, activity, set_elsewhere

if TYPE_CHECKING:
    from distgrad.rpc.worker import Worker

__all__ = ["Activity", "activity", "current_worker", "deadline", "worker_or_none"]


# Workers of this process, oldest first: threads without an activity use the first.
_workers: list[Worker] = []


def enlist(worker: Worker) -> None:
    """Make a worker known as one that this process hosts."""
    _workers.append(worker)
    _settle()


def discharge(worker: Worker) -> None:
    """Forget a worker that was shut down."""
    if worker in _workers:
        _workers.remove(worker)
        _settle()


def _settle() -> None:
    set_elsewhere(Activity(_workers[0]) if _workers else None)


def hosted_workers() -> list[Worker]:
    """Return the workers of this process that were not shut down, oldest first."""
    return list(_workers)


def worker_or_none() -> Worker | None:
    """Return the current worker, or None where there is none."""
    now = activity.get(None)
    if now is not None and not now.worker.closed:
        return now.worker
    for worker in _workers:
        if not worker.closed:
            return worker
    return None


def current_worker() -> Worker:
    """Return the worker of this thread or task.

    Raises
    ------
    DistgradError
        If this process has no worker.
    """
    worker = worker_or_none()
    if worker is None:
        raise DistgradError(
            "cannot find the current worker: this process has none",
            hint="call distgrad.rpc.init_rpc(name) first, and do not use it after shutdown()",
        )
    return worker


def deadline() -> float | None:
    """Return when the call being served expires (`time.monotonic` seconds), or None."""
    now = activity.get(None)
    return None if now is None else now.deadline


def _forget_in_child() -> None:
    """A forked child owns no worker: the threads and connections stay with its parent."""
    for worker in _workers:
        worker.agent.closed = worker.agent.crew.closed = True
    _workers.clear()
    _settle()


os.register_at_fork(after_in_child=_forget_in_child)
