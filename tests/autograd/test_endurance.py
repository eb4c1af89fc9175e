"""Many passes, contexts, threads and workers: exact, flat and free of deadlocks.

``--long`` runs a million contexts and a minute of threads; ``-s`` shows the figures.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import numpy as np
import pytest
import served
from numpy.testing import assert_array_equal

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.errors import BackwardError
from distgrad.testing import World
from distgrad.transport.inproc import InprocTransport


@rpc.expose
def fickle_between(x: Any) -> Any:
    there = rpc.rpc_sync("worker2", served.scale, args=(served.fickle(x),))
    return there + x


def thousand_passes(rank: int) -> tuple[Any, dict[str, int]]:
    x = dg.tensor([1.0, 2.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.through, args=(x, [2, 0])).sum()
        for _ in range(1000):
            dist_autograd.backward(context_id, [loss], retain_graph=True)
        found = dist_autograd.get_gradients(context_id)[x].numpy()
        return found, rpc.rpc_sync("worker1", served.counters)


def test_endurance_thousand_passes_with_retain_are_exact(trio: World) -> None:
    found, counters = trio.run(thousand_passes, ranks=[0])[0]
    assert_array_equal(found, [3000.0, 3000.0])
    assert counters["autograd.passes"] == 0


def failing_then_good(rank: int) -> tuple[list[Any], Any, list[dict[str, int]]]:
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", fickle_between, args=(x,)).sum()
        rpc.rpc_sync("worker1", served.break_rules, args=(True,))
        causes = []
        for _ in range(50):
            with pytest.raises(BackwardError) as caught:
                dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=30)
            causes.append(type(caught.value.__cause__).__name__)
        rpc.rpc_sync("worker1", served.break_rules, args=(False,))
        before = dist_autograd.get_gradients(context_id).get(x)
        start = 0.0 if before is None else before.numpy() * 1.0
        for _ in range(50):
            dist_autograd.backward(context_id, [loss], retain_graph=True, timeout=30)
        gained = dist_autograd.get_gradients(context_id)[x].numpy() - start
    return causes, gained, [served.counters(*route) for route in ([], [1], [1, 2])]


def test_endurance_fifty_good_passes_after_fifty_that_failed_are_exact(trio: World) -> None:
    causes, gained, left = trio.run(failing_then_good, ranks=[0])[0]
    assert set(causes) == {"ZeroDivisionError"}
    assert_array_equal(gained, [200.0])
    assert left == [served.NOTHING] * 3


def footprint(rank: int = 0) -> tuple[int, int, int]:
    """Return bytes of private memory, blocks of Python's allocator, descriptors."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    (private,) = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return private * 1024, sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))


def many_contexts(rank: int, count: int) -> None:
    x = dg.tensor([1.0, 2.0], requires_grad=True)
    for _ in range(count):
        with dist_autograd.context() as context_id:
            loss = rpc.rpc_sync("worker1", served.through, args=(x, [])).sum()
            dist_autograd.backward(context_id, [loss])


@pytest.mark.deadline(3600)
def test_endurance_contexts_take_no_memory(
    extent: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After warming up: ids of finished contexts are remembered, within bounds.

    What is remembered moves in memory as it comes and goes: now and then the heap has a gap
    of a megabyte more. So a leak shows in the blocks first, where one in 100 contexts is enough.
    """
    count, warm = extent(2_000, 1_000_000), extent(1_000, 200_000)
    monkeypatch.setattr("distgrad.autograd.tombstones._MOST", extent(500, 16384))
    sizes: list[list[tuple[int, int, int]]] = []
    with World(2, transport="unix", timeout=3000.0) as world:
        for part in [warm, *[(count - warm) // 4] * 4]:
            world.run(many_contexts, part, ranks=[0])
            sizes.append(world.run(footprint))
        left = world.run(forgotten, ranks=[0])
    table = np.array(sizes)  # by part, worker, and what is measured
    print(f"\n{count} contexts, MiB by worker: {(table[..., 0] / 2**20).round(1).tolist()}")
    print(f"blocks {table[..., 1].tolist()}, descriptors {table[..., 2].tolist()}")
    growth = table[-1] - table[0]
    assert (growth < [8 * 2**20, max(500, count // 100), 5]).all(), growth
    assert left == [[served.NOTHING] * 2]


def forgotten(rank: int) -> list[dict[str, int]]:
    return [served.counters(), served.counters(1)]


def hammer(rank: int, seconds: float) -> tuple[int, list[str]]:
    """Run contexts in 20 threads until the time is up; return how many, and what was wrong."""
    from distgrad.rpc.activity import activity

    mine, until, counts, wrong = activity.get(), time.monotonic() + seconds, [], []

    def body(number: int) -> None:
        activity.set(mine)
        x = dg.tensor([float(number)], requires_grad=True)
        done = 0
        try:
            while time.monotonic() < until:
                with dist_autograd.context() as context_id:
                    loss = rpc.rpc_sync("worker1", served.through, args=(x, [0, 1])).sum()
                    dist_autograd.backward(context_id, [loss], timeout=50)
                    found = float(dist_autograd.get_gradients(context_id)[x].numpy()[0])
                    if found != 3.0:
                        wrong.append(f"{found} instead of 3")
                done += 1
        except BaseException as error:
            wrong.append(repr(error))
        counts.append(done)

    threads = [threading.Thread(target=body, args=(number,), daemon=True) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
    if any(thread.is_alive() for thread in threads):
        wrong.append("a thread hangs")
    return sum(counts), wrong


@pytest.mark.deadline(300)
@pytest.mark.parametrize("transport", ["inproc", "unix"])
def test_endurance_twenty_threads_against_one_worker(
    transport: str, extent: Callable[[int, int], int]
) -> None:
    seconds = extent(1, 60)
    with World(2, transport=transport, timeout=200.0) as world:
        passes, wrong = world.run(hammer, float(seconds), ranks=[0])[0]
        left = world.run(forgotten, ranks=[0])
    print(f"\n{transport}: {passes} contexts with a pass in {seconds} s, 20 threads")
    assert wrong == []
    assert passes >= 20
    assert left == [[served.NOTHING] * 2]


FAN = 16


@rpc.expose
def spread(x: Any, node: int, nodes: int, workers: int) -> Any:
    """Call 16 others: those that come first here call 16 others in turn."""
    calls = []
    for child in range(FAN * node + 1, FAN * node + FAN + 1):
        to = child % workers
        if child < nodes:
            calls.append(rpc.rpc_async(to, spread, args=(x, child, nodes, workers)))
        else:
            calls.append(rpc.rpc_async(to, served.scale, args=(x, 1.0)))
    return sum(call.wait() for call in calls)


def fan_out(rank: int, nodes: int, workers: int) -> float:
    """Run one pass; return how many seconds it took."""
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = spread(x, 0, nodes, workers).sum()
        start = time.perf_counter()
        dist_autograd.backward(context_id, [loss], timeout=100)
        seconds = time.perf_counter() - start
        found = float(dist_autograd.get_gradients(context_id)[x].numpy()[0])
        assert found == loss.item() == FAN * nodes - (nodes - 1)
        return seconds


def messages_of(nodes: int, workers: int) -> int:
    """Return how many messages such a pass takes."""
    with faulty.installed(InprocTransport), World(workers, timeout=200.0) as world:
        faulty.plan.arm({})
        world.run(fan_out, nodes, workers, ranks=[0])
        return int(faulty.plan.sent)


@pytest.mark.deadline(300)
def test_endurance_many_workers_of_one_process_are_exact(
    extent: Callable[[int, int], int],
) -> None:
    """256 workers that call 16 others each in one context; the same calls among 4 workers.

    Shown with ``-s``: what a message and what a pair of send and recv costs. Among few workers a
    message carries many gradients.
    """
    nodes = extent(64, 256)
    pairs = 2 * FAN * nodes
    print(f"\n{pairs} pairs of send and recv")
    for workers in (4, nodes):
        with World(workers, timeout=200.0) as world:
            best = min(world.run(fan_out, nodes, workers, ranks=[0])[0] for _ in range(3))
        sent = messages_of(nodes, workers)
        print(
            f"among {workers} workers: {sent} messages, {best / sent * 1e6:.1f} us each; "
            f"{best / pairs * 1e6:.1f} us a pair"
        )
