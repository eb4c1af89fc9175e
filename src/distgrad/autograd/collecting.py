"""The graph of a context, collected from all workers that take part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distgrad._core import Node, gradient_edge
from distgrad.autograd.functions import RecvRpcBackward, SendRpcBackward
from distgrad.autograd.survey import question, survey
from distgrad.rpc import current_worker

if TYPE_CHECKING:
    from distgrad.autograd.engine import Engine

__all__ = ["collect", "graph_here"]

#: Most nodes of one worker that are collected, those nearest to the results first.
_MOST_NODES = 200
_PATIENCE_S = 60.0  # where calls have no deadline

Graph = dict[str, Any]


@question
def graph_here(context_id: int) -> Graph:
    """Return this worker's part of the graph of a context, as plain values.

    Returns
    -------
    dict
        ``worker``: name. ``nodes``: a dict (``kind``, ``label``, ``message``, ``peer``) for
        each node. ``edges``: pairs of positions in ``nodes``, in the direction of gradients.
        ``peers``: ids of the workers at the other end of messages. ``left_out``: number of
        nodes beyond the limit.
    """
    worker = current_worker()
    engine: Engine = worker.extensions["autograd"]
    part = engine.existing(context_id)
    roots = [root for reference in part.roots if (root := reference()) is not None]
    messages: list[Any] = [*part.sends.values(), *part.recvs.values()]
    nodes, edges, left_out = _walk([*(gradient_edge(r)[0] for r in roots), *messages])
    return {
        "worker": worker.name,
        "nodes": [_described(node) for node in nodes],
        "edges": edges,
        "peers": sorted({node.peer for node in messages}),
        "left_out": left_out,
    }


def _walk(starts: list[Node]) -> tuple[list[Node], list[tuple[int, int]], int]:
    """Return the nodes that can be reached, breadth first, and the edges between them."""
    places: dict[Node, int] = {}
    for start in starts:
        places.setdefault(start, len(places))
    nodes = list(places)
    edges = []
    left_out = 0
    for place, node in enumerate(nodes):  # grows meanwhile
        for target, _ in node.next_functions:
            if target is None:
                continue
            if target not in places and len(nodes) >= _MOST_NODES:
                left_out += 1
                continue
            if target not in places:
                places[target] = len(nodes)
                nodes.append(target)
            edges.append((place, places[target]))
    return nodes, edges, left_out


def _described(node: Node) -> dict[str, Any]:
    if isinstance(node, SendRpcBackward):
        return {"kind": "send", "label": "send", "message": node.message_id, "peer": node.peer}
    if isinstance(node, RecvRpcBackward):
        return {"kind": "recv", "label": "recv", "message": node.message_id, "peer": node.peer}
    variable = getattr(node, "variable", None)
    if variable is not None:
        return {"kind": "leaf", "label": f"leaf {' x '.join(map(str, variable.shape)) or '()'}"}
    return {"kind": "operation", "label": node.name().removesuffix("Backward").lower()}


def collect(engine: Engine, context_id: int) -> dict[int, Graph]:
    """Return the parts of all workers that messages of the context connect, by worker id.

    Workers that are lost, have finished the context or do not answer are left out.
    """
    answers = survey(
        engine, graph_here, context_id, engine.worker.options.rpc_timeout or _PATIENCE_S
    )
    return {w: part for w, part in sorted(answers.items()) if isinstance(part, dict)}
