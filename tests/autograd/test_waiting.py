"""What a pass waits for, and where the nodes it is about were recorded."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import served

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.config import config
from distgrad.errors import BackwardError, RpcTimeoutError
from distgrad.testing import World

HERE = __file__.rpartition("/")[2]


@rpc.expose
def trace(on: bool) -> None:
    config.trace_graph = on


@rpc.expose
def identify() -> int:
    return os.getpid()


@rpc.expose
def produce(x: Any) -> Any:
    return served.held_behind(x)


def wait_too_long(rank: int) -> str:
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.held_behind, args=(x,)).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss], timeout=0.3)
        assert isinstance(caught.value.__cause__, RpcTimeoutError)
        rpc.rpc_sync("worker2", served.let_go)
        return str(caught.value)


def test_waiting_time_out_names_the_sends_and_their_calls(trio: World) -> None:
    """Worker 2 computes, 1 waits for it, and 0 for 1."""
    lines = trio.run(wait_too_long, ranks=[0])[0].splitlines()
    assert lines[1:] == [
        "worker 'worker0', pass 1 of worker 'worker0': running",
        "  no gradient from worker 'worker1' for call served:held_behind",
        "worker 'worker1', pass 1 of worker 'worker0': running",
        "  no gradient from worker 'worker2' for call served:held",
        "worker 'worker2', pass 1 of worker 'worker0': running, a thread is at work",
    ]


def ask_meanwhile(rank: int) -> list[str]:
    x = dg.tensor([1.0], requires_grad=True)
    reports = []
    worker = rpc.current_worker()
    with dist_autograd.context() as context_id:

        def look() -> None:
            from distgrad.rpc.activity import Activity, activity

            activity.set(Activity(worker))
            assert served.started.wait(30)
            reports.append(dist_autograd.retrieve_context(int(context_id)).why_waiting())
            served.may_go_on.set()

        y = served.held(x)  # on this worker
        watcher = threading.Thread(target=look)
        watcher.start()
        loss = rpc.rpc_sync("worker1", served.scale, args=(y,)).sum()
        dist_autograd.backward(context_id, [loss], timeout=30)
        watcher.join(30)
        reports.append(context_id.why_waiting())
    return reports


def test_waiting_report_on_demand(trio: World) -> None:
    first, second = trio.run(ask_meanwhile, ranks=[0])[0]
    assert first.startswith("worker 'worker0', pass 1 of worker 'worker0': running, a thread")
    assert "no gradient" not in first  # the send got its gradient; the rule holds it
    assert second == "no pass of this context is running"


def wait_for_the_frozen(rank: int) -> str:
    x = dg.tensor([1.0], requires_grad=True)
    frozen = rpc.rpc_sync("worker2", identify)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.through, args=(x, [2])).sum()
        os.kill(frozen, signal.SIGSTOP)
        try:
            with pytest.raises(BackwardError) as caught:
                dist_autograd.backward(context_id, [loss], timeout=0.2)
        finally:
            os.kill(frozen, signal.SIGCONT)
    return str(caught.value)


def test_waiting_names_workers_that_do_not_answer() -> None:
    with World(3, transport="unix") as world:
        text = world.run(wait_for_the_frozen, ranks=[0])[0]
    assert "worker 'worker2' did not answer within 0.5 s" in text
    assert "no gradient from worker 'worker2' for call served:through" in text


@rpc.expose
def identify_behind() -> int:
    return int(rpc.rpc_sync("worker2", identify))


def wait_for_a_frozen_stranger(rank: int) -> tuple[str, Any]:
    """Worker 0 has no connection to the worker that everybody waits for."""
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        frozen = rpc.rpc_sync("worker1", identify_behind)
        loss = rpc.rpc_sync("worker1", served.through, args=(x, [2])).sum()
        os.kill(frozen, signal.SIGSTOP)
        try:
            with pytest.raises(BackwardError) as caught:
                dist_autograd.backward(context_id, [loss], timeout=0.2)
        finally:
            os.kill(frozen, signal.SIGCONT)
    return str(caught.value), rpc.rpc_sync("worker2", served.scale, args=(2.0,))


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_waiting_does_not_connect_to_those_that_it_asks_about(transport: str) -> None:
    """A worker that is stopped would not answer, and count as lost."""
    with World(3, transport=transport) as world:
        text, answer = world.run(wait_for_a_frozen_stranger, ranks=[0])[0]
    assert "worker 'worker2' did not answer within 0.5 s" in text
    assert answer == 6.0


def answer_late(rank: int) -> str:
    """The pass is started by the owner of an RRef, whose call has a deadline."""
    x = dg.tensor([1.0], requires_grad=True)
    with dist_autograd.context() as context_id:
        rref = rpc.remote("worker1", produce, args=(x,))
        rref.to_here()
        with pytest.raises((BackwardError, RpcTimeoutError)) as caught:
            rref.backward(int(context_id))
        rpc.rpc_sync("worker2", served.let_go)
        return str(caught.value)


def test_waiting_rref_backward_that_takes_too_long_says_for_what() -> None:
    with World(3, rpc_timeout=0.5) as world:
        text = world.run(answer_late, ranks=[0])[0]
    assert "worker 'worker2', pass 1 of worker 'worker1': running, a thread is at work" in text
    assert "no gradient from worker 'worker2' for call served:held" in text


def fail_with_site(rank: int) -> tuple[str, str, str]:
    x = dg.tensor([1.0], requires_grad=True)
    for peer in ("worker0", "worker1"):
        rpc.rpc_sync(peer, trace, args=(True,))
    rpc.rpc_sync("worker1", served.break_rules, args=(True,))
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", served.fickle, args=(x,)).sum()
        with pytest.raises(BackwardError) as caught:
            dist_autograd.backward(context_id, [loss], timeout=20)
        late = rpc.rpc_sync("worker1", served.held_behind, args=(x,)).sum()
        with pytest.raises(BackwardError) as waited:
            dist_autograd.backward(context_id, [late], timeout=0.2)
        rpc.rpc_sync("worker2", served.let_go)
    rpc.rpc_sync("worker1", served.break_rules, args=(False,))
    for peer in ("worker0", "worker1"):
        rpc.rpc_sync(peer, trace, args=(False,))
    return caught.value.site, str(caught.value), str(waited.value)


def test_waiting_and_failing_nodes_show_where_they_were_recorded(trio: World) -> None:
    site, text, waited = trio.run(fail_with_site, ranks=[0])[0]
    assert "served.py" in site
    assert site.endswith("in fickle")
    assert f"at node FickleBackward, recorded at {site}: this rule is broken" in text
    assert "for call served:held_behind, recorded at " in waited
    assert "in fail_with_site" in waited


def test_waiting_untraced_nodes_remember_nothing() -> None:
    x = dg.tensor([1.0], requires_grad=True)
    assert (x * 2.0).grad_fn.metadata == {}
    config.trace_graph = True
    try:
        site = (x * 2.0).grad_fn.metadata["recorded at"]
    finally:
        config.trace_graph = False
    assert site.endswith("in test_waiting_untraced_nodes_remember_nothing")
    assert (x * 2.0).grad_fn.metadata == {}


def test_waiting_local_pass_that_fails_shows_where_the_node_was_recorded() -> None:
    x = dg.tensor([1.0], requires_grad=True)
    config.trace_graph = True
    try:
        y = served.Fickle.apply(x).sum()
    finally:
        config.trace_graph = False
    served.broken.set()
    with pytest.raises(ZeroDivisionError) as caught:
        y.backward()
    served.broken.clear()
    (note,) = caught.value.__notes__
    assert HERE in note
    assert "in test_waiting_local_pass" in note
