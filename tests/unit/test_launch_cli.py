"""The command line finds its commands, and says what it has."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from distgrad.launch.cli import COMMANDS, main


def test_cli_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["fly"], ["run"]])
def test_cli_wrong_usage_ends_with_code_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


@pytest.mark.parametrize("command", [c for c, (module, _) in COMMANDS.items() if find_spec(module)])
def test_cli_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"distgrad {command}" in capsys.readouterr().out


def test_cli_bench_without_a_name_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert "rpc" in capsys.readouterr().out


def test_cli_bench_unknown_name_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nothing"]) == 2
    assert capsys.readouterr().out.startswith("benchmarks:")


def test_cli_module_and_version_answer() -> None:
    command = [sys.executable, "-m", "distgrad", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.startswith("distgrad ")
