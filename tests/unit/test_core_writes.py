"""In-place writes: recorded, or refused, never silently wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import distgrad as dg
from distgrad.config import config


def leaf(*values: float) -> dg.Tensor:
    return dg.tensor(values, requires_grad=True)


def test_write_to_saved_result_names_both_operations() -> None:
    y = np.exp(leaf(1.0))
    y += 1
    with pytest.raises(dg.GraphError, match=r"ExpBackward.*exp.*modified afterwards by __iadd__"):
        y.backward()


def test_write_to_saved_argument_names_both_operations() -> None:
    x, w = leaf(1.0), dg.tensor([2.0])
    y = x * w
    w[0] = 5.0
    with pytest.raises(
        dg.GraphError, match=r"MultiplyBackward.*modified afterwards by __setitem__"
    ):
        y.backward()


def test_write_to_leaf_names_both_lines_where_the_graph_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "trace_graph", True)
    x = leaf(1.0)
    y = x * x
    with dg.no_grad():
        x += 1
    here = test_write_to_leaf_names_both_lines_where_the_graph_is_traced.__code__
    first, second = (
        f"{re.escape(__file__)}:{here.co_firstlineno + lines} in {here.co_name}" for lines in (5, 7)
    )
    with pytest.raises(
        dg.GraphError,
        match=f"a value it saved for multiply at {first} was modified afterwards by "
        f"__iadd__ at {second}",
    ):
        y.backward()


def test_write_to_leaf_says_how_to_learn_the_lines() -> None:
    x = leaf(1.0)
    y = x * x
    with dg.no_grad():
        x += 1
    with pytest.raises(dg.GraphError, match=r"by __iadd__\n.*DISTGRAD_TRACE_GRAPH=1"):
        y.backward()


@pytest.mark.parametrize(
    "write",
    [
        lambda t: np.copyto(t, 5.0),
        lambda t: np.put(t, [0], 5.0),
        lambda t: np.place(t, [True] * 4, 5.0),
        lambda t: np.putmask(t, [True] * 4, 5.0),
        lambda t: np.put_along_axis(t, np.array([0]), 5.0, 0),
        lambda t: np.fill_diagonal(t.reshape(2, 2), 5.0),
        lambda t: np.add.at(t, [0, 0], 5.0),
        lambda t: np.heaviside(t * 0.0, 5.0, out=t),
        lambda t: np.cumsum(t, out=t),
        lambda t: np.frexp(t * 8.0, out=(t, None)),
        lambda t: np.subtract.reduce(np.ones((3, 4)), out=t),
        lambda t: np.median(np.zeros((3, 4)), axis=0, out=t),
    ],
)  # fmt: skip
def test_write_by_a_function_of_numpy_is_noticed(write: Callable[[dg.Tensor], Any]) -> None:
    x, w = leaf(1.0), dg.tensor(np.ones(4))
    y = (x * w).sum()
    write(w)
    assert w.tolist() != [1.0] * 4
    with pytest.raises(dg.GraphError, match="a value it saved for multiply was modified"):
        y.backward()


def test_out_of_a_function_without_rule_is_what_it_returns() -> None:
    out = dg.zeros(4)
    assert np.median(np.ones((3, 4)), axis=0, out=out) is out
    assert np.heaviside(np.ones(4), 0.5, out=out) is out
    mantissa, exponent = np.frexp(dg.ones(4), out=(out, None))
    mantissa += 1
    assert (out._version, exponent.tolist()) == (4, [1] * 4)


def test_result_that_requires_grad_is_not_written_into_an_array() -> None:
    array = np.zeros(2)
    for write in (
        lambda: np.add(array, leaf(1.0, 2.0), out=array),
        lambda: np.cumsum(leaf(1.0, 2.0), out=array),
        lambda: np.sum(leaf(1.0, 2.0), axis=0, keepdims=True, out=array[:1]),
    ):
        with pytest.raises(TypeError, match="a = a \\+ t instead of a \\+= t"):
            write()
    array += dg.tensor([1.0, 2.0])
    with dg.no_grad():
        array += leaf(1.0, 2.0)
    assert array.tolist() == [2.0, 4.0]


def test_write_through_view_or_alias_is_noticed() -> None:
    for alias in (lambda t: t[:1], lambda t: t.detach(), lambda t: t.reshape(1, 1)):
        x, w = leaf(1.0), dg.tensor([2.0])
        other = alias(w)
        y = x * w
        other += 1
        with pytest.raises(dg.GraphError, match="modified"):
            y.backward()


def test_write_to_alias_of_saved_result_is_noticed() -> None:
    y = np.exp(leaf(1.0))
    alias = y.detach()
    alias *= 2
    with pytest.raises(dg.GraphError, match="modified"):
        y.backward()


def test_write_to_value_that_no_rule_reads_is_harmless() -> None:
    x = leaf(1.0, 2.0)
    y = x + 1
    z = y.sum()
    y += 1
    (z + y.sum()).backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_write_by_operator_is_recorded() -> None:
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = x * 1
    y *= 2
    y += w
    y -= 1
    y.backward([1.0, 10.0])
    assert y.tolist() == [4.0, 7.0]
    assert (x.grad.tolist(), w.grad.tolist()) == ([2.0, 20.0], [1.0, 10.0])


def test_write_by_index_is_recorded() -> None:
    x, v = leaf(1.0, 2.0), dg.tensor(5.0, requires_grad=True)
    y = x * 1
    y[1] = v
    (y * [10.0, 100.0]).sum().backward()
    assert (x.grad.tolist(), v.grad.item()) == ([10.0, 0.0], 100.0)


def test_write_of_recorded_value_makes_a_constant_require_grad() -> None:
    v = dg.tensor(5.0, requires_grad=True)
    buffer = dg.zeros(3)
    buffer[1] = v
    buffer.sum().backward()
    assert v.grad.item() == 1.0


def test_write_to_leaf_is_refused_while_recording() -> None:
    x = leaf(1.0)
    with pytest.raises(dg.GraphError, match=r"leaf(.|\n)*no_grad"):
        x += 1
    with dg.no_grad():
        x -= 0.5
    assert x.tolist() == [0.5]
    assert x.requires_grad


def test_write_to_view_is_refused_while_recording() -> None:
    y = leaf(1.0, 2.0) * 1
    view = y[:1]
    with pytest.raises(dg.GraphError, match="on a view"):
        view += 1


def test_view_from_before_a_recorded_write_is_refused() -> None:
    y = leaf(1.0, 2.0) * 1
    view = y[:1]
    y *= 2
    with pytest.raises(dg.GraphError, match="take the view again"):
        view * 1
    assert (y[:1] * 1).tolist() == [2.0]


@pytest.mark.parametrize("index", [0, slice(None), [True, False], np.array([1])])
def test_write_of_plain_values_equals_numpy(index: Any) -> None:
    array = np.array([1.0, 2.0])
    tensor = dg.tensor(array)
    array[index] = 9.0
    tensor[index] = 9.0
    assert tensor.tolist() == array.tolist()


def test_write_that_would_change_the_shape_raises() -> None:
    y = leaf(1.0) * 1
    with pytest.raises(ValueError, match="shape"):
        y += np.ones((2, 1))


def test_out_is_written_and_recorded() -> None:
    x, out = leaf(1.0, 2.0), dg.zeros(2)
    assert np.multiply(x, 3.0, out=out) is out
    out.sum().backward()
    assert (out.tolist(), x.grad.tolist()) == ([3.0, 6.0], [3.0, 3.0])


def test_data_replaced_after_saving_is_noticed() -> None:
    x, w = leaf(1.0), leaf(2.0)
    y = x * w
    w.data = np.array([5.0])
    with pytest.raises(dg.GraphError, match=r"afterwards by an assignment to \.data"):
        y.backward()
