"""What stands at the top of the repository, for packagers and newcomers."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

REQUIRED = [
    "README.md",
    "benchmarks",
    "pyproject.toml",
    "setup.py",
    "src/distgrad",
    "src/distgrad/_core.pyx",
    "tests",
]


@pytest.mark.parametrize("path", REQUIRED)
def test_layout_required_path_exists(path):
    assert (ROOT / path).exists()
