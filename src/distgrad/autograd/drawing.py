"""Pictures of a distributed graph: workers as boxes, messages as arrows between them.

Everything runs in the direction of gradients, from the results at the top to the leaves at
the bottom.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from itertools import chain, pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from distgrad.autograd.collecting import Graph, collect

if TYPE_CHECKING:
    from distgrad.autograd.engine import Engine

__all__ = ["as_dot", "as_svg", "draw"]

Place = tuple[int, int]  # worker id, position among the nodes of its graph

# Pixels.
_WIDTH, _HEIGHT = 104, 24  # of a node
_ACROSS, _DOWN = 120, 48  # from node to node
_PAD, _HEAD, _GAP = 16, 34, 44  # inside a box, its title, between boxes
_BEND = 0.2  # columns that an edge takes where it passes a row

_FILLS = {"operation": "#ffffff", "leaf": "#d9f2d9", "send": "#ffe3c2", "recv": "#cfe3ff"}
_STYLE = """
text { font: 12px sans-serif; text-anchor: middle; fill: #1b1f24 }
.title { font: bold 14px sans-serif }
.note { font: 11px sans-serif; fill: #57606a }
.box { fill: #f6f8fa; stroke: #8c959f }
.node { stroke: #57606a }
.edge { fill: none; stroke: #8c959f; marker-end: url(#tip) }
.message { fill: none; stroke: #bc4c00; stroke-width: 1.6; marker-end: url(#message-tip) }
"""
_TIP = (
    '<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
    'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{fill}"/></marker>'
)


def draw(engine: Engine, context_id: int, path: str | PathLike[str]) -> None:
    """Collect the graph of a context from its workers and write a picture of it.

    Parameters
    ----------
    engine
        The contexts of the worker that asks.
    context_id
        The context.
    path
        Where to: a DOT file if it ends with ``.dot``, otherwise SVG.
    """
    parts = collect(engine, context_id)
    text = as_dot(parts) if str(path).endswith(".dot") else as_svg(parts)
    Path(path).write_text(text, encoding="utf-8")


def _messages(parts: dict[int, Graph]) -> list[tuple[Place, Place]]:
    """Return the pairs (recv, send) between which gradients travel."""
    ends: dict[tuple[str, int], Place] = {}
    for worker_id, part in parts.items():
        for position, node in enumerate(part["nodes"]):
            if "message" in node:
                ends[node["kind"], node["message"]] = (worker_id, position)
    return [
        (recv, ends["send", message])
        for (kind, message), recv in ends.items()
        if kind == "recv" and ("send", message) in ends
    ]


def _edges(parts: dict[int, Graph]) -> list[tuple[Place, Place]]:
    return [
        ((worker_id, start), (worker_id, end))
        for worker_id, part in parts.items()
        for start, end in part["edges"]
    ]


# --- DOT -----------------------------------------------------------------------------------


def as_dot(parts: dict[int, Graph]) -> str:
    """Return the picture in the language of Graphviz."""
    lines = ["digraph context {", "  node [shape=box, style=filled];"]
    for worker_id, part in parts.items():
        lines.append(f'  subgraph cluster_{worker_id} {{ label="{part["worker"]}";')
        for position, node in enumerate(part["nodes"]):
            fill = _FILLS[node["kind"]]
            name = f"n{worker_id}_{position}"
            lines.append(f'    {name} [label="{node["label"]}", fillcolor="{fill}"];')
        lines.append("  }")
    for style, pairs in (("", _edges(parts)), (' [color="#bc4c00"]', _messages(parts))):
        for start, end in pairs:
            lines.append(f"  n{start[0]}_{start[1]} -> n{end[0]}_{end[1]}{style};")
    return "\n".join([*lines, "}", ""])


# --- SVG -----------------------------------------------------------------------------------


def as_svg(parts: dict[int, Graph]) -> str:
    """Return the picture as an SVG document."""
    edges, messages = _edges(parts), _messages(parts)
    rows = _rows(parts, [*edges, *messages])
    routes = _routes(parts, rows, edges)
    columns, lefts, widths = _columns(parts, rows, routes)
    centres = {
        place: (lefts[place[0]] + _PAD + columns[place] * _ACROSS + _WIDTH / 2,
                _GAP / 2 + _HEAD + _PAD + row * _DOWN + _HEIGHT / 2)
        for place, row in rows.items()
    }  # fmt: skip
    bottom = _HEAD + 2 * _PAD + max(rows.values(), default=0) * _DOWN + _HEIGHT
    width = max((lefts[w] + widths[w] for w in parts), default=0) + _GAP / 2
    body = [
        *(_box(part, lefts[w], widths[w], bottom) for w, part in parts.items()),
        *(_arrow("edge", [centres[place] for place in route]) for route in routes),
        *(
            _node(node, centres[w, i])
            for w, part in parts.items()
            for i, node in enumerate(part["nodes"])
        ),
        *(_arrow("message", [centres[a], centres[b]]) for a, b in messages),
    ]
    tips = _TIP.format(name="tip", fill="#8c959f") + _TIP.format(name="message-tip", fill="#bc4c00")
    height = bottom + _GAP
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n'
        f"<style>{_STYLE}</style>\n<defs>{tips}</defs>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _rows(parts: dict[int, Graph], edges: Iterable[tuple[Place, Place]]) -> dict[Place, int]:
    """Give each node a row below all nodes that gradients come from."""
    after: dict[Place, list[Place]] = defaultdict(list)
    waits: dict[Place, int] = {
        (w, i): 0 for w, part in parts.items() for i in range(len(part["nodes"]))
    }
    for start, end in edges:
        after[start].append(end)
        waits[end] += 1
    rows = dict.fromkeys(waits, 0)
    ready = [place for place, count in waits.items() if count == 0]
    for place in ready:  # grows meanwhile
        for end in after[place]:
            rows[end] = max(rows[end], rows[place] + 1)
            waits[end] -= 1
            if waits[end] == 0:
                ready.append(end)
    return rows


def _routes(
    parts: dict[int, Graph], rows: dict[Place, int], edges: Iterable[tuple[Place, Place]]
) -> list[list[Place]]:
    """Lead each edge through a place of its own in every row between its ends.

    So that it passes beside the nodes there, not behind them. Adds the places to ``rows``;
    their positions follow those of the nodes.
    """
    free = {worker_id: len(part["nodes"]) for worker_id, part in parts.items()}
    routes = []
    for start, end in edges:
        worker_id = start[0]
        bends = range(free[worker_id], free[worker_id] + rows[end] - rows[start] - 1)
        free[worker_id] = max(free[worker_id], bends.stop)
        rows.update({(worker_id, b): rows[start] + 1 + n for n, b in enumerate(bends)})
        routes.append([start, *((worker_id, bend) for bend in bends), end])
    return routes


def _columns(
    parts: dict[int, Graph], rows: dict[Place, int], routes: list[list[Place]]
) -> tuple[dict[Place, float], dict[int, float], dict[int, float]]:
    """Return a column for each place, and left side and width of each worker's box.

    Within a row, places stand in the order of the places that they get gradients from.
    """
    above: dict[Place, list[Place]] = defaultdict(list)
    for start, end in chain.from_iterable(map(pairwise, routes)):
        above[end].append(start)
    columns: dict[Place, float] = {}
    lefts, widths = {}, {}
    left = _GAP / 2
    for worker_id, part in parts.items():
        by_row: dict[int, list[Place]] = defaultdict(list)
        for place in rows:
            if place[0] == worker_id:
                by_row[rows[place]].append(place)
        nodes = len(part["nodes"])
        shares = {row: [_share(p, nodes) for p in by_row[row]] for row in by_row}
        most = max(map(sum, shares.values()), default=1.0)
        for row in sorted(by_row):
            ordered = sorted(by_row[row], key=lambda p: _mean([columns[a] for a in above[p]]))
            column = (most - sum(shares[row])) / 2
            for place in ordered:
                columns[place] = column + (_share(place, nodes) - 1) / 2
                column += _share(place, nodes)
        lefts[worker_id] = left
        widths[worker_id] = 2 * _PAD + (most - 1) * _ACROSS + _WIDTH
        left += widths[worker_id] + _GAP
    return columns, lefts, widths


def _share(place: Place, nodes: int) -> float:
    """How much of a column a place takes: a bend of an edge is narrower than a node."""
    return 1.0 if place[1] < nodes else _BEND


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _box(part: Graph, left: float, width: float, height: float) -> str:
    top, middle = _GAP / 2, left + width / 2
    left_out = part["left_out"]
    note = f"{left_out} further edges are left out"
    return (
        f'<rect class="box" x="{left}" y="{top}" width="{width}" height="{height}" rx="10"/>'
        f'<text class="title" x="{middle}" y="{top + 22}">{escape(part["worker"])}</text>'
        + (f'<text class="note" x="{middle}" y="{top + height - 5}">{note}</text>' if left_out
           else "")
    )  # fmt: skip


def _node(node: dict[str, str], centre: tuple[float, float]) -> str:
    x, y = centre
    return (
        f'<rect class="node" x="{x - _WIDTH / 2}" y="{y - _HEIGHT / 2}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" rx="5" fill="{_FILLS[node["kind"]]}"/>'
        f'<text x="{x}" y="{y + 4}">{escape(node["label"])}</text>'
    )


def _arrow(style: str, points: list[tuple[float, float]]) -> str:
    """Return a curve from the lower side of the first point to the upper one of the last."""
    (x, y), *bends, (x_end, y_end) = points
    y += _HEIGHT / 2
    path = f"M{x:.1f} {y:.1f}"
    for x2, y2 in [*bends, (x_end, y_end - _HEIGHT / 2 - 1)]:
        bend = max(14.0, (y2 - y) / 2)
        path += f"C{x:.1f} {y + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
        x, y = x2, y2
    return f'<path class="{style}" d="{path}"/>'
