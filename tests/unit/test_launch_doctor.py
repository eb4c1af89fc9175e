"""The doctor reports facts and names problems."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import pytest

from distgrad.config import config
from distgrad.launch import doctor


def found(subject: str) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine() if finding.subject == subject]


def test_doctor_healthy_machine_reports_versions_and_cores() -> None:
    subjects = [finding.subject for finding in doctor.examine()]
    assert {"distgrad", "python", "numpy", "cores", "open files", "secret"} <= set(subjects)


def test_doctor_missing_extension_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "_absent.pyi").touch()
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    assert doctor.main(argparse.Namespace()) == 1
    assert "problem: build it" in capsys.readouterr().out


def test_doctor_few_open_files_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    (files,) = found("open files")
    assert files.fact == "256, at most unlimited"
    assert "ulimit -n" in files.problem


def test_doctor_missing_shared_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", "/nowhere")
    assert found("shared memory")[0].problem


def test_doctor_secret_is_named_but_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTGRAD_SECRET", "tiger")
    assert found("secret")[0].fact == "from DISTGRAD_SECRET"
    assert "tiger" not in repr(doctor.examine())


def test_doctor_changed_setting_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "spin_us", 0.0)
    assert found("setting") == [doctor.Finding("setting", "spin_us = 0.0")]


def test_doctor_launcher_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert found("launcher")[0].fact == "env: rank 1 of 2"
