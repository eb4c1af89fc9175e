"""How long the simulations run: ``--programs`` and ``--seed``, or ``DISTGRAD_PROGRAMS``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# The simulators are modules beside the tests; importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--programs", type=int, default=None, help="number of random programs")
    parser.addoption("--seed", type=int, default=0, help="seed of the first random program")


@pytest.fixture
def programs(pytestconfig: pytest.Config) -> range:
    """Return the seeds of the random programs to run."""
    count = pytestconfig.getoption("--programs", default=None)
    first = pytestconfig.getoption("--seed", default=0)
    count = count or int(os.environ.get("DISTGRAD_PROGRAMS", "400"))
    return range(first, first + count)
