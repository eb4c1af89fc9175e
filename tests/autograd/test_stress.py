"""Many contexts, threads, routes and failures at once: exact or failed, then forgotten."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import served

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.errors import BackwardError, RpcTimeoutError
from distgrad.testing import World

WORKERS, THREADS, ROUNDS = 5, 4, 15


@rpc.expose
def wander(x: Any, weight: float, route: list[int], seed: int) -> Any:
    """Pass a value on along a route, with side calls that come to nothing."""
    chance = random.Random(seed)
    if chance.random() < 0.15:
        rpc.rpc_async(chance.randrange(WORKERS), served.scale, args=(x,)).wait()
    if chance.random() < 0.1:
        with pytest.raises(KeyError):
            rpc.rpc_sync(chance.randrange(WORKERS), served.fail, args=(x,))
    if chance.random() < 0.05:
        try:
            rpc.rpc_sync(chance.randrange(WORKERS), served.scale, args=(x,), timeout=0.0005)
        except RpcTimeoutError:
            seed += 1
    if not route:
        return x * weight
    return x + rpc.rpc_sync(route[0], wander, args=(x, weight, route[1:], seed + 1))


def train(rank: int, thread: int, outcomes: list[str]) -> None:
    chance = random.Random(100 * rank + thread)
    for round_number in range(ROUNDS):
        x = dg.tensor(np.ones(3), requires_grad=True)
        with dist_autograd.context() as context_id:
            expected, loss = 0.0, dg.zeros(())
            for _ in range(chance.randint(1, 3)):
                route = [chance.randrange(WORKERS) for _ in range(chance.randint(0, 4))]
                weight = float(chance.randint(1, 9))
                to = chance.randrange(WORKERS)
                y = rpc.rpc_sync(to, wander, args=(x, weight, route, chance.randrange(10**6)))
                if chance.random() < 0.8:
                    expected += weight + len(route)
                    loss = loss + y.sum()
            if not loss.requires_grad:
                continue
            passes = chance.randint(1, 3)
            for _ in range(passes):
                dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=30)
            found = dist_autograd.get_gradients(context_id)[x].numpy()
            exact = np.array_equal(found, np.full(3, passes * expected))
            outcomes.append("exact" if exact else f"{round_number}: {found} != {expected}")
            if chance.random() < 0.2:
                fail_once(context_id, loss)


def fail_once(context_id: int, loss: Any) -> None:
    """Consume the graph, so that the second pass fails somewhere."""
    dist_autograd.backward(context_id, [loss], timeout=30)
    with pytest.raises(BackwardError):
        dist_autograd.backward(context_id, [loss], timeout=30)


def train_in_threads(rank: int) -> list[str]:
    from distgrad.rpc.activity import activity

    mine, outcomes, failures = activity.get(), [], []

    def body(thread: int) -> None:
        activity.set(mine)
        try:
            train(rank, thread, outcomes)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def forgotten(rank: int) -> dict[str, int]:
    """Return what is left here, after all that others sent before has arrived."""
    for peer in range(WORKERS):
        for last in range(WORKERS):
            served.counters(peer, last, rank)
    return served.counters()


@pytest.mark.deadline(120)
@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_stress_many_threads_routes_and_failures(transport: str) -> None:
    with World(WORKERS, transport=transport) as world:
        outcomes = [o for found in world.run(train_in_threads) for o in found]
        assert set(outcomes) == {"exact"}
        assert len(outcomes) > WORKERS * THREADS * ROUNDS / 2
        assert world.run(forgotten) == [served.NOTHING] * WORKERS
