"""Local backward: accumulation, modes, hooks, higher derivatives, freed graphs."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad._core import AccumulateGrad


def leaf(*values: float) -> dg.Tensor:
    return dg.tensor(values, requires_grad=True)


def test_backward_accumulates_into_grad() -> None:
    x = leaf(1.0, 2.0)
    for _ in range(3):
        (x * x).sum().backward()
    assert x.grad.tolist() == [6.0, 12.0]


def test_backward_shared_gradient_gives_leaves_their_own() -> None:
    x, y = leaf(1.0), leaf(2.0)
    seed = np.ones(1)
    (x + y).backward(seed)
    x.grad[0] = 7.0
    assert (y.grad.tolist(), seed.tolist()) == ([1.0], [1.0])


def test_backward_of_several_elements_needs_a_gradient() -> None:
    with pytest.raises(dg.GraphError, match="only a tensor with one element"):
        (leaf(1.0, 2.0) * 2).backward()


def test_backward_with_gradient_of_other_shape_raises() -> None:
    with pytest.raises(dg.GraphError, match=r"shape \(3,\)"):
        (leaf(1.0, 2.0) * 2).backward(np.ones(3))


def test_backward_without_grad_raises() -> None:
    with pytest.raises(dg.GraphError, match="does not require grad"):
        dg.tensor(1.0).backward()


def test_backward_of_leaf_itself_gives_the_seed() -> None:
    x = leaf(1.0, 2.0)
    x.backward([3.0, 4.0])
    assert x.grad.tolist() == [3.0, 4.0]


def test_backward_second_pass_over_freed_graph_says_so() -> None:
    y = leaf(2.0) ** 2
    y.backward()
    with pytest.raises(dg.GraphError, match=r"earlier pass freed(.|\n)*retain_graph=True"):
        y.backward()


def test_backward_with_retained_graph_may_run_again() -> None:
    x = leaf(2.0)
    y = x**2
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.tolist() == [8.0]


def test_backward_inputs_get_gradients_and_others_none() -> None:
    x, w = leaf(2.0), leaf(3.0)
    h = x * w
    (h * h).backward(inputs=[x])
    assert x.grad.tolist() == [36.0]
    assert w.grad is None


def test_grad_leaves_grad_alone() -> None:
    x = leaf(2.0)
    h = x * 3
    by_h, by_x = dg.grad(h * h, [h, x])
    assert (by_h.tolist(), by_x.tolist(), x.grad) == ([12.0], [36.0], None)


def test_grad_of_unused_input_raises_unless_allowed() -> None:
    x, unused = leaf(1.0), leaf(1.0)
    with pytest.raises(dg.GraphError, match="not used"):
        dg.grad(x * 1, unused)
    assert dg.grad(x * 1, [x, unused], allow_unused=True)[1] is None


def test_grad_of_third_order_is_exact() -> None:
    x = leaf(2.0)
    y = x**4
    for expected in (32.0, 48.0, 48.0):
        (y,) = dg.grad(y, x, create_graph=True)
        assert y.item() == expected


def test_backward_create_graph_gradient_is_recorded() -> None:
    x = leaf(3.0)
    (x * x * x).backward(create_graph=True)
    assert x.grad.requires_grad
    (second,) = dg.grad(x.grad, x)
    assert second.tolist() == [18.0]
    x.grad = None  # it holds the graph that holds x: a cycle, which nodes hide from the collector


@pytest.mark.parametrize("shape", [(), (3,), (1000,)])
def test_plain_backward_leaves_no_graph_behind_a_recorded_gradient(shape: tuple[int, ...]) -> None:
    x = dg.tensor(np.full(shape, 3.0), requires_grad=True)
    (x * x * x).sum().backward(create_graph=True)
    (x * x).sum().backward()
    assert not x.grad.requires_grad
    np.testing.assert_array_equal(x.grad.numpy(), np.full(shape, 33.0))
    (x * x).sum().backward(inputs=[x])
    assert not x.grad.requires_grad


def test_no_grad_records_nothing_and_nests() -> None:
    x = leaf(1.0)
    with dg.no_grad():
        assert not (x * 2).requires_grad
        with dg.enable_grad():
            assert (x * 2).requires_grad
        assert not dg.is_grad_enabled()
    assert dg.is_grad_enabled()


def test_no_grad_as_decorator_holds_during_the_call() -> None:
    @dg.no_grad()
    def f(x: dg.Tensor) -> dg.Tensor:
        return x * 2

    assert not f(leaf(1.0)).requires_grad
    assert dg.is_grad_enabled()


def test_set_grad_enabled_acts_at_once_and_restores() -> None:
    with dg.set_grad_enabled(False):
        assert not dg.is_grad_enabled()
    assert dg.is_grad_enabled()


def test_grad_mode_belongs_to_the_thread() -> None:
    seen: list[bool] = []
    with dg.no_grad():
        thread = threading.Thread(target=lambda: seen.append(dg.is_grad_enabled()))
        thread.start()
        thread.join(10)
    assert seen == [True]


def test_hook_on_leaf_and_result_may_replace_the_gradient() -> None:
    x = leaf(1.0)
    y = x * 2
    x.register_hook(lambda g: g + 1)
    handle = y.register_hook(lambda g: g * 10)
    y.backward(retain_graph=True)
    assert x.grad.tolist() == [21.0]
    handle.remove()
    x.grad = None
    y.backward()
    assert x.grad.tolist() == [3.0]


def test_retain_grad_keeps_that_of_a_result() -> None:
    x = leaf(1.0)
    y = x * 2
    y.retain_grad()
    (y * y).backward()
    assert y.grad.tolist() == [4.0]


def test_post_accumulate_hook_sees_the_stored_gradient() -> None:
    x = leaf(1.0)
    seen: list[Any] = []
    x.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.tolist()))
    (x * 5).backward()
    assert seen == [[5.0]]


def test_node_hooks_see_and_replace_gradients() -> None:
    x = leaf(1.0)
    y = x * 2
    y.grad_fn.register_prehook(lambda outputs: (outputs[0] * 10,))
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] + outputs[0],))
    y.backward()
    assert x.grad.tolist() == [30.0]


def test_graph_is_visible() -> None:
    x, w = leaf(1.0), leaf(2.0)
    node = (x * w).grad_fn
    assert node.name() == "MultiplyBackward"
    (first, slot), (second, _) = node.next_functions
    assert isinstance(first, AccumulateGrad)
    assert (first.variable is x, second.variable is w, slot) == (True, True, 0)
    node.metadata["note"] = 1
    assert node.metadata == {"note": 1}


def test_failing_rule_names_its_node() -> None:
    @dg.primitive
    def odd(x: Any) -> Any:
        return x + 0.0

    odd.defvjp(lambda g, ans, x: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        odd(leaf(1.0)).backward()
    assert "OddBackward" in "".join(caught.value.__notes__)


def test_rule_with_wrong_shape_is_refused() -> None:
    @dg.primitive
    def odd(x: Any) -> Any:
        return x.sum()

    odd.defvjp(lambda g, ans, x: g)
    with pytest.raises(dg.GraphError, match=r"OddBackward.*shape \(\).*\(2,\)"):
        odd(leaf(1.0, 2.0)).backward()


@pytest.mark.deadline(120)
def test_chain_of_a_million_nodes_runs_and_dies_without_recursion() -> None:
    x = leaf(1.0)
    y = x
    for _ in range(1_000_000):
        y = y + x
    y.backward()
    assert x.grad.tolist() == [1_000_001.0]
    del y
    z = x
    for _ in range(300_000):
        z = z * x
    del z


def test_two_threads_over_one_graph_both_accumulate() -> None:
    x = dg.ones(2000, requires_grad=True)
    y = x
    for _ in range(20):
        y = y * x
    loss = y.sum()
    rounds, threads = 10, []
    start = threading.Barrier(2)

    def run() -> None:
        start.wait(10)
        for _ in range(rounds):
            loss.backward(retain_graph=True)

    for _ in range(2):
        threads.append(threading.Thread(target=run))
        threads[-1].start()
    for thread in threads:
        thread.join(30)
    assert set(x.grad.tolist()) == {21.0 * 2 * rounds}
