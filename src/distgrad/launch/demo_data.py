"""The images of the demo: 1797 handwritten digits of 8 x 8 pixels, from scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from distgrad.errors import DistgradError

__all__ = ["Digits", "load"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Digits:
    """Images for training and images for testing.

    Parameters
    ----------
    train_images, test_images
        float64, shape (images, 64), values 0 to 1.
    train_labels
        One-hot float64, shape (images, 10).
    test_labels
        Integers 0 to 9.
    """

    FEATURES: ClassVar[int] = 64
    CLASSES: ClassVar[int] = 10

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array

    def steps(self, size: int) -> int:
        """Return the number of full batches in one epoch."""
        return len(self.train_images) // size

    def batches(self, size: int, random: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        """Yield the batches of one epoch, images and labels, in a random order."""
        order = random.permutation(len(self.train_images))
        for step in range(self.steps(size)):
            chosen = order[step * size : (step + 1) * size]
            yield self.train_images[chosen], self.train_labels[chosen]


def load() -> Digits:
    """Load the digits; every fourth one, in a fixed random order, is for testing.

    Raises
    ------
    DistgradError
        If scikit-learn is not installed.
    """
    try:
        load_digits = import_module("sklearn.datasets").load_digits
    except ImportError as error:
        raise DistgradError(
            f"cannot load the digits: {error}", hint="pip install 'distgrad[demo]'"
        ) from None
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[::4], np.delete(order, np.s_[::4])
    images = images / 16.0
    one_hot = np.eye(Digits.CLASSES)[labels]
    return Digits(images[train], one_hot[train], images[test], labels[test])
