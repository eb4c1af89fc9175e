"""What remote references cost: making one, calling through one, stepping parameters behind many."""

from __future__ import annotations

from harness import Case, System, main

CASES = [
    Case("remote_to_here", "remote + to_here of float32[1]"),
    Case("proxy_call", "method call through rref.rpc_sync()"),
    Case("step_sgd_100", "DistributedOptimizer.step, SGD, 100 parameters on 2 workers"),
    Case("step_adam_100", "DistributedOptimizer.step, Adam, 100 parameters on 2 workers"),
]
SYSTEMS = [
    System("distgrad", ["distgrad_peer.py", "unix"]),
    System("distgrad tcp", ["distgrad_peer.py", "tcp"]),
    System("torch rpc", ["torch_peer.py"], torch=True),
]

if __name__ == "__main__":
    main("rref", __doc__, CASES, SYSTEMS)
