"""How long the simulations run: ``--programs`` or ``--long``, from ``--seed``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The simulators are modules beside the tests; importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def programs(pytestconfig: pytest.Config, extent: Callable[[int, int], int], seed: int) -> range:
    """Return the seeds of the random programs to run."""
    count = pytestconfig.getoption("--programs") or int(os.environ.get("DISTGRAD_PROGRAMS", "0"))
    return range(seed, seed + (count or extent(400, 20_000)))
