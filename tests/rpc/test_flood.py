"""What one worker makes another keep is bounded, and nobody waits for the bound."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from distgrad import rpc
from distgrad.config import config
from distgrad.errors import DistgradError, WorkerLostError
from distgrad.testing import World

MOST = 200_000
PATIENCE_S = 30.0

gate = threading.Event()
answers = []


@rpc.expose
def hold(data):
    """Keep the request until the gate opens."""
    assert gate.wait(PATIENCE_S)
    return len(data)


@rpc.expose
@rpc.functions.async_execution
def hold_answer(data):
    """Return at once, and answer once the gate opens."""
    answer = rpc.Future()
    answers.append(answer)
    return answer


@rpc.expose
def open_gate():
    gate.set()
    for answer in answers:
        answer.set_result(0)
    answers.clear()
    return True


@rpc.expose
def bounce(depth):
    """Call back and forth."""
    if depth == 0:
        return 0
    peer = 1 - rpc.current_worker().id
    return 1 + rpc.rpc_sync(peer, bounce, (depth - 1,))


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(config, "max_peer_bytes", MOST)
    with World(3, transport="unix") as world:
        yield world


def ends(calls):
    """Wait for calls; return the values and the errors."""
    values, errors = [], []
    for call in calls:
        try:
            values.append(call.wait())
        except DistgradError as error:
            errors.append(str(error))
    return values, errors


def flood(rank, function, number):
    calls = [rpc.rpc_async(0, function, (b"x" * 1000,)) for _ in range(number)]
    refused = ends(calls[-1:])[1]
    assert "max_peer_bytes" in refused[0], refused
    rpc.rpc_sync(2, open_witness)
    return ends(calls)


@rpc.expose
def open_witness():
    return rpc.rpc_sync(0, open_gate)


@pytest.mark.parametrize("function", [hold, hold_answer])
def test_flood_of_requests_is_refused_beyond_the_bound(world, function):
    values, errors = world.run(flood, function, 100, ranks=[1])[0]
    cost = 1000 * 8
    assert 1 <= len(values) <= MOST // cost + 1
    assert len(values) + len(errors) == 100
    assert all("holds" in error for error in errors)
    # What was answered counts no longer.
    assert world.run(call_once, ranks=[1]) == [True]


def call_once(rank):
    return rpc.rpc_sync(0, open_gate)


def test_flood_bound_does_not_stand_in_the_way_of_nested_calls(world):
    assert world.run(nested, ranks=[1]) == [100]


def nested(rank):
    return rpc.rpc_sync(0, bounce, (100,))


def test_flood_bound_lets_a_single_large_request_pass(world):
    assert world.run(large, ranks=[1]) == [10 * MOST]


def large(rank):
    rpc.rpc_sync(2, open_witness)
    return rpc.rpc_sync(0, hold, (bytes(10 * MOST),))


def call_beside_large(rank):
    large = rpc.rpc_async(0, hold, (bytes(10 * MOST),))
    refused = ends([rpc.rpc_async(0, hold, (bytes(10 * MOST),))])[1]
    assert "max_peer_bytes" in refused[0], refused
    assert rpc.rpc_sync(0, bounce, (3,)) == 3
    rpc.rpc_sync(2, open_witness)
    return large.wait()


def test_flood_bound_reached_by_large_requests_lets_small_ones_pass(world):
    assert world.run(call_beside_large, ranks=[1]) == [10 * MOST]


def call_large_again_and_again(rank):
    return {rpc.rpc_sync(0, hold, (bytes(10 * MOST),)) for _ in range(30)}


def test_request_that_was_answered_does_not_count_against_the_next_one(world):
    assert world.run(call_once, ranks=[1]) == [True]
    assert world.run(call_large_again_and_again, ranks=[1]) == [{10 * MOST}]


@rpc.expose
def flood_and_stop():
    """Send until the ring is full, then read no more."""
    [connection] = [c for c in rpc.current_worker().agent.links.connections if c.peer == 0]
    while connection.flushed():
        rpc.rpc_async(0, hold, (b"",))
    os.kill(os.getpid(), signal.SIGSTOP)


def outlive(rank):
    """Be flooded; return why the peer was given up."""
    with pytest.raises(WorkerLostError) as lost:
        rpc.rpc_sync(1, flood_and_stop, timeout=PATIENCE_S)
    assert rpc.rpc_sync(2, open_witness)
    return str(lost.value)


def test_flood_by_a_peer_that_reads_no_answers_ends_its_connection(world):
    [why] = world.run(outlive, ranks=[0])
    assert "does not read" in why
    world.kill(1)


@rpc.expose
def give():
    return np.ones(4_000_000)


@rpc.expose
def ask_and_stop(count):
    for _ in range(count):
        rpc.rpc_async(0, give)
    os.kill(os.getpid(), signal.SIGSTOP)


def be_asked(rank, count):
    """Answer a peer that reads no more; return why it was given up, and what still runs."""
    agent = rpc.current_worker().agent
    lost = rpc.Future(agent=agent)
    rpc.current_worker().on_lost.append(lambda peer, why: lost.set_result(str(why)))
    asked = rpc.rpc_async(1, ask_and_stop, (count,), timeout=PATIENCE_S)
    why = lost.wait(PATIENCE_S)
    asked.exception()  # it may have answered before it stopped
    until = time.monotonic() + PATIENCE_S
    while agent.crew.busy and time.monotonic() < until:
        threading.Event().wait(0.01)
    return why, agent.crew.busy


@pytest.mark.parametrize(("shared", "transport"), [(True, "unix"), (False, "unix"), (False, "tcp")])
def test_peer_that_never_reads_large_answers_holds_no_thread_for_ever(
    monkeypatch, shared, transport
):
    monkeypatch.setattr(config, "shared_memory", shared)
    monkeypatch.setattr(config, "stall_timeout", 0.5)
    monkeypatch.setattr(config, "heartbeat_interval", 0.0)  # not what ends it here
    with World(2, transport=transport) as world:
        [(why, busy)] = world.run(be_asked, 30, ranks=[0])
        world.kill(1)
    assert "does not read" in why
    assert busy == 0
