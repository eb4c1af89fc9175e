"""The demo when one of its processes dies: an error with a name, in time, and no remains."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

STAGES = ("first", "second", "third")
PATIENCE_S = 5.0


class RunningDemo:
    """A demo that has trained for one epoch and has many more before it."""

    def __init__(self, transport: str, folder: Path) -> None:
        self.folder = folder / "tmp"
        self.folder.mkdir()
        options = ["--transport", transport, "--epochs", "100000", "--out", str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distgrad", "demo", *options],
            env=os.environ | {"TMPDIR": str(self.folder), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line.startswith("epoch"):
                break
        self.pids = {name: int(pid) for name, pid in re.findall(r"(\w+) +process (\d+)", text)}
        assert set(STAGES) < set(self.pids), self.process.communicate()[1]

    def end(self) -> tuple[int, str]:
        """Wait for the end; return exit code and what it says on stderr."""
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@contextmanager
def running_demo(transport: str, folder: Path) -> Iterator[RunningDemo]:
    demo = RunningDemo(transport, folder)
    try:
        yield demo
    finally:
        demo.process.kill()
        demo.process.communicate()


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(pids: list[int]) -> None:
    """Wait until processes that are not our children are gone."""
    descriptors = []
    for pid in filter(exists, pids):
        descriptors.append(os.pidfd_open(pid))
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], PATIENCE_S)[0]
        os.close(descriptor)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize(
    ("transport", "victim"),
    [("unix", "first"), ("unix", "second"), ("unix", "third"), ("tcp", "second")],
)
def test_demo_killed_stage_is_named_within_five_seconds(
    transport: str, victim: str, tmp_path: Path
) -> None:
    before = shared_memory()
    with running_demo(transport, tmp_path) as demo:
        start = time.monotonic()
        os.kill(demo.pids[victim], signal.SIGKILL)
        code, said = demo.end()
        assert time.monotonic() - start < PATIENCE_S
        assert code == 1
        assert f"worker '{victim}' (process {demo.pids[victim]}) was killed by SIGKILL" in said
        assert not any(map(exists, demo.pids.values()))
        assert list(demo.folder.iterdir()) == []
    assert shared_memory() <= before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_asked_to_end_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with running_demo("unix", tmp_path) as demo:
        demo.process.send_signal(number)
        code, _ = demo.end()
        assert code == 128 + number
        assert not any(map(exists, demo.pids.values()))
        assert list(demo.folder.iterdir()) == []


def test_demo_killed_itself_takes_its_stages_along(tmp_path: Path) -> None:
    with running_demo("unix", tmp_path) as demo:
        demo.process.kill()
        demo.process.wait()
        wait_for_end([demo.pids[name] for name in STAGES])
