"""Pictures of the graph across workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import served

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.autograd.collecting import collect
from distgrad.testing import World

SVG = "{http://www.w3.org/2000/svg}"


def draw_both(rank: int, folder: str) -> Any:
    x = dg.tensor([1.0, 2.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.through, args=(x, [2])).sum()
        dist_autograd.backward(context_id, [loss])
        before = served.counters()
        for ending in ("svg", "dot"):
            context_id.draw(Path(folder) / f"graph.{ending}")
        return before == served.counters()


def test_drawing_shows_workers_nodes_and_messages(trio: World, tmp_path: Path) -> None:
    (untouched,) = trio.run(draw_both, str(tmp_path), ranks=[0])
    assert untouched
    picture = ElementTree.parse(tmp_path / "graph.svg").getroot()
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert [t for t in texts if t.startswith("worker")] == ["worker0", "worker1", "worker2"]
    assert "leaf 2" in texts
    assert (texts.count("send"), texts.count("recv")) == (4, 4)
    styles = [path.get("class") for path in picture.iter(f"{SVG}path")]
    assert styles.count("message") == 4
    for start, end in arrows(picture, "edge") + arrows(picture, "message"):
        assert end > start  # gradients run downwards

    dot = (tmp_path / "graph.dot").read_text()
    assert dot.count('color="#bc4c00"') == 4
    assert 'subgraph cluster_2 { label="worker2";' in dot


def arrows(picture: ElementTree.Element, style: str) -> list[tuple[float, float]]:
    """Return the heights at which the arrows of a style start and end."""
    found = []
    for path in picture.iter(f"{SVG}path"):
        if path.get("class") == style:
            words = path.get("d", "").replace("C", " ").split()
            found.append((float(words[1]), float(words[-1])))
    return found


def test_collecting_leaves_out_what_is_too_much(threads: World) -> None:
    def program(rank: int) -> Any:
        x = dg.tensor([1.0], requires_grad=True)
        with dist_autograd.context() as context_id:
            for _ in range(300):
                x = x * 1.0
            rpc.rpc_sync("worker1", served.scale, args=(x,))
            return collect(rpc.current_worker().extensions["autograd"], int(context_id))

    parts = threads.run(program, ranks=[0])[0]
    assert len(parts[0]["nodes"]) == 200
    assert parts[0]["left_out"] == 1
    assert [part["worker"] for part in parts.values()] == ["worker0", "worker1"]


def test_drawing_shows_results_that_nothing_uses(threads: World) -> None:
    def program(rank: int) -> Any:
        x = dg.tensor([1.0], requires_grad=True)
        with dist_autograd.context() as context_id:
            rpc.rpc_sync("worker1", served.scale, args=(x,))
            return collect(rpc.current_worker().extensions["autograd"], int(context_id))

    parts = threads.run(program, ranks=[0])[0]
    assert [node["kind"] for node in parts[0]["nodes"]] == ["send", "recv", "leaf"]
