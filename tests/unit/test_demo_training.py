"""The demo trains, its gradients are those of one process, and transports change nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from distgrad.errors import DistgradError
from distgrad.launch import demo, demo_data
from distgrad.launch.demo_view import View
from distgrad.launch.demo_world import Traffic

pytest.importorskip("sklearn")


class Witness(View):
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.accuracy = 0.0
        self.difference = np.inf
        self.traffic = Traffic(0, 0)

    def say(self, text: str) -> None:
        pass

    def on_gradients(self, difference: float) -> None:
        self.difference = difference

    def on_end(self, accuracy: float, traffic: Traffic, seconds: float) -> None:
        self.accuracy, self.traffic = accuracy, traffic


def arguments(tmp_path: Path, **changes: Any) -> Namespace:
    defaults = {"transport": "inproc", "epochs": 1, "seed": 0, "out": tmp_path / "pictures"}
    return Namespace(**(defaults | changes))


def run_demo(*options: str) -> str:
    command = [sys.executable, "-m", "distgrad", "demo", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    witness = Witness()
    demo.run(arguments(tmp_path, seed=3), witness)
    assert witness.difference < 1e-12
    assert witness.traffic.requests > 0
    assert witness.traffic.nbytes > 0


def test_demo_full_training_reaches_the_promised_accuracy(tmp_path: Path) -> None:
    witness = Witness()
    demo.run(arguments(tmp_path, epochs=25), witness)
    assert witness.accuracy >= 0.96


def test_demo_pictures_are_svg(tmp_path: Path) -> None:
    demo.run(arguments(tmp_path), Witness())
    for name in ("graph.svg", "loss.svg"):
        root = ElementTree.parse(tmp_path / "pictures" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.deadline(120)
def test_demo_every_transport_gives_the_same_numbers(tmp_path: Path) -> None:
    outputs = [
        run_demo("--transport", transport, "--epochs", "2", "--out", str(tmp_path))
        for transport in ("unix", "tcp", "inproc")
    ]
    epochs = [re.findall(r"^epoch .*$", output, re.M) for output in outputs]
    assert len(epochs[0]) == 2
    assert epochs[0] == epochs[1] == epochs[2]
    drawn = [re.findall(r"[\d.]+e-\d+|0\.0e\+00", output) for output in outputs]
    assert drawn[0] == drawn[1] == drawn[2] != []


@pytest.mark.deadline(90)
def test_demo_default_run_ends_within_its_time_and_leaves_nothing(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "distgrad", "demo", "--out", str(tmp_path)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=90,
    )
    assert time.monotonic() - start < 90
    assert list(temporary.iterdir()) == []


def test_demo_data_split_is_fixed_and_complete() -> None:
    first, second = demo_data.load(), demo_data.load()
    assert len(first.train_images) + len(first.test_images) == 1797
    assert np.array_equal(first.test_images, second.test_images)
    assert first.train_labels.sum(axis=1).tolist() == [1.0] * len(first.train_labels)


def test_demo_data_batches_take_each_image_once() -> None:
    digits = demo_data.load()
    digits = replace(digits, train_images=np.arange(len(digits.train_images))[:, None])
    batches = list(digits.batches(64, np.random.default_rng(0)))
    taken = np.concatenate([images for images, _ in batches])
    assert len(batches) == digits.steps(64)
    assert len(np.unique(taken)) == 64 * len(batches)


def test_demo_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DistgradError, match=r"distgrad\[demo\]"):
        demo_data.load()
