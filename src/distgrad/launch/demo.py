"""``distgrad demo``: train a network that is cut over four workers.

Images of digits go through three stages, each on a worker of its own; a skip connection
leads from the first stage straight to the third. A fourth worker, this process, has the
labels, computes the loss and starts the backward pass::

    first ──► second ──► third ──► loss
      └──────────────────►┘

Every activation travels straight from the worker that made it to the one that uses it,
and every gradient travels back the same way; the parameters never move.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.errors import DistgradError
from distgrad.launch.demo_data import Digits, load
from distgrad.launch.demo_view import View, new_view
from distgrad.launch.demo_world import TRANSPORTS, open_world
from distgrad.launch.picture import draw_curves
from distgrad.optim import Adam, DistributedOptimizer

__all__ = ["Stage", "add_arguments", "cross_entropy", "main", "train_step"]

STAGES = ("first", "second", "third")
HIDDEN = 64
BATCH = 64
LEARNING_RATE = 5e-3


@rpc.expose
class Stage:
    """One part of the network: a dense layer of one or more inputs.

    Parameters
    ----------
    input_sizes
        Features of each input; the third stage has two inputs.
    output_size
        Features of the output.
    activate
        Whether ``tanh`` follows.
    seed
        Of the initial weights.
    """

    def __init__(
        self, input_sizes: Sequence[int], output_size: int, activate: bool, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        scale = 1 / np.sqrt(sum(input_sizes))
        self.activate = activate
        self.weights = [
            dg.tensor(scale * random.standard_normal((size, output_size)), requires_grad=True)
            for size in input_sizes
        ]
        self.bias = dg.zeros(output_size, requires_grad=True)

    def forward(self, *inputs: Any) -> Any:
        """Return the activations of a batch; inputs on other workers are fetched from there."""
        total = self.bias
        for value, weight in zip(inputs, self.weights, strict=True):
            here = value.to_here() if isinstance(value, rpc.RRef) else value
            total = total + here @ weight
        return np.tanh(total) if self.activate else total

    def parameters(self) -> list[Any]:
        """Return references to the parameters, for an optimizer elsewhere."""
        return [rpc.RRef(parameter) for parameter in (*self.weights, self.bias)]

    def gradients(self, context_id: int) -> list[np.ndarray[Any, Any]]:
        """Return the parameters' gradients in a context, in the order of `parameters`."""
        found = dist_autograd.get_gradients(context_id)
        return [found[parameter].numpy() for parameter in (*self.weights, self.bias)]


def stage_arguments(seed: int) -> list[tuple[tuple[int, ...], int, bool, int]]:
    """Return what to construct the three stages with."""
    return [
        ((Digits.FEATURES,), HIDDEN, True, seed),
        ((HIDDEN,), HIDDEN, True, seed + 1),
        ((HIDDEN, HIDDEN), Digits.CLASSES, False, seed + 2),
    ]


def cross_entropy(scores: Any, labels: np.ndarray[Any, Any]) -> Any:
    """Return the mean negative log-likelihood of one-hot labels."""
    scores = scores - scores.detach().numpy().max(axis=1, keepdims=True)
    per_image = np.log(np.exp(scores).sum(axis=1)) - (scores * labels).sum(axis=1)
    return per_image.mean()


def forward(stages: Sequence[Any], images: np.ndarray[Any, Any]) -> Any:
    """Send a batch through the stages; return its scores.

    The first two activations stay where they are made: only references come here.
    """
    first, second, third = stages
    a = first.remote().forward(images)
    b = second.remote().forward(a)
    return third.rpc_sync().forward(b, a)


def train_step(
    stages: Sequence[Any],
    optimizer: DistributedOptimizer,
    images: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
) -> float:
    """Forward, backward and one step of the optimizer, across all workers."""
    with dist_autograd.context() as context_id:
        loss = cross_entropy(forward(stages, images), labels)
        dist_autograd.backward(context_id, [loss])
        optimizer.step(context_id)
    return float(loss.item())


def train(
    stages: Sequence[Any], digits: Digits, epochs: int, seed: int, view: View
) -> tuple[list[float], list[float]]:
    """Train; return the loss of every step and the test accuracy after every epoch."""
    parameters = [p for stage in stages for p in stage.rpc_sync().parameters()]
    optimizer = DistributedOptimizer(Adam, parameters, lr=LEARNING_RATE)
    random = np.random.default_rng(seed)
    losses: list[float] = []
    accuracies: list[float] = []
    for epoch in range(epochs):
        for images, labels in digits.batches(BATCH, random):
            losses.append(train_step(stages, optimizer, images, labels))
            view.on_step(losses[-1])
        accuracies.append(accuracy(stages, digits))
        view.on_epoch(epoch + 1, float(np.mean(losses[-digits.steps(BATCH) :])), accuracies[-1])
    return losses, accuracies


def accuracy(stages: Sequence[Any], digits: Digits) -> float:
    """Return the part of the test images that the network gets right."""
    scores = forward(stages, digits.test_images).detach().numpy()
    return float((scores.argmax(axis=1) == digits.test_labels).mean())


def compare_gradients(stages: Sequence[Any], digits: Digits, seed: int, picture: Path) -> float:
    """Compare one step's gradients with those of the same network in a single process.

    Returns the largest difference, relative to the largest gradient of its parameter.
    Draws the graph of the step.
    """
    images, labels = next(digits.batches(BATCH, np.random.default_rng(seed)))
    with dist_autograd.context() as context_id:
        loss = cross_entropy(forward(stages, images), labels)
        dist_autograd.backward(context_id, [loss], retain_graph=True)
        context_id.draw(picture)
        distributed = [g for stage in stages for g in stage.rpc_sync().gradients(context_id)]

    first, second, third = local = [Stage(*arguments) for arguments in stage_arguments(seed)]
    a = first.forward(images)
    cross_entropy(third.forward(second.forward(a), a), labels).backward()
    expected = [p.grad.numpy() for stage in local for p in (*stage.weights, stage.bias)]
    return max(
        float(abs(there - here).max() / abs(here).max())
        for there, here in zip(distributed, expected, strict=True)
    )


def run(args: argparse.Namespace, view: View) -> None:
    """The whole demo: start the workers, compare gradients, train, report, draw."""
    digits = load()
    args.out.mkdir(parents=True, exist_ok=True)
    with open_world(args.transport, STAGES, "loss", module=__name__) as world:
        view.on_start(world)
        stages = [
            rpc.remote(name, Stage, args=arguments)
            for name, arguments in zip(STAGES, stage_arguments(args.seed), strict=True)
        ]
        difference = compare_gradients(stages, digits, args.seed, args.out / "graph.svg")
        view.on_gradients(difference)
        before, start = world.traffic(), time.perf_counter()
        with view.progress(args.epochs, digits.steps(BATCH)):
            losses, accuracies = train(stages, digits, args.epochs, args.seed, view)
        traffic = world.traffic() - before
        view.on_end(accuracies[-1], traffic, time.perf_counter() - start)
        del stages
    draw_curves(args.out / "loss.svg", losses, accuracies)
    view.on_pictures(args.out / "graph.svg", args.out / "loss.svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``distgrad demo``."""
    parser.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default="unix",
        help="processes over Unix sockets (the default) or TCP, or threads of this process",
    )
    parser.add_argument("--epochs", type=int, default=25, metavar="N")
    parser.add_argument("--quick", action="store_true", help="three epochs")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where to put the pictures"
    )


def main(args: argparse.Namespace) -> int:
    """Run the demo; return its exit code."""
    args.epochs = 3 if args.quick else max(1, args.epochs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(args, new_view())
    except DistgradError as error:
        print(f"distgrad demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
