"""The demo when one of its processes ends before the world has come about."""

from __future__ import annotations

import pytest

from distgrad.errors import WorkerLostError
from distgrad.launch.demo_world import open_world
from distgrad.rpc.activity import hosted_workers


def test_demo_stage_that_cannot_start_is_named_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(WorkerLostError, match=r"worker 'first' \(process \d+\) ended with code 1"),
        open_world("unix", ["first"], "own", "no_such_module"),
    ):
        raise AssertionError("no world should have come about")
    assert "no_such_module" in capfd.readouterr().err
    assert not hosted_workers()
