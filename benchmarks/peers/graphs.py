"""The work of bench_graph, written once for every library with NumPy's names.

``xp`` is the namespace with ``sin`` and ``tanh``; tensors bring ``@``, ``+`` and ``sum``.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

BATCH, FEATURES, HIDDEN, CLASSES = 32, 64, 128, 10
FAN = 64
WIDE_FAN = 5000
SQUARE = 64
SUMS = 1000
LEARNING_RATE = 0.01


def chain_40(xp: Any, x: Any) -> Any:
    """40 element-wise operations one after the other."""
    for _ in range(10):
        x = xp.sin(x) * 1.1 + 0.2 - 0.1
    return x


def fan(x: Any, width: int = FAN) -> Any:
    """One leaf used `width` times, all results summed: two nodes a use."""
    total = x
    for weight in range(width):
        total = total + x * float(weight)
    return total


def line(x: Any, length: int) -> Any:
    """A graph without width, to see whether time grows with its length alone."""
    for _ in range(length):
        x = x + 1.0
    return x


def square_pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    first, second = random.standard_normal((2, SQUARE, SQUARE)).astype(np.float32)
    return first, second


def mlp_weights() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = (FEATURES, HIDDEN, CLASSES)
    return [
        (random.standard_normal(shape) / 8).astype(np.float32)
        for shape in itertools.pairwise(sizes)
    ]


def mlp_batch() -> tuple[np.ndarray, np.ndarray]:
    """A batch and its one-hot labels."""
    random = np.random.default_rng(1)
    images = random.standard_normal((BATCH, FEATURES)).astype(np.float32)
    labels = np.eye(CLASSES, dtype=np.float32)[random.integers(0, CLASSES, BATCH)]
    return images, labels


def mlp_loss(xp: Any, weights: Any, images: Any, labels: Any) -> Any:
    """Cross-entropy of a network of two layers."""
    first, second = weights
    scores = xp.tanh(images @ first) @ second
    return (xp.log(xp.exp(scores).sum(1)).sum() - (scores * labels).sum()) / BATCH
