"""What the passes of a context wait for, on all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distgrad.autograd.part import Run
from distgrad.autograd.survey import question, survey
from distgrad.autograd.terms import COMPLETE, RUNNING
from distgrad.errors import RpcTimeoutError
from distgrad.graph.tracing import RECORDED_AT
from distgrad.rpc import current_worker

if TYPE_CHECKING:
    from distgrad.autograd.engine import Engine

__all__ = ["waiting_here", "why_waiting"]

#: Most sends of one pass on one worker that a report lists, the oldest first.
_MOST_SENDS = 20


@question
def waiting_here(context_id: int) -> dict[str, Any]:
    """Return what the passes of a context wait for on this worker, as plain values.

    Returns
    -------
    dict
        ``peers``: ids of the workers at the other end of messages. ``passes``: a dict for each
        pass that this worker has not done its part of: ``pass_id``; ``state``; ``busy``,
        whether a thread runs it; ``missing``, at its root the ids of workers that have not
        reported; ``sends``, of those without gradient (what, peer, where it was recorded
        or ""), the oldest; ``left_out``, how many more there are.
    """
    engine: Engine = current_worker().extensions["autograd"]
    part = engine.existing(context_id)
    part.lock.acquire()
    try:
        peers = {node.peer for nodes in (part.sends, part.recvs) for node in nodes.values()}
        runs = list(part.table.passes.values())
    finally:
        part.lock.release()
    undone = [run for run in runs if run.state is not COMPLETE or run.closure is not None]
    return {"peers": sorted(peers | part.known), "passes": [_described(run) for run in undone]}


def _described(run: Run) -> dict[str, Any]:
    """Look at a pass from outside, while another thread may be at work on it."""
    waiting: list[Any] = list(run._unresolved.values()) if run.state is RUNNING else []
    closure = run.closure
    missing = sorted(closure.missing) if closure is not None else []
    return {
        "pass_id": run.pass_id,
        "state": run.state.value,
        "busy": run.busy,
        "missing": missing,
        "sends": [
            (node.described(), node.peer, node.metadata.get(RECORDED_AT, ""))
            for node in waiting[:_MOST_SENDS]
        ],
        "left_out": max(0, len(waiting) - _MOST_SENDS),
    }


def why_waiting(engine: Engine, context_id: int, timeout_s: float) -> str:
    """Return a report for people: what the passes of a context wait for, worker by worker.

    Parameters
    ----------
    engine
        The contexts of the worker that asks.
    context_id
        The context.
    timeout_s
        For the answers of all workers together; those that give none are named.
    """
    answers = survey(engine, waiting_here, context_id, timeout_s)
    lines = []
    for worker_id in sorted(answers):
        answer, name = answers[worker_id], _name(engine, worker_id)
        if isinstance(answer, RpcTimeoutError):
            lines.append(f"worker {name} did not answer within {timeout_s:g} s")
        elif isinstance(answer, Exception):
            fact = getattr(answer, "message", "") or str(answer)
            lines.append(f"worker {name} could not be asked: {fact}")
        else:
            for found in answer["passes"]:
                lines += _lines(engine, name, found)
    return "\n".join(lines) or "no pass of this context is running"


def _name(engine: Engine, worker_id: int) -> str:
    return repr(engine.worker.world.name_of(worker_id))


def _lines(engine: Engine, name: str, found: dict[str, Any]) -> list[str]:
    state, number = found["state"], found["pass_id"] & (1 << 48) - 1
    root = _name(engine, found["pass_id"] >> 48)
    head = f"worker {name}, pass {number} of worker {root}: {state}"
    if found["busy"]:
        head += ", a thread is at work"
    if state == "complete" and found["missing"]:
        head += "; no report from " + ", ".join(_name(engine, w) for w in found["missing"])
    lines = [head]
    for what, peer, site in found["sends"]:
        recorded = f", recorded at {site}" if site else ""
        lines.append(f"  no gradient from worker {_name(engine, peer)} for {what}{recorded}")
    if found["left_out"]:
        lines.append(f"  and for {found['left_out']} more")
    return lines
