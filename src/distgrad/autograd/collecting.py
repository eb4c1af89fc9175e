"""The graph of a context, collected from all workers that take part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distgrad._core import Node, gradient_edge
from distgrad.autograd.context import current
from distgrad.autograd.functions import RecvRpcBackward, SendRpcBackward
from distgrad.errors import DistgradError
from distgrad.rpc import current_worker, expose, rpc_sync

if TYPE_CHECKING:
    from distgrad.autograd.engine import Engine

__all__ = ["collect", "graph_here"]

#: Most nodes of one worker that are collected, those nearest to the results first.
_MOST_NODES = 200

Graph = dict[str, Any]


@expose
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
    nodes, edges, left_out = _walk([*(gradient_edge(r)[0] for r in roots), *part.sends.values()])
    messages = [*part.sends.values(), *part.recvs.values()]
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

    Workers that are lost or have finished the context meanwhile are left out.
    """
    found: dict[int, Graph] = {}
    todo = [engine.worker_id]
    outer = current.get()
    current.set(None)  # looking must not be recorded
    try:
        while todo:
            worker_id = todo.pop()
            if worker_id in found:
                continue
            try:
                found[worker_id] = rpc_sync(worker_id, graph_here, args=(context_id,))
            except DistgradError:
                if worker_id == engine.worker_id:
                    raise
                continue
            todo += found[worker_id]["peers"]
    finally:
        current.set(outer)
    return dict(sorted(found.items()))
