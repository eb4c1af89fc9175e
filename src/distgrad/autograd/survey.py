"""Asking all workers of a context one question, at once and within a deadline.

Who looks must not change anything: nothing is recorded, and nobody is connected to for the
question alone. A worker that does not answer a new connection would count as lost. So
workers without a connection are asked by those that exchanged messages with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distgrad.autograd._current import current
from distgrad.message import Call
from distgrad.rpc import Future, Worker, current_worker, deadline, expose
from distgrad.rpc.exposure import name_of

if TYPE_CHECKING:
    from distgrad.autograd.engine import Engine

__all__ = ["question", "survey"]

Question = Callable[[int], dict[str, Any]]

_questions: set[str] = set()  # names of the functions that may be asked for others


def question(function: Question) -> Question:
    """Expose a function of a context id as one that `survey` asks."""
    exposed: Question = expose(function)
    _questions.add(name_of(exposed))
    return exposed


@expose
def ask_on(name: str, context_id: int, route: tuple[int, ...]) -> dict[str, Any]:
    """Ask the last worker of a route a question, by way of the others."""
    if name not in _questions:
        raise PermissionError(f"cannot ask {name!r} for another worker: it is not a question")
    by = deadline()
    left = None if by is None else max(by - time.monotonic(), 1e-3)
    answer: dict[str, Any] = _ask(current_worker(), name, context_id, tuple(route), left).wait()
    return answer


def _ask(
    worker: Worker, name: str, context_id: int, route: tuple[int, ...], timeout: float | None
) -> Future:
    call = Call(name, (context_id,), None)
    if len(route) > 1:
        call = Call(name_of(ask_on), (name, context_id, route[1:]), None)
    future: Future = worker.request(route[0], call, timeout=timeout)
    return future


def survey(engine: Engine, asked: Question, context_id: int, timeout_s: float) -> dict[int, Any]:
    """Ask each worker that messages of a context connect with this one.

    Parameters
    ----------
    engine
        The contexts of the worker that asks.
    asked
        A `question`; it returns a dict whose ``peers`` are the ids of the workers at the
        other end of the callee's messages.
    context_id
        The context.
    timeout_s
        For all answers together, however deadlines of calls that are served here stand.

    Returns
    -------
    dict
        By worker id what the function returned, or the exception that there was instead.
        The answer of this worker is first; what is wrong with it is raised.
    """
    until = time.monotonic() + timeout_s
    worker, name = engine.worker, name_of(asked)
    connected = worker.agent.links.routes
    outer = current.get()
    current.set(None)  # looking must not be recorded
    try:
        answers: dict[int, Any] = {engine.worker_id: asked(context_id)}
        routes: dict[int, tuple[int, ...]] = {engine.worker_id: ()}
        newest = [engine.worker_id]
        while newest:
            futures = {}
            for teller in newest:
                for peer in answers[teller]["peers"]:
                    if peer in routes:
                        continue
                    routes[peer] = (peer,) if peer in connected else (*routes[teller], peer)
                    left = max(until - time.monotonic(), 1e-3)
                    try:
                        futures[peer] = _ask(worker, name, context_id, routes[peer], left)
                    except Exception as error:
                        answers[peer] = error
            answers |= {peer: _outcome(future) for peer, future in futures.items()}
            newest = [peer for peer in futures if isinstance(answers[peer], dict)]
        return answers
    finally:
        current.set(outer)


def _outcome(future: Any) -> Any:
    try:
        return future.wait()
    except Exception as error:
        return error
