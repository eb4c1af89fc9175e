"""The curves of the demo: well-formed, complete, inside the picture."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from distgrad.launch.picture import HEIGHT, WIDTH, curves_svg, draw_curves

SVG = "{http://www.w3.org/2000/svg}"


def run_of(epochs: int, steps: int) -> tuple[list[float], list[float]]:
    losses = [2.0 / (1 + i) for i in range(epochs * steps)]
    return losses, [1 - 0.4 / (e + 1) for e in range(epochs)]


@pytest.mark.parametrize("epochs", [1, 2, 7, 25, 300])
def test_picture_any_number_of_epochs_draws_every_point_inside(epochs: int) -> None:
    losses, accuracies = run_of(epochs, 5)
    root = ElementTree.fromstring(curves_svg(losses, accuracies))
    lines = [line.attrib["points"].split() for line in root.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [len(losses), epochs, epochs]
    for x, y in (map(float, point.split(",")) for points in lines for point in points):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


def test_picture_smaller_loss_is_drawn_lower() -> None:
    root = ElementTree.fromstring(curves_svg([1.0, 0.1, 0.01], [0.5]))
    steps = next(root.iter(f"{SVG}polyline")).attrib["points"].split()
    heights = [float(point.split(",")[1]) for point in steps]
    assert heights == sorted(heights)
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.2)


def test_picture_labels_say_final_loss_and_accuracy(tmp_path: Path) -> None:
    draw_curves(tmp_path / "loss.svg", [1.0, 0.25], [0.5, 0.975])
    texts = re.findall(r">([^<]+)</text>", (tmp_path / "loss.svg").read_text())
    assert "Test accuracy 97.5 % after 2 epochs" in texts
    assert {"0.25", "97.5 %"} <= set(texts)
