"""Parameter groups, state and refusals of the optimizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distgrad._core import Tensor
from distgrad.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Optimizer,
    RMSprop,
    Rprop,
)

KINDS = [SGD, Adam, AdamW, Adagrad, RMSprop, Adadelta, Adamax, Rprop]


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values), requires_grad=True)


def ones(*params: Tensor) -> dict[Tensor, Tensor]:
    return {param: Tensor(np.ones(param.shape)) for param in params}


def test_groups_take_their_own_settings() -> None:
    a, b, c = leaf(1.0), leaf(1.0), leaf(1.0)
    optimizer = SGD([{"params": [a], "lr": 0.5}, {"params": b}], lr=0.25)
    optimizer.add_param_group({"params": [c], "lr": 0.125})
    optimizer.step(ones(a, b, c))
    assert [a.item(), b.item(), c.item()] == [0.5, 0.75, 0.875]


def test_groups_changed_setting_counts_from_the_next_step() -> None:
    param = leaf(1.0)
    optimizer = SGD([param], lr=0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step(ones(param))
    assert param.item() == 0.75


def test_step_without_gradients_takes_grad_and_skips_none() -> None:
    given, left = leaf(1.0), leaf(1.0)
    given.grad = Tensor(np.array([2.0]))
    SGD([given, left], lr=0.25).step()
    assert (given.item(), left.item()) == (0.5, 1.0)


def test_step_foreign_gradient_is_ignored() -> None:
    param, foreign = leaf(1.0), leaf(1.0)
    SGD([param], lr=1.0).step(ones(foreign))
    assert (param.item(), foreign.item()) == (1.0, 1.0)


def test_zero_grad_forgets_or_fills() -> None:
    param = leaf(1.0)
    optimizer = SGD([param])
    param.grad = Tensor(np.array([2.0]))
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is not None
    assert param.grad.item() == 0.0
    optimizer.zero_grad()
    assert param.grad is None


def test_prepare_given_up_changes_nothing() -> None:
    param = leaf(1.0, 2.0)
    optimizer = Adam([param], lr=0.1)
    optimizer.step(ones(param))
    before, kept = param.data.copy(), optimizer.state_dict()
    optimizer.prepare(ones(param))
    np.testing.assert_array_equal(param.data, before)
    np.testing.assert_equal(optimizer.state_dict(), kept)


@pytest.mark.parametrize("cls", [SGD, Adam])
def test_state_dict_loaded_continues_the_same_path(cls: type[Optimizer]) -> None:
    settings: dict[str, Any] = {"momentum": 0.9} if cls is SGD else {"amsgrad": True}
    first, second = leaf(1.0, 2.0), leaf(1.0, 2.0)
    whole, fresh = cls([first], lr=0.1, **settings), cls([second], lr=0.7, **settings)
    for _ in range(3):
        whole.step({first: Tensor(first.data * 0.5)})
    second.data[...] = first.data
    fresh.load_state_dict(whole.state_dict())
    for _ in range(3):
        whole.step({first: Tensor(first.data * 0.5)})
        fresh.step({second: Tensor(second.data * 0.5)})
    np.testing.assert_array_equal(first.data, second.data)


def test_state_dict_is_a_copy() -> None:
    param = leaf(1.0)
    optimizer = SGD([param], momentum=0.9)
    optimizer.step(ones(param))
    optimizer.state_dict()["state"][0]["velocity"][...] = 100.0
    assert optimizer.state[param]["velocity"] == 1.0


def test_state_dict_of_other_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its parameter groups differ .* \[1\] parameters"):
        SGD([leaf(1.0)]).load_state_dict(SGD([leaf(1.0), leaf(2.0)]).state_dict())


@pytest.mark.parametrize("cls", [SGD, Adam])
@pytest.mark.parametrize(
    ("gradient", "error", "fact"),
    [
        (np.ones(3), ValueError, r"parameter 2 of shape \(2,\): its gradient has shape \(3,\)"),
        (np.ones(2, complex), TypeError, "dtype float64: its gradient has dtype complex128"),
        (np.array(["a", "b"]), TypeError, "parameter 2 of dtype float64: .* dtype <U1"),
    ],
)
def test_gradient_that_does_not_fit_is_refused_before_anything_changes(
    cls: type[Optimizer], gradient: Any, error: type[Exception], fact: str
) -> None:
    first, other, last = leaf(1.0), leaf(1.0), leaf(1.0, 2.0)
    optimizer = cls([{"params": [first]}, {"params": [other, last]}], lr=0.5)
    for act in (optimizer.step, optimizer.prepare):
        with pytest.raises(error, match=fact):
            act({**ones(first, other), last: gradient})
    assert (first.item(), other.item(), last.data.tolist()) == (1.0, 1.0, [1.0, 2.0])
    assert optimizer.state == {}


def test_parameter_that_cannot_be_written_is_refused_before_anything_changes() -> None:
    first, frozen = leaf(1.0), leaf(1.0)
    frozen.data.flags.writeable = False
    optimizer = SGD([first, frozen], lr=0.5)
    with pytest.raises(ValueError, match="parameter 1 in place: its memory is read-only"):
        optimizer.step(ones(first, frozen))
    assert first.item() == 1.0
    optimizer.prepare(ones(first, frozen)).commit()  # has memory of its own
    assert (first.item(), frozen.item()) == (0.5, 0.5)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("phases", [1, 2])
def test_gradient_of_another_dtype_counts_as_one_of_the_parameter(
    cls: type[Optimizer], phases: int
) -> None:
    values = [0.5, -2.0, 0.25]
    for dtype, given in [(np.complex128, np.float64), (np.float64, np.float32), (np.float32, int)]:
        a, b = (Tensor(np.ones(3, dtype), requires_grad=True) for _ in range(2))
        for param, kind in ((a, dtype), (b, given)):
            gradient = np.array(values).astype(given).astype(kind)
            optimizer = cls([param])
            for _ in range(2):
                if phases == 1:
                    optimizer.step({param: Tensor(gradient)})
                else:
                    optimizer.prepare({param: Tensor(gradient)}).commit()
        np.testing.assert_array_equal(a.data, b.data)
        assert b.data.dtype == dtype


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("phases", [1, 2])
def test_gradient_that_overlaps_the_parameter_is_read_before_it_is_written(
    cls: type[Optimizer], phases: int
) -> None:
    memory = np.linspace(-1, 1, 41)
    apart = Tensor(memory[:-1].copy(), requires_grad=True)
    param = Tensor(memory[:-1], requires_grad=True)
    plain, overlapping = cls([apart], lr=0.5), cls([param], lr=0.5)
    for _ in range(2):
        given = {apart: Tensor(memory[1:].copy())}
        plain.step(given)
        if phases == 1:
            overlapping.step({param: Tensor(memory[1:])})
        else:
            overlapping.prepare({param: Tensor(memory[1:])}).commit()
        np.testing.assert_array_equal(param.data, apart.data)
        param.data = memory[:-1]
        apart.data[...] = memory[:-1]


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), ()])
def test_parameter_without_numbers_or_axes_steps(
    cls: type[Optimizer], shape: tuple[int, ...]
) -> None:
    param = Tensor(np.ones(shape), requires_grad=True)
    optimizer = cls([param])
    optimizer.step(ones(param))
    optimizer.prepare(ones(param)).commit()
    assert param.data.shape == shape
    assert (param.data < 1).all()


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("phases", [1, 2])
def test_parameter_with_gaps_steps_like_one_without(cls: type[Optimizer], phases: int) -> None:
    for dtype in (np.float64, np.complex64):
        memory = np.ones((4, 6), dtype)
        gaps = Tensor(memory[:, ::2], requires_grad=True)
        whole = Tensor(np.ones((4, 3), dtype), requires_grad=True)
        for param in (gaps, whole):
            optimizer = cls([param])
            for _ in range(2):
                gradient = Tensor(param.data * dtype(0.5))
                if phases == 1:
                    optimizer.step({param: gradient})
                else:
                    optimizer.prepare({param: gradient}).commit()
        np.testing.assert_array_equal(gaps.data, whole.data)
        assert (memory[:, 1::2] == 1).all()


def test_prepare_given_up_leaves_nothing_in_the_state_of_later_steps() -> None:
    param = leaf(1.0, 2.0)
    optimizer = SGD([param], lr=0.5, momentum=0.9)
    optimizer.prepare(ones(param))
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.prepare(ones(param)).commit()
    assert optimizer.state == {param: {}}


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"lr": -1.0}, "lr=-1.0: it must be at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": -0.5}, "momentum=-0.5"),
        ({"nesterov": True}, "needs momentum"),
    ],
)
def test_sgd_bad_setting_is_refused(settings: dict[str, Any], fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        SGD([leaf(1.0)], **settings)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_adam_bad_betas_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"each must be in \[0, 1\)"):
        Adam([leaf(1.0)], betas=betas)


def test_parameters_that_cannot_be_optimized_are_refused() -> None:
    param = leaf(1.0)
    with pytest.raises(ValueError, match="there are no parameters"):
        SGD([])
    with pytest.raises(TypeError, match="pass a list"):
        SGD(param)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot optimize float"):
        SGD([1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no leaf that requires grad"):
        SGD([Tensor(np.ones(1))])
    with pytest.raises(ValueError, match="twice"):
        SGD([param, param])


def test_repr_shows_the_settings() -> None:
    text = repr(SGD([leaf(1.0)], lr=0.5))
    assert text.startswith("SGD(lr=0.5, momentum=0.0")
    assert text.endswith("1 parameters)")


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize(
    ("setting", "error", "fact"),
    [
        (-1.0, ValueError, "lr=-1.0: it must be at least 0"),
        (float("nan"), ValueError, "lr=nan"),
        ("x", TypeError, "lr='x': expected a number"),
        (None, TypeError, "lr=None: expected a number"),
        (np.ones(2), TypeError, "expected a number"),
    ],
)
def test_setting_that_makes_no_sense_is_refused_also_in_a_group(
    cls: Any, setting: Any, error: type[Exception], fact: str
) -> None:
    with pytest.raises(error, match=fact):
        cls([leaf(1.0)], lr=setting)
    with pytest.raises(error, match=fact):
        cls([{"params": [leaf(1.0)], "lr": setting}])
    optimizer = cls([leaf(1.0)])
    with pytest.raises(error, match=fact):
        optimizer.add_param_group({"params": [leaf(1.0)], "lr": setting})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("act", [Optimizer.step, Optimizer.prepare])
@pytest.mark.parametrize("cls", KINDS)
def test_setting_changed_to_one_that_makes_no_sense_is_refused_before_anything_changes(
    cls: Any, act: Any
) -> None:
    first, second = leaf(1.0), leaf(2.0)
    optimizer = cls([{"params": [first]}, {"params": [second]}])
    act(optimizer, {})
    for setting, error in [(-1.0, ValueError), (float("nan"), ValueError), ("x", TypeError)]:
        optimizer.param_groups[1]["lr"] = setting
        for _ in range(2):
            with pytest.raises(error, match=f"lr={setting!r}"):
                act(optimizer, ones(first, second))
    assert (first.item(), second.item()) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("cls", "settings", "fact"),
    [
        (Adam, {"betas": (0.9,)}, "there are two"),
        (Adamax, {"betas": 0.9}, "there are two"),
        (AdamW, {"betas": (0.9, "x")}, "each must be in"),
        (Adam, {"eps": -1.0}, "eps=-1.0"),
        (Rprop, {"etas": (0.5, 1.2, 2.0)}, "0 < shrink < 1 < grow"),
        (Rprop, {"etas": 3}, "0 < shrink < 1 < grow"),
        (Rprop, {"step_sizes": (1.0, 0.1)}, "0 < smallest <= largest"),
        (Adadelta, {"rho": 1.5}, "rho=1.5"),
        (Adagrad, {"initial_accumulator_value": -1.0}, "initial_accumulator_value=-1.0"),
        (RMSprop, {"momentum": -1.0}, "momentum=-1.0"),
    ],
)
def test_setting_of_one_optimizer_that_makes_no_sense_is_refused(
    cls: Any, settings: dict[str, Any], fact: str
) -> None:
    with pytest.raises(ValueError, match=fact):
        cls([leaf(1.0)], **settings)


def test_groups_that_are_none_are_refused() -> None:
    param: Any = leaf(1.0)
    with pytest.raises(TypeError, match="group 1: expected a dict with 'params'"):
        SGD([{"params": [param]}, leaf(2.0)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="group 0: expected a dict with 'params'"):
        SGD([{"lr": 1.0}])
    with pytest.raises(TypeError, match="pass a list"):
        SGD(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a dict from parameters to gradients"):
        SGD([param]).step([param])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "fact"),
    [
        (lambda state: 3, TypeError, "expected what state_dict"),
        (lambda state: {}, TypeError, "expected what state_dict"),
        (
            lambda state: Adagrad([leaf(1.0, 2.0)]).state_dict(),
            ValueError,
            "group 0 has no amsgrad, betas, decoupled_weight_decay; it is not of Adam",
        ),
        (lambda state: state | {"state": {-1: {}}}, ValueError, "no parameter -1"),
        (
            lambda state: state | {"param_groups": [state["param_groups"][0] | {"lr": -1.0}]},
            ValueError,
            "lr=-1.0: it must be at least 0",
        ),
        (lambda state: state | {"state": {"x": {}}}, ValueError, "no parameter 'x'"),
        (
            lambda state: state | {"state": {0: {"step": 1, "mean": np.ones(3)}}},
            ValueError,
            r"mean of parameter 0 has shape \(3,\), the parameter \(2,\)",
        ),
    ],
)
def test_state_dict_of_something_else_is_refused_and_changes_nothing(
    change: Any, error: type[Exception], fact: str
) -> None:
    param = leaf(1.0, 2.0)
    optimizer = Adam([param], lr=0.1)
    optimizer.step(ones(param))
    before = optimizer.state_dict()
    with pytest.raises(error, match=fact):
        optimizer.load_state_dict(change(optimizer.state_dict()))
    np.testing.assert_equal(optimizer.state_dict(), before)
