"""What the README shows is true: its example runs as it says, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_readme_example_prints_the_gradient(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (command,) = re.findall(r"^distgrad (run .*)$", README, re.M)
    (tmp_path / shlex.split(command)[-1]).write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "distgrad", *shlex.split(command)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    # tanh(x @ w) with x = 1, w = 1/2: each input reaches two outputs, both at 3/2
    expected = (1 - np.tanh(1.5) ** 2) * 0.5 * 2
    numbers = [float(n) for n in re.findall(r"\d\.\d+", done.stdout)]
    assert len(numbers) == 12
    np.testing.assert_allclose(numbers, expected, atol=1e-8)


def test_readme_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_commands_are_those_of_continuous_integration() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install '.[demo]' && distgrad demo" in README
    assert "pip install -e '.[test]' && pytest" in README
    assert "install -q '.[demo]'" in script
    assert "distgrad demo" in script
