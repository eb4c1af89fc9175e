"""What recording and differentiating a graph costs inside one process."""

from __future__ import annotations

from harness import Case, System, main

CASES = [
    Case("chain_40_plain", "40 operations on float64[4], forward without grad"),
    Case("chain_40_forward", "40 operations on float64[4], forward"),
    Case("chain_40", "40 operations on float64[4], forward and backward"),
    Case("scalar_40", "40 operations on float64[], forward and backward"),
    Case("fan", "fan-out to 64 and in again, float64[4], forward and backward"),
    Case("fan_10000", "fan-out and fan-in of 10 000 nodes, float64[4], forward and backward"),
    *(
        Case(f"line_{n}", f"{n:,} additions in a row: record, backward, free", "ns/node", n)
        for n in (1_000, 10_000, 100_000, 1_000_000)
    ),
    Case("matmul_relu_sum", "sum(relu(a @ b)), float32[64, 64], forward and backward"),
    Case("mlp_step", "training step of a 64-128-10 network, batch of 32, float32"),
    Case("accumulate_16", "1000 times a gradient of float64[16] is added to one in memory"),
    Case("accumulate_1024", "the same with float64[1024]"),
    Case("accumulate_65536", "the same with float64[65536]"),
]
SYSTEMS = [
    System("distgrad", ["graph_distgrad.py"]),
    System("torch", ["graph_torch.py"], torch=True),
    System("HIPS autograd", ["graph_autograd.py"]),
    System("control: NumPy by hand", ["graph_numpy.py"], control=True),
    System("control: loop in C", ["graph_c.py"], control=True),
]

if __name__ == "__main__":
    main("graph", __doc__, CASES, SYSTEMS)
