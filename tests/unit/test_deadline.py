"""The deadline of the test suite itself: a hanging test fails and shows its threads."""

import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def run_test(directory: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run one test function with `body` under a deadline of half a second."""
    shutil.copy(CONFTEST, directory)
    lines = ["import ctypes, threading, pytest", "@pytest.mark.deadline(0.5)", "def test_it():"]
    (directory / "test_it.py").write_text("\n".join([*lines, f"    {body}"]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=directory)


def test_deadline_waiting_thread_fails_with_stacks(tmp_path: Path) -> None:
    result = run_test(tmp_path, "threading.Event().wait()")
    assert result.returncode == 1, result.stdout
    assert "the deadline of 0.5 s has passed" in result.stdout
    assert "most recent call first" in result.stdout
    assert "1 failed" in result.stdout


def test_deadline_held_gil_ends_the_run_with_stacks(tmp_path: Path) -> None:
    # locked twice without giving up the GIL: no signal handler will ever run
    lock = "m = ctypes.create_string_buffer(64); c = ctypes.PyDLL(None)"
    result = run_test(tmp_path, f"{lock}; c.pthread_mutex_lock(m); c.pthread_mutex_lock(m)")
    assert result.returncode == 1, result.stdout
    assert "Timeout" in result.stderr
    assert "test_it.py" in result.stderr


def test_deadline_test_in_time_passes(tmp_path: Path) -> None:
    assert run_test(tmp_path, "pass").returncode == 0
