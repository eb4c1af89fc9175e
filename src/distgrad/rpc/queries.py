"""What a worker can say about itself and its world."""

from __future__ import annotations

from distgrad.rpc.activity import current_worker
from distgrad.rpc.options import WorkerInfo

__all__ = ["debug_info", "get_worker_info", "is_available"]


def is_available() -> bool:
    """Return True: remote calls are always part of distgrad."""
    return True


def get_worker_info(worker_name: str | int | None = None) -> WorkerInfo:
    """Return name and id of a worker; of the current one by default.

    Raises
    ------
    UnknownWorkerError
        If no worker of this world has that name or id.
    """
    worker = current_worker()
    if worker_name is None:
        return worker.info
    return worker.infos[worker.world.id_of(worker_name)]


def debug_info() -> dict[str, int]:
    """Return counters of the current worker: calls, threads, bytes, and those of each layer.

    Extensions of a worker that have a method ``debug_info()`` add their own.
    """
    worker = current_worker()
    agent = worker.agent
    counters = {
        "rpc.calls_pending": len(agent.pending),
        "rpc.calls_issued": agent.issued,
        "rpc.calls_handled": agent.handled,
        "rpc.threads": agent.crew.thread_count,
        "rpc.connections": len(agent.links.connected),
        "rpc.bytes_sent": agent.bytes_sent,
        "rpc.bytes_received": agent.bytes_received,
    }
    for extension in worker.extensions.values():
        if hasattr(extension, "debug_info"):
            counters.update(extension.debug_info())
    return counters
