"""Hooks of tensors and nodes: their order, what they see, and what they may replace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad._core import GradientTable, GraphTask, gradient_edge


class Cut(dg.Function):
    """Passes values on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: dg.Tensor) -> dg.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: dg.Tensor) -> None:
        return None


def leaf(*values: float) -> dg.Tensor:
    return dg.tensor(values, requires_grad=True)


def watched_leaf(seen: list[Any]) -> tuple[dg.Tensor, Any]:
    x = leaf(1.0)
    node = gradient_edge(x)[0]

    def note(name: str) -> Any:
        def hook(*arguments: Any) -> None:
            seen.append((name, x.grad is not None))

        return hook

    x.register_post_accumulate_grad_hook(note("stored"))
    node.register_hook(note("after"))
    node.register_prehook(note("before"))
    x.register_hook(note("tensor"))
    return x, node


def test_hooks_of_a_leaf_run_around_accumulation() -> None:
    seen: list[Any] = []
    x, _ = watched_leaf(seen)
    (x * 2).backward()
    order = [("tensor", False), ("before", False), ("after", True), ("stored", True)]
    assert seen == order
    x.grad = None


def test_hooks_into_a_table_leave_out_post_accumulate_hooks() -> None:
    seen: list[Any] = []
    x, _ = watched_leaf(seen)
    table = GradientTable()
    GraphTask([(x * 2, np.ones(1))], table=table).run()
    assert [name for name, _ in seen] == ["tensor", "before", "after"]
    assert x.grad is None
    assert table.get(x).tolist() == [2.0]


def test_hooks_of_accumulation_run_without_a_gradient() -> None:
    x, y = leaf(1.0), leaf(1.0)
    seen: list[Any] = []
    node = gradient_edge(x)[0]
    node.register_prehook(lambda outputs: seen.append(outputs))
    node.register_hook(lambda inputs, outputs: seen.append((inputs, outputs)))
    x.register_hook(lambda g: seen.append("tensor"))
    (Cut.apply(x) + y).backward()
    assert seen == [(None,), ((), (None,))]
    assert x.grad is None


def test_prehook_may_supply_a_gradient_where_none_arrived() -> None:
    x, y = leaf(1.0), leaf(1.0)
    node = gradient_edge(x)[0]
    node.register_prehook(lambda outputs: (dg.tensor([5.0]),))
    (Cut.apply(x) + y).backward()
    assert x.grad.tolist() == [5.0]


def test_tensor_hooks_run_in_order_and_before_retained_grad() -> None:
    x = leaf(1.0)
    y = x * 1
    y.retain_grad()
    y.register_hook(lambda g: g + 1)
    y.register_hook(lambda g: g * 10)
    (y * 1).backward()
    assert y.grad.tolist() == [20.0]
    assert x.grad.tolist() == [20.0]


def test_tensor_hook_sees_the_sum_once() -> None:
    x, seen = leaf(1.0), []
    y = x * 1
    y.register_hook(lambda g: seen.append(g.tolist()))
    (y * 2 + y * 3).backward()
    assert seen == [[5.0]]


def test_hook_results_are_brought_into_shape_or_refused() -> None:
    for make in (lambda x: x, lambda x: x * 1):
        x = leaf(1.0, 2.0)
        y = make(x)
        y.register_hook(lambda g: np.ones((3, 2), np.float32))
        (y * 1).sum().backward()
        assert (x.grad.tolist(), x.grad.dtype) == ([3.0, 3.0], np.float64)
        y = make(leaf(1.0, 2.0))
        y.register_hook(lambda g: np.ones(5))
        with pytest.raises(dg.GraphError, match="has shape"):
            (y * 1).sum().backward()


def test_prehook_result_of_wrong_length_is_refused() -> None:
    y = leaf(1.0) * 1
    y.grad_fn.register_prehook(lambda outputs: ())
    with pytest.raises(dg.GraphError, match=r"pre-hook.*MultiplyBackward.*0 gradients"):
        y.backward()


def test_post_hook_result_of_wrong_length_is_refused() -> None:
    y = leaf(1.0) * leaf(2.0)
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0],))
    with pytest.raises(dg.GraphError, match=r"hook.*MultiplyBackward.*1 gradient"):
        y.backward()


def test_hook_that_raises_names_the_node() -> None:
    y = leaf(1.0) * 1

    def fail(g: Any) -> None:
        raise ZeroDivisionError("mine")

    y.register_hook(fail)
    with pytest.raises(ZeroDivisionError) as caught:
        y.backward()
    assert caught.value.__notes__ == ["in the backward pass, at MultiplyBackward"]


def test_hooks_removed_no_longer_run() -> None:
    x, seen = leaf(1.0), []
    handles = [
        x.register_hook(lambda g: seen.append(g)),
        x.register_post_accumulate_grad_hook(lambda t: seen.append(t)),
        gradient_edge(x)[0].register_prehook(lambda outputs: seen.append(outputs)),
    ]
    for handle in handles:
        handle.remove()
        handle.remove()
    (x * 1).backward()
    assert seen == []


def test_hooks_under_create_graph_get_recorded_gradients() -> None:
    x = leaf(3.0)
    y = x * x
    y.register_hook(lambda g: g * x)
    (first,) = dg.grad(y, x, create_graph=True)
    (second,) = dg.grad(first, x)
    assert (first.tolist(), second.tolist()) == ([18.0], [12.0])


@pytest.mark.parametrize("n", [3, 100_000])  # a gradient that repeats is a view above some size
@pytest.mark.parametrize("where", ["leaf", "result", "node"])
def test_hook_may_write_into_the_gradient_it_gets(n: int, where: str) -> None:
    x, y = (dg.tensor(np.ones(n), requires_grad=True) for _ in range(2))
    z = x * 1.0

    def double(gradient: Any) -> None:
        gradient = gradient[0] if isinstance(gradient, tuple) else gradient
        gradient *= 2.0

    if where == "node":
        gradient_edge(z)[0].register_prehook(double)
    else:
        (x if where == "leaf" else z).register_hook(double)
    ((z + y) * 3.0).sum().backward()
    assert (x.grad[n - 1].item(), y.grad[n - 1].item()) == (6.0, 3.0)


def test_grad_returns_arrays_that_may_be_written() -> None:
    x, y = (dg.tensor(np.ones(100_000), requires_grad=True) for _ in range(2))
    by_x, by_y = dg.grad(((x + y) * 3.0).sum(), [x, y])
    by_x += 1.0
    assert (by_x[7].item(), by_y[7].item()) == (4.0, 3.0)
