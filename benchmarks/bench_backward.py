"""What a backward pass across processes costs, forward pass included."""

from __future__ import annotations

from harness import Case, System, main

CASES = [
    Case("backward_call", "context with one call, backward, get_gradients"),
    Case("backward_chain_9", "9 nested calls A-B-A-…, forward and backward"),
    Case("backward_16mb", "one call with 16 MB, its sum, and back", "GB/s", 32 * 2**20),
    Case(
        "backward_16mb_weighted",
        "one call with 16 MB, a weighted sum, and back",
        "GB/s",
        32 * 2**20,
    ),
]
SYSTEMS = [
    System("distgrad", ["distgrad_peer.py", "unix"]),
    System("distgrad tcp", ["distgrad_peer.py", "tcp"]),
    System("torch distributed.autograd", ["torch_peer.py"], torch=True),
    System("control: socket, 1 core", ["socket_peer.py", "together"], control=True),
    System("control: socket, 2 cores", ["socket_peer.py", "apart"], control=True),
]

if __name__ == "__main__":
    main("backward", __doc__, CASES, SYSTEMS)
