"""Creating values on other workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from distgrad.message import RemoteCall
from distgrad.rpc import UNSET_RPC_TIMEOUT, Future, WorkerInfo, current_worker
from distgrad.rpc.calls import allowed_timeout, call_arguments
from distgrad.rpc.exposure import expose, name_of
from distgrad.rpc.future import FAILED
from distgrad.rref.rref import RRef
from distgrad.rref.table import Cell, RRefTable

__all__ = ["call_method", "remote"]


def remote(
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> RRef:
    """Call a function on another worker, keep its value there, and return a reference.

    Returns at once. What the function raises is raised when the value is asked for.

    Parameters
    ----------
    to
        Name, id or `WorkerInfo` of the owner-to-be; the own worker is allowed.
    func
        A function or class that the owner exposes.
    args, kwargs
        Its arguments.
    timeout
        Seconds until the owner must have acknowledged the call, not the function's own
        time; 0 for never. A reference that was not acknowledged raises
        `RpcTimeoutError` when it is used.

    Raises
    ------
    UnknownWorkerError, SerializationError, WorkerLostError
        If the call cannot be made; nothing has run then.
    """
    worker = current_worker()
    name = name_of(func)
    owner = worker.world.id_of(to)
    seconds = allowed_timeout(worker, timeout, name)
    values, named = call_arguments(name, args, kwargs)
    table: RRefTable = worker.extensions["rref"]

    def send(rref_id: int, fork_id: int) -> Future:
        body = RemoteCall(rref_id, fork_id, name, values, named)
        return worker.request(owner, body, timeout=seconds, what=name)

    if owner == worker.id:
        return RRef._of(table, _create_here(table, send))
    fork = table.originate(owner)
    try:
        answer = send(fork.rref_id, fork.fork_id)
    except BaseException:
        table.abandon(fork)
        raise
    answer.add_done_callback(partial(table.settle_by, fork), inline=True)
    return RRef._of(table, fork)


def _create_here(table: RRefTable, send: Callable[[int, int], Future]) -> Cell:
    """Create a value on this worker, through the same messages; it is counted meanwhile."""
    cell = Cell(table.new_id(), Future(agent=table.worker.agent))
    fork_id, release = table.share(cell, table.worker.id)
    try:
        answer = send(cell.rref_id, fork_id)
    except BaseException:
        release()
        raise

    def acknowledged(answer: Future) -> None:
        if (error := answer.exception()) is not None:
            cell.value._try_complete(FAILED, error)

    answer.add_done_callback(acknowledged, inline=True)
    cell.value.add_done_callback(lambda _: release(), inline=True)
    return cell


@expose
def call_method(
    rref: RRef, method: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> Any:
    """Call a method of the value of an RRef, at its owner (for `RRef.remote`)."""
    worker = current_worker()
    bound = worker.exposure.resolve_method(rref.local_value(), method)
    value = worker.call_function(bound, args, kwargs)
    return value.wait() if isinstance(value, Future) else value
