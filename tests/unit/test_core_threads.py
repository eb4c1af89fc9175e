"""Many threads, many steps: shared leaves, grad mode a thread, flat memory."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad._core import GradientTable, GraphTask

THREADS = 8
PASSES = int(os.environ.get("DISTGRAD_TEST_PASSES", "60"))
STEPS = int(os.environ.get("DISTGRAD_TEST_STEPS", "3000"))
LIMIT_S = 50 + PASSES / 4  # eight threads, large arrays, a busy machine

pytestmark = pytest.mark.deadline(LIMIT_S + 10)


def together(work: Callable[[int], Any]) -> list[Any]:
    """Run work(i) in eight threads that start at once."""
    barrier = threading.Barrier(THREADS)

    def run(i: int) -> Any:
        barrier.wait(20)
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS), timeout=LIMIT_S))


@pytest.mark.parametrize("n", [4, 40_000])
def test_threads_backward_over_shared_leaves_add_up(n: int) -> None:
    shared = [dg.tensor(np.full(n, float(i + 1)), requires_grad=True) for i in range(3)]

    def work(i: int) -> None:
        for _ in range(PASSES):
            a, b, c = shared
            (a * b + np.tanh(c) * 0.0 + a * (i + 1)).sum().backward()

    together(work)
    passes, weights = THREADS * PASSES, sum(range(1, THREADS + 1)) * PASSES
    a, b, c = shared
    np.testing.assert_array_equal(a.grad.data, np.full(n, passes * 2.0 + weights))
    np.testing.assert_array_equal(b.grad.data, np.full(n, passes * 1.0))
    np.testing.assert_array_equal(c.grad.data, np.zeros(n))


def test_threads_walk_one_graph_at_once() -> None:
    x = dg.tensor(np.ones(4), requires_grad=True)
    y = x
    for _ in range(50):
        y = y * 1.5 + x
    expected = dg.grad(y, x, np.ones(4), retain_graph=True)[0].tolist()

    def work(i: int) -> bool:
        found = (dg.grad(y, x, np.ones(4), retain_graph=True)[0] for _ in range(PASSES))
        return all(gradient.tolist() == expected for gradient in found)

    assert all(together(work))


def test_threads_into_one_table_add_up() -> None:
    x = dg.tensor(np.ones(4), requires_grad=True)
    table = GradientTable()

    def work(i: int) -> None:
        for _ in range(PASSES):
            GraphTask([((x * 2.0).sum(), np.ones(()))], table=table).run()

    together(work)
    assert table.get(x).tolist() == [2.0 * THREADS * PASSES] * 4


def test_threads_have_grad_modes_of_their_own() -> None:
    x = dg.tensor([1.0], requires_grad=True)
    turns = threading.Barrier(THREADS)

    def work(i: int) -> set[bool]:
        seen = set()
        with dg.set_grad_enabled(i % 2 == 0):
            for _ in range(20):
                turns.wait(20)
                seen.add((x * 2).requires_grad)
        return seen

    assert together(work) == [{i % 2 == 0} for i in range(THREADS)]


def step(weights: list[dg.Tensor], batch: Any) -> None:
    hidden = np.tanh(batch @ weights[0])
    loss = np.square(hidden @ weights[1]).sum() + hidden[0, 1:3].reshape(2, 1).sum()
    loss.backward()
    with dg.no_grad():
        for weight in weights:
            weight -= weight.grad * 1e-3
            weight.grad = None


@pytest.mark.deadline(600)
def test_training_steps_keep_memory_flat() -> None:
    random = np.random.default_rng(0)
    weights = [dg.tensor(random.normal(size=(4, 4)), requires_grad=True) for _ in range(2)]
    batch = random.normal(size=(3, 4))
    for _ in range(200):
        step(weights, batch)
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(STEPS):
            step(weights, batch)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 4096 + STEPS / 10
