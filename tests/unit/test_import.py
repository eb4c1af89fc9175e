"""What ``import distgrad`` loads: tensors, and nothing that only worlds of workers need."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import numpy
before = set(sys.modules)
import distgrad
print(*sorted(set(sys.modules) - before))
"""
HEAVY = {
    *("asyncio", "socket", "ssl", "multiprocessing", "subprocess", "selectors", "logging"),
    *("distgrad.rpc", "distgrad.transport", "distgrad.autograd", "distgrad.optim"),
    *("distgrad.testing", "distgrad.functional", "distgrad._codec", "distgrad.launch"),
}


def test_import_loads_only_what_tensors_need() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=50
    )
    loaded = set(done.stdout.split())
    assert "distgrad._core" in loaded
    assert loaded & HEAVY == set()
