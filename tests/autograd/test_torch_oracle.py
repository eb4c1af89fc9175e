"""torch.distributed.autograd as an oracle: the same programs have the same gradients there.

Runs where torch is installed, or with an interpreter that has it in ``DISTGRAD_TORCH_PYTHON``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.testing import World

OPERATIONS = importlib.import_module("torch_programs").OPERATIONS
WORKERS = 3


def torch_python() -> str:
    found = os.environ.get("DISTGRAD_TORCH_PYTHON")
    if found is None and importlib.util.find_spec("torch") is None:
        pytest.skip("compares with torch, which is not installed (DISTGRAD_TORCH_PYTHON)")
    return found or sys.executable


def draw(seed: int) -> dict[str, Any]:
    """Draw a program: steps of (operation, two arguments, worker, worker it asks or -1)."""
    chance = random.Random(seed)
    leaves = [[chance.uniform(-1, 1) for _ in range(3)] for _ in range(3)]
    steps = []
    for number in range(chance.randint(1, 10)):
        arguments = [chance.randrange(3 + number) for _ in range(2)]
        worker = chance.randrange(WORKERS)
        via = chance.choice([n for n in range(WORKERS) if n != worker])
        nested = worker > 0 and chance.random() < 0.3
        operation = chance.choice(sorted(OPERATIONS))
        steps.append([operation, *arguments, worker, via if nested else -1])
    weights = [chance.uniform(0.5, 2) for _ in range(3 + len(steps))]
    return {"leaves": leaves, "steps": steps, "weights": weights}


@rpc.expose
def serve(operation: str, a: Any, b: Any) -> Any:
    return OPERATIONS[operation](np, a, b)


@rpc.expose
def relay(operation: str, a: Any, b: Any, via: int) -> Any:
    return rpc.rpc_sync(via, serve, args=(operation, a, b)) + a


def gradients(program: dict[str, Any]) -> list[Any]:
    leaves = [dg.tensor(values, requires_grad=True) for values in program["leaves"]]
    values: list[Any] = list(leaves)
    with dist_autograd.context() as context_id:
        for operation, first, second, worker, via in program["steps"]:
            a, b = values[first], values[second]
            if via >= 0:
                values.append(rpc.rpc_sync(worker, relay, args=(operation, a, b, via)))
            elif worker == 0:
                values.append(serve(operation, a, b))
            else:
                values.append(rpc.rpc_sync(worker, serve, args=(operation, a, b)))
        weights = zip(values, program["weights"], strict=True)
        loss = sum((value * weight).sum() for value, weight in weights)
        dist_autograd.backward(context_id, [loss], timeout=30)
        found = dist_autograd.get_gradients(context_id)
        return [found[leaf].numpy().copy() for leaf in leaves]


def by_torch(python: str, programs: list[Any], folder: Path) -> list[Any]:
    source, target = folder / "programs.json", folder / "gradients.json"
    source.write_text(json.dumps(programs))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    script = Path(__file__).with_name("torch_programs.py")
    processes = [
        subprocess.Popen(
            [python, script, str(rank), source, target, str(WORKERS), str(port)],
            stderr=subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        for rank in range(WORKERS)
    ]
    try:
        errors = [process.communicate(timeout=250)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), errors
    answers: list[Any] = json.loads(target.read_text())
    return answers


@pytest.mark.deadline(600)
def test_torch_has_the_same_gradients(
    tmp_path: Path, extent: Callable[[int, int], int], seed: int
) -> None:
    python = torch_python()
    programs = [draw(seed + number) for number in range(extent(50, 1000))]
    expected = by_torch(python, programs, tmp_path)
    with World(WORKERS, timeout=300.0) as world:
        found = world.run(lambda rank: [gradients(p) for p in programs], ranks=[0])[0]
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15, err_msg=f"seed {number}")
