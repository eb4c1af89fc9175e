"""How many messages a pass takes, and passes over many workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from integer_graph import Value, combine, leaf
from simulator import Program, Site, World
from test_backward_simulation import Chances, Scenario


def serve_by_name(site: Site, context_id: int, values: Sequence[Value], depth: int) -> Program:
    """Pass the value on to the next worker, if there is one, and add a leaf."""
    total = [*values, leaf(f"leaf{site.worker_id}")]
    if site.worker_id + 1 < len(site.world.sites):
        mixed = combine([(2, value) for value in total])
        _, promise = site.call(site.worker_id + 1, context_id, [mixed], True, depth + 1)
        total += yield promise
    return [combine([(1, value) for value in total])]


def chain(count: int) -> tuple[World, int]:
    """Return a world in which worker 0 called 1, which called 2, and so on, and a context."""
    world = World(count, 0, serve_by_name)
    site = world.sites[0]
    context_id = site.new_id()

    def main() -> Program:
        _, promise = site.call(1, context_id, [leaf("leaf0")], True, 0)
        (result,) = yield promise
        started = site.backward(context_id, [result], True)
        assert started is not None
        yield started.promise

    world.run(site, main())
    world.settle()
    return world, context_id


def test_backward_one_call_takes_two_messages() -> None:
    """The gradient out; the gradient back, with the report."""
    world, _ = chain(2)
    assert world.messages == {"PropagateGradients": 2}


@pytest.mark.parametrize("count", [3, 5, 9])
def test_backward_nested_calls_take_one_message_a_pair(count: int) -> None:
    """The reports travel with the gradients."""
    world, _ = chain(count)
    assert world.messages == {"PropagateGradients": 2 * (count - 1)}


def test_backward_thousand_workers_in_a_chain_ends_exact() -> None:
    world, _ = chain(1000)
    (started,) = world.passes.values()
    assert started.promise.done
    assert started.promise.error == ""
    assert started.gradients == started.weights
    assert started.gradients["leaf999"] == 1
    assert started.gradients["leaf998"] == 3


@pytest.mark.deadline(36000)
def test_backward_random_contexts_take_less_than_fast_mode(programs: range) -> None:
    """Shown with ``-s``: messages of a pass against FAST mode's two a pair."""
    calm = Chances(inner=0.0, overlap=0.0, no_grad=0.0)
    ours, fast, kinds, sizes = 0, 0, Counter[str](), Counter[str]()
    for seed in programs:
        scenario = Scenario(seed, calm)
        context_id = next(iter(run_forward(scenario)))
        scenario.world.messages.clear()
        site = scenario.contexts[context_id]
        site.backward(context_id, [combine([(1, v) for v in scenario.last])], True)
        scenario.world.settle()
        messages = scenario.world.messages
        parts = [s.parts[context_id] for s in scenario.world.sites if context_id in s.parts]
        ends = [(p.host.worker_id, node.peer) for p in parts for node in p.sends.values()]
        apart = [(a, b) for a, b in ends if a != b]
        assert messages["PropagateGradients"] <= len(apart)
        assert messages["PassComplete"] < len(parts) + (not parts)
        assert messages["PassBegin"] <= len({*apart, *((b, a) for a, b in apart)})
        kinds += messages
        fast += 2 * len(apart)
        sizes[next(f"up to {n}" for n in (6, 30, 100, 300) if len(scenario.world.sites) <= n)] += 1
    ours = kinds.total()
    print(f"\n{ours} messages, FAST mode {fast}: {ours / fast:.3f}; {dict(kinds)}")
    print(f"worlds by number of workers: {dict(sizes)}")
    assert ours < 0.62 * fast  # 0.59; a small sample may lie above


def run_forward(scenario: Scenario) -> dict[int, Site]:
    """Run the forward work of one context; what its main program holds is in ``last``."""
    site = scenario.rng.choice(scenario.world.sites)
    context_id = site.new_id()
    scenario.contexts[context_id] = site
    scenario.last = [scenario.leaf()]

    def main() -> Program:
        pending = yield from scenario.work(site, context_id, scenario.last, 0)
        for promise in pending:
            yield from scenario.wait(promise, scenario.last)

    scenario.world.run(site, main())
    scenario.world.settle()
    return scenario.contexts
