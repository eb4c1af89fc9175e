"""Worlds for the tests of distributed autograd."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distgrad.testing import World

# Importlib mode puts no folder on the path; `served` holds what the workers call.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "faults")]
served = importlib.import_module("served")


@pytest.fixture(params=["inproc", "unix"])
def trio(request: pytest.FixtureRequest) -> Iterator[World]:
    """Three workers, as threads and as processes."""
    with World(3, transport=request.param) as world:
        yield world
    served.weights.of.clear()


@pytest.fixture
def threads() -> Iterator[World]:
    """Three workers in this process."""
    with World(3) as world:
        yield world
