"""Learning rates over time, and bounded gradients."""

from __future__ import annotations

import inspect
from math import cos, inf, pi
from typing import Any

import numpy as np
import pytest

from distgrad._core import Tensor
from distgrad.optim import SGD, Adagrad, Adam, clip_grad_norm_, lr_scheduler
from distgrad.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values), requires_grad=True)


def optimizer(cls: Any = SGD, **settings: Any) -> Any:
    return cls([{"params": [leaf(1.0)]}, {"params": [leaf(1.0)], "lr": 0.5}], lr=1.0, **settings)


def path(scheduler: Any, optimizer: Any, steps: int, setting: str = "lr") -> list[Any]:
    """Return a setting of all groups, before the first step and after each."""
    rates = [[group[setting] for group in optimizer.param_groups]]
    for _ in range(steps):
        scheduler.step()
        rates.append([group[setting] for group in optimizer.param_groups])
    return rates


def test_step_lr_falls_in_stairs() -> None:
    sgd = optimizer()
    rates = path(StepLR(sgd, step_size=2, gamma=0.5), sgd, 4)
    assert rates == [[1, 0.5], [1, 0.5], [0.5, 0.25], [0.5, 0.25], [0.25, 0.125]]


def test_lambda_lr_takes_one_function_or_one_a_group() -> None:
    sgd = optimizer()
    rates = path(LambdaLR(sgd, lambda epoch: 1 / (1 + epoch)), sgd, 3)
    assert rates == [[1 / n, 0.5 / n] for n in (1, 2, 3, 4)]
    sgd = optimizer()
    rates = path(LambdaLR(sgd, [lambda epoch: 2.0, lambda epoch: float(epoch)]), sgd, 2)
    assert rates == [[2, 0], [2, 0.5], [2, 1]]
    with pytest.raises(ValueError, match="2 parameter groups: 1 functions"):
        LambdaLR(sgd, [lambda epoch: 1.0])


def test_cosine_annealing_reaches_the_least_rate_and_returns() -> None:
    sgd = optimizer()
    rates = path(CosineAnnealingLR(sgd, T_max=4, eta_min=0.1), sgd, 8)
    expected = [
        [0.1 + (base - 0.1) * (1 + cos(pi * t / 4)) / 2 for base in (1, 0.5)] for t in range(9)
    ]
    np.testing.assert_allclose(rates, expected)
    np.testing.assert_allclose([rates[4], rates[8]], [[0.1, 0.1], [1, 0.5]])


def test_one_cycle_rises_falls_and_moves_momentum_the_other_way() -> None:
    sgd = optimizer(momentum=0.9)
    scheduler = OneCycleLR(sgd, max_lr=2.0, total_steps=10, pct_start=0.4, div_factor=4)
    momenta = [sgd.param_groups[0]["momentum"]]
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(9):
        scheduler.step()
        rates += [scheduler.get_last_lr()[0]]
        momenta += [sgd.param_groups[0]["momentum"]]
    assert rates[0] == pytest.approx(0.5)
    assert max(rates) == rates[3] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.5 / 1e4)
    assert (momenta[0], momenta[3], momenta[9]) == pytest.approx((0.95, 0.85, 0.95))
    scheduler.step()
    with pytest.raises(ValueError, match="the cycle of 10 steps is over"):
        scheduler.step()


def test_one_cycle_without_momentum_says_so() -> None:
    without = optimizer(Adagrad)
    with pytest.raises(ValueError, match="pass cycle_momentum=False"):
        OneCycleLR(without, max_lr=1.0, total_steps=5)
    with pytest.raises(ValueError, match="0 steps"):
        OneCycleLR(optimizer(), max_lr=1.0)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_plateau_lowers_the_rate_after_patience_and_rests(mode: str, sign: int) -> None:
    sgd = optimizer()
    scheduler = ReduceLROnPlateau(sgd, mode, factor=0.5, patience=1, cooldown=2, min_lr=0.2)
    rates = []
    for value in (10, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9):
        scheduler.step(sign * value + 20)
        rates.append(scheduler.get_last_lr())
    assert [r[0] for r in rates] == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.2, 0.2]
    assert rates[-1][1] == 0.2


TORCH_CASES: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 3, "gamma": 0.3}),
    ("StepLR", {"step_size": 1}),
    ("CosineAnnealingLR", {"T_max": 5, "eta_min": 0.01}),
    ("CosineAnnealingLR", {"T_max": 30}),
    ("LambdaLR", {"lr_lambda": lambda epoch: 0.9**epoch}),
    ("LambdaLR", {"lr_lambda": [lambda epoch: 0.9**epoch, lambda epoch: 1.0 + epoch]}),
    ("OneCycleLR", {"max_lr": [1.0, 2.0], "total_steps": 121}),
    ("OneCycleLR", {"max_lr": 1.0, "epochs": 12, "steps_per_epoch": 10}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 101, "anneal_strategy": "linear"}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 101, "three_phase": True, "pct_start": 0.25}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 99, "pct_start": 0.0, "cycle_momentum": False}),
    (
        "OneCycleLR",
        {
            "max_lr": 1.0,
            "total_steps": 100,
            "three_phase": True,
            "anneal_strategy": "linear",
            "base_momentum": [0.5, 0.6],
            "max_momentum": [0.8, 0.9],
            "div_factor": 7.0,
            "final_div_factor": 20.0,
        },
    ),
]


PLATEAU_CASES: list[dict[str, Any]] = [
    {"factor": 0.3, "patience": 2, "cooldown": 1, "threshold": 0.05},
    {"mode": "max", "patience": 1, "threshold_mode": "abs", "threshold": 0.3},
    {"mode": "max", "patience": 0, "min_lr": [0.01, 0.2], "eps": 1e-3},
    {"threshold_mode": "abs", "patience": 3, "min_lr": 0.05},
]


def options(cls: Any) -> dict[str, Any]:
    """Return the options of a scheduler and their defaults."""
    found = dict(inspect.signature(cls).parameters)
    del found["optimizer"]
    return {name: option.default for name, option in found.items()}


SCHEDULERS = [name for name in lr_scheduler.__all__ if name != "LRScheduler"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_option_of_every_schedule_is_compared(name: str) -> None:
    defaults = options(getattr(lr_scheduler, name))
    cases = [given for case, given in TORCH_CASES if case == name]
    cases += PLATEAU_CASES if name == "ReduceLROnPlateau" else []
    compared = {k for given in cases for k, v in given.items() if v != defaults[k]}
    # To go on later has a test of its own.
    assert compared | {"last_epoch"} == defaults.keys() | {"last_epoch"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_options_are_those_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    expected = options(getattr(torch.optim.lr_scheduler, name))
    assert options(getattr(lr_scheduler, name)) == expected


def optimizer_pair(torch: Any, kind: str = "Adam", **settings: Any) -> tuple[Any, Any]:
    """Return an own optimizer and one of torch, with two groups."""
    own = optimizer({"Adam": Adam, "SGD": SGD}[kind], **settings)
    groups: list[Any] = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    groups[1]["lr"] = 0.5
    twin = getattr(torch.optim, kind)(groups, lr=1.0, **settings)
    return own, twin


def torch_path(schedulers: list[Any], optimizer: Any, steps: int, setting: str) -> list[Any]:
    rates = [[group[setting] for group in optimizer.param_groups]]
    for _ in range(steps):
        optimizer.step()  # torch warns otherwise
        for scheduler in schedulers:
            scheduler.step()
        rates.append([group[setting] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize(("name", "settings"), TORCH_CASES, ids=lambda case: str(case)[:12])
@pytest.mark.parametrize(
    ("kind", "setting"), [("Adam", "lr"), ("Adam", "betas"), ("SGD", "momentum")]
)
def test_schedule_equals_torch(
    name: str, settings: dict[str, Any], kind: str, setting: str
) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    own, twin = optimizer_pair(torch, kind, **({"momentum": 0.9} if kind == "SGD" else {}))
    other = getattr(torch.optim.lr_scheduler, name)(twin, **settings)
    mine = getattr(lr_scheduler, name)(own, **settings)
    steps = min(100, getattr(mine, "total_steps", 100))
    np.testing.assert_allclose(
        path(mine, own, steps, setting), torch_path([other], twin, steps, setting), rtol=1e-12
    )


@pytest.mark.parametrize(
    "chain",
    [
        [("StepLR", {"step_size": 3}), ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.01})],
        [("CosineAnnealingLR", {"T_max": 7}), ("StepLR", {"step_size": 4, "gamma": 0.5})],
        [("LambdaLR", {"lr_lambda": lambda epoch: 0.9**epoch}), ("StepLR", {"step_size": 2})],
    ],
)
def test_schedules_chained_equal_torch(chain: list[tuple[str, dict[str, Any]]]) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    own, twin = optimizer_pair(torch)
    others = [getattr(torch.optim.lr_scheduler, name)(twin, **given) for name, given in chain]
    mine = [getattr(lr_scheduler, name)(own, **given) for name, given in chain]
    expected, actual = torch_path(others, twin, 20, "lr"), []
    for _ in range(20):
        actual.append([group["lr"] for group in own.param_groups])
        for scheduler in mine:
            scheduler.step()
    np.testing.assert_allclose(actual, expected[:20], rtol=1e-12)


@pytest.mark.parametrize(("name", "settings"), TORCH_CASES[::2], ids=lambda case: str(case)[:12])
def test_schedule_that_goes_on_later_equals_torch(name: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    own, twin = optimizer_pair(torch)
    for group in own.param_groups + twin.param_groups:
        group |= {"initial_lr": 1.0, "max_lr": 1.0, "min_lr": 1e-6, "lr": 0.3}
        group |= {"max_momentum": 0.95, "base_momentum": 0.85}
    if name == "OneCycleLR":
        settings = {"max_lr": 1.0, "total_steps": 40, "div_factor": 1.0, "final_div_factor": 1e6}
    other = getattr(torch.optim.lr_scheduler, name)(twin, **settings, last_epoch=6)
    mine = getattr(lr_scheduler, name)(own, **settings, last_epoch=6)
    assert mine.last_epoch == other.last_epoch
    np.testing.assert_allclose(path(mine, own, 20), torch_path([other], twin, 20, "lr"), rtol=1e-12)


def test_schedule_that_goes_on_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter group 0 has no initial_lr"):
        StepLR(optimizer(), 2, last_epoch=3)


@pytest.mark.parametrize("settings", PLATEAU_CASES)
def test_plateau_equals_torch(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    own, twin = optimizer_pair(torch)
    mine = ReduceLROnPlateau(own, **settings)
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(twin, **settings)
    random = np.random.default_rng(5)
    for value in 5 + random.standard_normal(100):
        mine.step(value)
        other.step(value)
        rates = [group["lr"] for group in twin.param_groups]
        assert mine.get_last_lr() == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize(
    "make", [lambda o: StepLR(o, 2), lambda o: ReduceLROnPlateau(o, patience=0)]
)
def test_schedule_loaded_goes_on_where_the_other_stood(make: Any) -> None:
    first, second = optimizer(), optimizer()
    whole, resumed = make(first), make(second)
    feed = (lambda s: s.step(1.0)) if isinstance(whole, ReduceLROnPlateau) else lambda s: s.step()
    for _ in range(3):
        feed(whole)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        feed(whole)
        feed(resumed)
    assert resumed.get_last_lr() == whole.get_last_lr()


@pytest.mark.parametrize(("kind", "norm"), [(2.0, 13.0), (1.0, 19.0), (inf, 12.0)])
def test_clip_scales_all_gradients_to_the_norm(kind: float, norm: float) -> None:
    a, b, c = leaf(0.0, 0.0), leaf(0.0), leaf(0.0)
    a.grad, b.grad = Tensor(np.array([3.0, -4.0])), Tensor(np.array([12.0]))
    assert clip_grad_norm_([a, b, c], norm, kind) == pytest.approx(norm)
    np.testing.assert_array_equal(a.grad.data, [3, -4])
    assert clip_grad_norm_([a, b, c], norm / 2, kind) == pytest.approx(norm)
    np.testing.assert_allclose([*a.grad.data, *b.grad.data], [1.5, -2, 6])


def test_clip_takes_given_gradients_and_leaves_what_is_not_finite() -> None:
    a = leaf(0.0, 0.0)
    gradients = {a: Tensor(np.array([3.0, 4.0]))}
    assert clip_grad_norm_(a, 1.0, gradients=gradients) == 5.0
    np.testing.assert_allclose(gradients[a].data, [0.6, 0.8])
    gradients = {a: Tensor(np.array([np.inf, 4.0]))}
    assert clip_grad_norm_(a, 1.0, gradients=gradients) == inf
    np.testing.assert_array_equal(gradients[a].data, [np.inf, 4.0])
    assert clip_grad_norm_([], 1.0) == 0.0


@pytest.mark.parametrize(
    ("make", "error", "fact"),
    [
        (lambda o: StepLR(o, 0), ValueError, "step_size=0: it must be at least 1"),
        (lambda o: CosineAnnealingLR(o, 0), ValueError, "T_max=0: it must be at least 1"),
        (lambda o: StepLR(3, 1), TypeError, "cannot schedule int"),  # type: ignore[arg-type]
        (lambda o: ReduceLROnPlateau(3), TypeError, "cannot schedule int"),  # type: ignore[arg-type]
        (lambda o: StepLR(o, 1).load_state_dict({}), ValueError, "a dict with last_epoch"),
        (
            lambda o: ReduceLROnPlateau(o).load_state_dict(StepLR(o, 1).state_dict()),
            ValueError,
            "a dict with best, num_bad_epochs, cooldown_counter",
        ),
        (lambda o: clip_grad_norm_([], -1.0), ValueError, "max_norm=-1.0"),
        (lambda o: clip_grad_norm_([], inf, "x"), TypeError, "norm_type='x'"),  # type: ignore[arg-type]
        (lambda o: clip_grad_norm_([3], 1.0), TypeError, "gradients of int"),  # type: ignore[list-item]
    ],
)
def test_schedule_or_bound_that_makes_no_sense_is_refused(
    make: Any, error: type[Exception], fact: str
) -> None:
    with pytest.raises(error, match=fact):
        make(optimizer())
