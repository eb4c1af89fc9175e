"""What recording and differentiating a graph costs inside one process."""

from __future__ import annotations

from harness import Case, System, main

CASES = [
    Case("chain_40_forward", "40 operations on float64[4], forward"),
    Case("chain_40", "40 operations on float64[4], forward and backward"),
    Case("fan", "fan-out to 64 and in again, float64[4], forward and backward"),
    Case("mlp_step", "training step of a 64-128-128-10 network, batch of 64, float32"),
]
SYSTEMS = [
    System("distgrad", ["graph_distgrad.py"]),
    System("torch", ["graph_torch.py"], torch=True),
    System("HIPS autograd", ["graph_autograd.py"]),
    System("control: NumPy by hand", ["graph_numpy.py"], control=True),
]

if __name__ == "__main__":
    main("graph", __doc__, CASES, SYSTEMS)
