"""The two messages of bench_codec."""

from __future__ import annotations

import numpy as np

#: A call: function, positional and keyword arguments.
ARGUMENTS = ("mod.f", (1, 2.5, "hello", [1, 2, 3], {"a": 1, "b": None}), {"k": True})


def gradients() -> list[np.ndarray]:
    """Four small gradients, as one PropagateGradientsReq carries them."""
    return [np.full(8, value, np.float32) for value in range(4)]
