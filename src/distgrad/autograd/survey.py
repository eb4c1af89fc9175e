"""Asking all workers of a context one question, at once and within a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distgrad.autograd.context import current
from distgrad.message import Call
from distgrad.rpc.exposure import name_of

if TYPE_CHECKING:
    from distgrad.autograd.engine import Engine

__all__ = ["survey"]


def survey(
    engine: Engine, question: Callable[[int], Any], context_id: int, timeout_s: float
) -> dict[int, Any]:
    """Call a function on each worker that messages of a context connect with this one.

    Parameters
    ----------
    engine
        The contexts of the worker that asks.
    question
        An exposed function of a context id; it returns a dict whose ``peers`` are the ids of
        the workers at the other end of the callee's messages.
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
    worker, name = engine.worker, name_of(question)
    outer = current.get()
    current.set(None)  # looking must not be recorded
    try:
        answers = {engine.worker_id: question(context_id)}
        newest = list(answers.values())
        while newest:
            asked = {}
            for peer in {peer for answer in newest for peer in answer["peers"]} - answers.keys():
                left = max(until - time.monotonic(), 1e-3)
                try:
                    asked[peer] = worker.request(
                        peer, Call(name, (context_id,), None), timeout=left
                    )
                except Exception as error:
                    answers[peer] = error
            answers |= {peer: _outcome(future) for peer, future in asked.items()}
            newest = [answers[peer] for peer in asked if isinstance(answers[peer], dict)]
        return answers
    finally:
        current.set(outer)


def _outcome(future: Any) -> Any:
    try:
        return future.wait()
    except Exception as error:
        return error
