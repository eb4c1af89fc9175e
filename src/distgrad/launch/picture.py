"""Curves as SVG files, written by hand: a picture needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["curves_svg", "draw_curves"]

WIDTH, HEIGHT = 760, 420
INK, SOFT, GRID = "#1f2933", "#6b7785", "#e6eaee"
LOSS, STEP, ACCURACY = "#0b6fb8", "#a9cbe6", "#d1661b"
FONT = "font-family='ui-sans-serif, system-ui, Helvetica, Arial, sans-serif'"


class Frame(NamedTuple):
    """A rectangle of the picture and the data range that it shows."""

    left: float
    top: float
    right: float
    bottom: float
    x_max: float
    y_min: float
    y_max: float

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.x_max

    def y(self, value: float) -> float:
        part = (value - self.y_min) / (self.y_max - self.y_min)
        return self.bottom - (self.bottom - self.top) * part


def draw_curves(path: Path, losses: Sequence[float], accuracies: Sequence[float]) -> None:
    """Write `curves_svg` to a file."""
    path.write_text(curves_svg(losses, accuracies), encoding="utf-8")


def curves_svg(losses: Sequence[float], accuracies: Sequence[float]) -> str:
    """Return a picture of a training run: the loss above, the test accuracy below.

    Parameters
    ----------
    losses
        One positive number a step.
    accuracies
        One number from 0 to 1 an epoch; epochs have the same number of steps.
    """
    epochs = len(accuracies)
    steps = len(losses) // epochs
    means = [sum(losses[e * steps : (e + 1) * steps]) / steps for e in range(epochs)]
    title = f"Test accuracy {100 * accuracies[-1]:.1f} % after {epochs} epochs"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {FONT}>",
            f"<title>{title}</title>",
            f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#ffffff'/>",
            _text(64, 34, title, size=17, weight=600),
            *_loss_panel(losses, means, epochs),
            *_accuracy_panel(accuracies, epochs),
            "</svg>\n",
        ]
    )


def _loss_panel(losses: Sequence[float], means: Sequence[float], epochs: int) -> list[str]:
    """Return the loss of each step and the mean of each epoch, on a logarithmic scale."""
    low = math.floor(math.log10(min(losses)))
    high = max(low + 1, math.ceil(math.log10(max(losses)) * 2) / 2)
    frame = Frame(64, 74, WIDTH - 24, 262, epochs, low, high)
    ticks = [(decade, f"{10.0**decade:g}") for decade in range(low, math.floor(high) + 1)]
    by_step = [((i + 1) * epochs / len(losses), math.log10(v)) for i, v in enumerate(losses)]
    by_epoch = [(e + 0.5, math.log10(v)) for e, v in enumerate(means)]
    return [
        *_grid(frame, ticks),
        _text(64, 62, "loss: every step, and the mean of every epoch", fill=SOFT),
        _line(frame, by_step, STEP, 1.0),
        _line(frame, by_epoch, LOSS, 2.4),
        _dot(frame, by_epoch[-1], LOSS, f"{means[-1]:.3g}"),
    ]


def _accuracy_panel(accuracies: Sequence[float], epochs: int) -> list[str]:
    """Return the accuracy after each epoch, with the epochs below."""
    low = min(0.9, math.floor(min(accuracies) * 10) / 10)
    frame = Frame(64, 308, WIDTH - 24, 374, epochs, low, 1.0)
    points = [(e + 1.0, v) for e, v in enumerate(accuracies)]
    spacing = next(n for n in (1, 2, 5, 10, 20, 50, 100, epochs) if epochs / n <= 10)
    marks = sorted({low, 1.0, *(m / 10 for m in range(5, 10) if m / 10 > low)})
    return [
        *_grid(frame, [(mark, f"{100 * mark:.0f} %") for mark in marks]),
        _text(64, 296, "accuracy on the test images", fill=SOFT),
        _line(frame, points, ACCURACY, 2.4),
        _dot(frame, points[-1], ACCURACY, f"{100 * accuracies[-1]:.1f} %"),
        *(
            _text(frame.x(epoch), 394, str(epoch), size=12, anchor="middle", fill=SOFT)
            for epoch in range(0, epochs + 1, spacing)
        ),
        _text(frame.right, 412, "epoch", size=12, anchor="end", fill=SOFT),
    ]


def _grid(frame: Frame, ticks: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for value, label in ticks:
        y = frame.y(value)
        ends = f"x1='{frame.left}' x2='{frame.right}' y1='{y:.1f}' y2='{y:.1f}'"
        parts.append(f"<line {ends} stroke='{GRID}'/>")
        parts.append(_text(frame.left - 10, y + 4, label, size=12, anchor="end", fill=SOFT))
    return parts


def _line(frame: Frame, points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    style = f"stroke='{colour}' stroke-width='{width}' stroke-linejoin='round'"
    return f"<polyline points='{path}' fill='none' {style}/>"


def _dot(frame: Frame, point: tuple[float, float], colour: str, label: str) -> str:
    x, y = frame.x(point[0]), frame.y(point[1])
    halo = "stroke='#ffffff' stroke-width='5' stroke-linejoin='round' paint-order='stroke'"
    circle = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'/>"
    text = _text(x + 4, y - 11, label, anchor="end", weight=600, fill=colour)
    return circle + text.replace("<text", f"<text {halo}", 1)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    anchor: str = "start",
    weight: int = 400,
    fill: str = INK,
) -> str:
    style = f"font-size='{size}' font-weight='{weight}' text-anchor='{anchor}' fill='{fill}'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{text}</text>"
