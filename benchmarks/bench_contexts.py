"""What autograd contexts cost when they are large, and when many threads have one each."""

from __future__ import annotations

from harness import Case, System, main

CASES = [
    Case("sends_1000", "1 000 calls in one context to one worker, one backward"),
    Case("threads_20", "20 threads, each 5 contexts with a call to each of 3 workers", fresh=True),
]
SYSTEMS = [
    System("distgrad", ["contexts_distgrad.py", "unix"]),
    System("distgrad tcp", ["contexts_distgrad.py", "tcp"]),
    System("torch distributed.autograd", ["contexts_torch.py"], torch=True),
]

if __name__ == "__main__":
    main("contexts", __doc__, CASES, SYSTEMS)
