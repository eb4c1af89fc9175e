"""What the owner of values does when messages ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from distgrad.message import (
    RemoteCall,
    RRefBackward,
    RRefCall,
    RRefChildAccept,
    RRefFetch,
    RRefForkRequest,
    RRefUserDelete,
)
from distgrad.rpc import Future, Worker
from distgrad.rpc._exchange import enter_call
from distgrad.rpc.failures import contain, is_interrupt
from distgrad.rref.rref import run_backward
from distgrad.rref.table import Cell, RRefTable

if TYPE_CHECKING:
    from distgrad._codec import Frame

__all__ = ["register"]


def register(worker: Worker) -> None:
    """Have the messages about references handled."""
    worker.register(RemoteCall, _on_remote_call, inline=True)
    worker.register(RRefForkRequest, _on_fork_request, inline=True)
    worker.register(RRefUserDelete, _on_user_delete, inline=True)
    worker.register(RRefChildAccept, _on_child_accept, inline=True)
    worker.register(RRefFetch, _on_fetch)
    worker.register(RRefCall, _on_call)
    worker.register(RRefBackward, _on_backward)


def _table_of(worker: Worker) -> RRefTable:
    table: RRefTable = worker.extensions["rref"]
    return table


# --- counting, on the polling thread ---------------------------------------------------------


def _on_fork_request(worker: Worker, peer: int, frame: Frame, body: Any) -> None:
    rref_id, fork_id = body
    _table_of(worker).on_fork_request(peer, frame.request_id, rref_id, fork_id)


def _on_user_delete(worker: Worker, peer: int, frame: Frame, body: Any) -> None:
    _table_of(worker).on_user_delete(peer, body[0])


def _on_child_accept(worker: Worker, peer: int, frame: Frame, body: Any) -> None:
    (fork_id,) = body
    _table_of(worker).on_child_accept(fork_id)


def _on_remote_call(worker: Worker, peer: int, frame: Frame, body: Any) -> Callable[[], None]:
    """Count the creator's fork and say so; the function runs afterwards."""
    rref_id, fork_id, function, args, kwargs = body
    cell = _table_of(worker).open(rref_id, fork_id, peer)
    worker.agent.reply(peer, frame.request_id, None)
    return partial(_create, worker, frame, cell, function, args, kwargs)


# --- user code, on serving threads -----------------------------------------------------------


def _create(
    worker: Worker, frame: Frame, cell: Cell, function: str, args: Any, kwargs: Any
) -> None:
    """Run the function that makes a value; what it raises becomes the outcome."""
    try:
        enter_call(worker.agent, frame)
        value = worker.call_function(worker.exposure.resolve(function), args, kwargs)
    except BaseException as error:
        cell.value.set_exception(contain(error, worker.name))
        if is_interrupt(error):
            raise
    else:
        _forward(value, cell.value)


def _on_fetch(worker: Worker, peer: int, frame: Frame, body: Any) -> Any:
    value = _table_of(worker).cell(body[0]).value
    return value.wait() if value.done() else value


def _on_call(worker: Worker, peer: int, frame: Frame, body: Any) -> Any:
    rref_id, method, args, kwargs = body
    cell = _table_of(worker).cell(rref_id)
    return _with_value(cell, partial(_call, worker, method, args, kwargs))


def _call(worker: Worker, method: str, args: Any, kwargs: Any, value: Any) -> Any:
    return worker.call_function(worker.exposure.resolve_method(value, method), args, kwargs)


def _on_backward(worker: Worker, peer: int, frame: Frame, body: Any) -> Any:
    rref_id, context_id, retain_graph = body
    cell = _table_of(worker).cell(rref_id)
    return _with_value(cell, lambda value: run_backward(rref_id, value, context_id, retain_graph))


def _with_value(cell: Cell, action: Callable[[Any], Any]) -> Any:
    """Return what ``action`` makes of a value, or a future of it where the value is to come."""
    if cell.value.done():
        return action(cell.value.wait())
    outcome = Future(chain=cell.value.chain)

    def act(value: Future) -> None:
        try:
            _forward(action(value.wait()), outcome)
        except BaseException as error:
            outcome.set_exception(error)
            if is_interrupt(error):
                raise

    cell.value.add_done_callback(act)
    return outcome


def _forward(value: Any, outcome: Future) -> None:
    """Complete ``outcome`` with a value, or with that of a future when it has one."""
    if not isinstance(value, Future):
        outcome.set_result(value)
        return

    def complete(value: Future) -> None:
        if (error := value.exception()) is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(value.result())

    value.add_done_callback(complete, inline=True)
