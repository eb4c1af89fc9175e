"""The one-file explanation of distributed autograd is right, and stands by itself."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "from_scratch.py"


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_from_scratch_split_training_agrees_with_training_alone() -> None:
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert "the weights agree to the bit" in done.stdout


def test_from_scratch_gradients_match_finite_differences(example: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    x, target, weights = rng.normal(size=(5, 2)), rng.normal(size=(5, 3)), rng.normal(size=(2, 3))

    def loss(w: Any) -> Any:
        out = example["tanh"](example["matmul"](example["Var"](x), w))
        return example["mean_square_error"](out, target)

    leaf = example["Var"](weights)
    found = example["Pass"](example["Peer"](None), loss(leaf)).run()[leaf]
    step = rng.normal(size=weights.shape)
    ahead, behind = (loss(example["Var"](weights + e * step)).value for e in (1e-6, -1e-6))
    assert (found * step).sum() == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


def test_from_scratch_imports_nothing_of_the_package() -> None:
    imported = [
        node
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not any("distgrad" in ast.unparse(node) for node in imported)
