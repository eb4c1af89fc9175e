"""Tensors as NumPy and PyTorch users know them."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import numpy as np
import pytest

import distgrad as dg


def leaf(*values: float) -> dg.Tensor:
    return dg.tensor(values, requires_grad=True)


def test_tensor_new_copies_its_data() -> None:
    data = np.zeros(2)
    tensor = dg.tensor(data)
    data[0] = 1.0
    assert tensor.tolist() == [0.0, 0.0]


def test_from_numpy_shares_memory() -> None:
    data = np.zeros(2)
    tensor = dg.from_numpy(data)
    data[0] = 1.0
    tensor[1] = 2.0
    assert tensor.tolist() == data.tolist() == [1.0, 2.0]


def test_tensor_attributes_are_those_of_the_array() -> None:
    t = dg.zeros((2, 3), np.float32)
    assert (t.shape, t.dtype, t.ndim, t.size, t.nbytes) == ((2, 3), np.float32, 2, 6, 24)
    assert t.T.shape == t.mT.shape == (3, 2)
    assert (t.is_leaf, t.requires_grad, t.grad, t.grad_fn, t.output_nr) == (
        True,
        False,
        None,
        None,
        0,
    )


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (dg.tensor([1.0, 2.5]), "tensor([1. , 2.5])"),
        (dg.tensor([1], dtype=np.int32), "tensor([1], dtype=int32)"),
        (leaf(1.0), "tensor([1.], requires_grad=True)"),
        (leaf(1.0) * 2, "tensor([2.], grad_fn=<MultiplyBackward>)"),
    ],
)
def test_repr_shows_values_and_history(tensor: dg.Tensor, text: str) -> None:
    assert repr(tensor) == text


def test_numpy_of_tensor_requiring_grad_is_refused() -> None:
    t = leaf(1.0)
    for use in (t.numpy, lambda: np.asarray(t), t.__dlpack__):
        with pytest.raises(dg.GraphError, match="requires grad"):
            use()
    assert np.asarray(t.detach()).tolist() == [1.0]
    assert np.from_dlpack(t.detach()).tolist() == [1.0]


def test_conversion_of_single_element_gives_python_numbers() -> None:
    t = leaf(2.5)[0].detach()
    assert (float(t), int(t), complex(t), t.item(), bool(t)) == (2.5, 2, 2.5 + 0j, 2.5, True)
    assert f"{t:.2f}" == "2.50"
    assert [10, 20, 30][dg.tensor(1)] == 20


def test_iteration_gives_recorded_rows() -> None:
    t = dg.tensor(np.eye(2), requires_grad=True)
    first, second = t
    (first * second).sum().backward()
    assert t.grad.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert len(t) == 2


def test_iteration_without_dimensions_raises() -> None:
    with pytest.raises(TypeError, match="cannot iterate"):
        list(dg.tensor(1.0))


@pytest.mark.parametrize("other", [np.array([1.0, 3.0]), np.float64(1.0), 1, [1.0, 3.0]])
def test_comparison_gives_tensor_without_grad(other: Any) -> None:
    result = leaf(1.0, 2.0) == other
    assert isinstance(result, dg.Tensor)
    assert not result.requires_grad
    assert result.tolist() == (np.array([1.0, 2.0]) == other).tolist()


@pytest.mark.parametrize("other", [np.array([3.0, 4.0]), np.float64(3.0), 3, 2.5])
def test_operator_with_array_on_either_side_records(other: Any) -> None:
    for make in (lambda a, b: a * b, lambda a, b: b * a):
        t = leaf(1.0, 2.0)
        result = make(t, other)
        assert isinstance(result, dg.Tensor)
        result.sum().backward()
        assert t.grad.tolist() == np.broadcast_to(other, (2,)).tolist()


def test_operator_with_unknown_type_raises_type_error() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        leaf(1.0) + object()


def test_promotion_python_number_keeps_dtype() -> None:
    t = dg.ones(2, np.float32, requires_grad=True)
    assert (t * 2.0).dtype == (2.0 - t).dtype == (t**2).dtype == np.float32


@pytest.mark.parametrize("call", [np.unique, lambda t: np.linalg.svd(t), lambda t: np.gradient(t)])
def test_function_without_rule_names_both_ways_out(call: Any) -> None:
    t = dg.tensor(np.eye(2), requires_grad=True)
    with pytest.raises(TypeError, match=r"cannot differentiate numpy(.|\n)*detach(.|\n)*primitive"):
        call(t)
    call(t.detach())


def test_ufunc_without_rule_raises_type_error() -> None:
    with pytest.raises(TypeError, match="cannot differentiate"):
        np.ldexp(leaf(1.0), 2)


def test_function_without_rule_on_plain_tensor_gives_tensors() -> None:
    values, counts = np.unique(dg.tensor([3, 1, 3]), return_counts=True)
    assert isinstance(values, dg.Tensor)
    assert (values.tolist(), counts.tolist()) == ([1, 3], [1, 2])


def test_constant_function_result_requires_no_grad() -> None:
    t = leaf(1.0, 3.0)
    assert not np.argmax(t).requires_grad
    assert not np.isnan(t).requires_grad
    assert np.shape(t) == (2,)
    assert bool(np.allclose(t, [1.0, 3.0]))


def test_copy_and_pickle_keep_leaves() -> None:
    t = leaf(1.0, 2.0)
    for twin in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert twin.requires_grad
        assert twin.is_leaf
        assert twin.tolist() == t.tolist()
    with pytest.raises(dg.GraphError, match="computed"):
        copy.deepcopy(t * 2)


def test_requires_grad_of_computed_tensor_cannot_be_taken_back() -> None:
    t = leaf(1.0) * 2
    with pytest.raises(dg.GraphError, match="computed"):
        t.requires_grad_(False)


def test_hash_is_identity() -> None:
    first, second = leaf(1.0), leaf(1.0)
    table = {first: "first", second: "second"}
    assert (table[first], table[second]) == ("first", "second")


def test_tensor_dies_with_its_last_reference() -> None:
    t = leaf(1.0)
    y = (t * t).sum()
    y.backward()
    watch = [weakref.ref(t), weakref.ref(y), weakref.ref(y.grad_fn)]
    gc.disable()
    try:
        del t, y
        assert [ref() for ref in watch] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [lambda: leaf(1.0), lambda: leaf(1.0).detach().requires_grad_()])
def test_tensor_in_cycle_with_hook_is_collected(make: Any) -> None:
    t = make()
    t.register_hook(lambda g, t=t: None)
    watch = weakref.ref(t)
    del t
    gc.collect()
    assert watch() is None


def test_grad_setter_checks_shape_and_type() -> None:
    t = leaf(1.0)
    t.grad = dg.tensor([3.0])
    t.grad = None
    with pytest.raises(ValueError, match="cannot set grad"):
        t.grad = dg.tensor([1.0, 2.0])
    with pytest.raises(TypeError, match="not a Tensor"):
        t.grad = np.ones(1)


@pytest.mark.parametrize("convert", [float, int, complex, np.asarray, math.sqrt])
def test_conversion_that_would_cut_the_graph_raises(convert: Any) -> None:
    t = dg.tensor(4.0, requires_grad=True)
    with pytest.raises(dg.GraphError, match=r"requires grad(.|\n)*item\(\)(.|\n)*detach"):
        convert(t)
    assert (bool(t), t.item(), convert(t.detach()), f"{t:.1f}") == (True, 4.0, convert(4.0), "4.0")
    with dg.no_grad():
        assert convert(t) == convert(4.0)


def test_function_without_rule_names_itself_and_the_ways_out() -> None:
    x = dg.tensor([1.0, 2.0], requires_grad=True)
    for function in (np.gradient, np.unwrap, np.modf):
        with pytest.raises(TypeError, match=rf"{function.__name__}(.|\n)*detach(.|\n)*primitive"):
            function(x)
    assert np.gradient(x.detach()).tolist() == [1.0, 1.0]
