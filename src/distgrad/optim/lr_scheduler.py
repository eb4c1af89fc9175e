"""Learning rates that change from step to step.

A scheduler sets the settings in ``optimizer.param_groups``, so it serves local and
distributed optimizers alike. Several may drive one optimizer, as in torch: `StepLR`,
`CosineAnnealingLR` and `ReduceLROnPlateau` change the rate that they find, and so act on top of
each other; `LambdaLR` and `OneCycleLR` compute it from the start, and replace what others set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from math import cos, inf, pi
from typing import Any, Protocol

from distgrad.optim.checks import check_at_least

__all__ = [
    "CosineAnnealingLR",
    "LRScheduler",
    "LambdaLR",
    "OneCycleLR",
    "ReduceLROnPlateau",
    "StepLR",
]


class HasGroups(Protocol):
    """Anything with parameter groups."""

    param_groups: list[dict[str, Any]]


class _Schedule:
    """What all have in common: an optimizer, and a state."""

    _state: tuple[str, ...]  # attributes that say where it stands

    def __init__(self, optimizer: HasGroups) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"cannot schedule {type(optimizer).__name__}: it has no param_groups")
        self.optimizer = optimizer

    def get_last_lr(self) -> list[float]:
        """Return the rates that are set now."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return where the scheduler stands; the rates are in the optimizer's state."""
        return {name: copy(getattr(self, name)) for name in self._state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another scheduler stood, with the optimizer's state as it was then.

        Raises
        ------
        ValueError
            If it was of another kind.
        """
        if not isinstance(state_dict, dict) or state_dict.keys() != set(self._state):
            raise ValueError(
                f"cannot load the state of a {type(self).__name__}: expected a dict with "
                f"{', '.join(self._state)}"
            )
        for name, value in state_dict.items():
            setattr(self, name, copy(value))


class LRScheduler(_Schedule, ABC):
    """Sets the learning rates of an optimizer, now and at every `step`.

    Parameters
    ----------
    optimizer
        Whose ``param_groups`` are set.
    last_epoch
        -1 for a fresh start. To go on without the state of the scheduler before: its
        ``last_epoch``, with ``initial_lr`` in every group as that one left it.

    Raises
    ------
    ValueError
        If a group has no ``initial_lr`` to go on from.
    """

    _state = ("last_epoch", "base_lrs")

    def __init__(self, optimizer: HasGroups, last_epoch: int = -1) -> None:
        super().__init__(optimizer)
        self.last_epoch = last_epoch + 1
        for number, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise ValueError(
                    f"cannot go on at last_epoch={last_epoch}: parameter group {number} has no "
                    "initial_lr"
                )
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._apply(first=True)

    @abstractmethod
    def _settings(self, epoch: int, group: int, first: bool) -> dict[str, Any]:
        """Return what a group has after ``epoch`` steps, at least its ``lr``.

        ``first`` tells that the scheduler is made: a rate that was found is the one to keep.
        """

    def step(self) -> None:
        """Go on by one; call it after the optimizer's step."""
        self.last_epoch += 1
        self._apply(first=False)

    def _apply(self, first: bool) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            group.update(self._settings(self.last_epoch, number, first))


class LambdaLR(LRScheduler):
    """Multiplies the first rate by a function of the number of steps.

    Parameters
    ----------
    optimizer
        Whose rates are set.
    lr_lambda
        One function, or one a group.
    last_epoch
        See `LRScheduler`.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        n = len(optimizer.param_groups)
        self.lr_lambdas = [lr_lambda] * n if callable(lr_lambda) else list(lr_lambda)
        if len(self.lr_lambdas) != n:
            raise ValueError(
                f"cannot schedule {n} parameter groups: {len(self.lr_lambdas)} functions were given"
            )
        super().__init__(optimizer, last_epoch)

    def _settings(self, epoch: int, group: int, first: bool) -> dict[str, Any]:
        return {"lr": self.base_lrs[group] * self.lr_lambdas[group](epoch)}


class StepLR(LRScheduler):
    """Multiplies the rate by ``gamma`` every ``step_size`` steps."""

    def __init__(
        self, optimizer: HasGroups, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        check_at_least(1, step_size=step_size)
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch)

    def _settings(self, epoch: int, group: int, first: bool) -> dict[str, Any]:
        falls = epoch > 0 and epoch % self.step_size == 0
        return {"lr": self.optimizer.param_groups[group]["lr"] * (self.gamma if falls else 1)}


class CosineAnnealingLR(LRScheduler):
    """Lowers the rate to ``eta_min`` along half a cosine of ``T_max`` steps, and back."""

    def __init__(
        self, optimizer: HasGroups, T_max: int, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        check_at_least(1, T_max=T_max)
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, last_epoch)

    def _settings(self, epoch: int, group: int, first: bool) -> dict[str, Any]:
        rate, low, turn = self.optimizer.param_groups[group]["lr"], self.eta_min, pi / self.T_max
        if first:
            return {"lr": rate}
        if (epoch - 1 - self.T_max) % (2 * self.T_max) == 0:  # from the bottom, where all is lost
            return {"lr": rate + (self.base_lrs[group] - low) * (1 - cos(turn)) / 2}
        change = (1 + cos(turn * epoch)) / (1 + cos(turn * (epoch - 1)))
        return {"lr": low + (rate - low) * change}


class OneCycleLR(LRScheduler):
    """Raises the rate to ``max_lr`` and lowers it far below the start (Smith, 2018).

    Momentum, or the first beta of the Adam family, runs the other way.

    Parameters
    ----------
    optimizer
        Whose settings are set.
    max_lr
        The peak: one, or one a group.
    total_steps
        Length of the cycle; or given by ``epochs`` and ``steps_per_epoch``.
    pct_start
        The part of the cycle that rises.
    anneal_strategy
        ``"cos"`` or ``"linear"``.
    cycle_momentum, base_momentum, max_momentum
        Whether and between which values the momentum runs: one each, or one a group.
    div_factor, final_div_factor
        ``max_lr / div_factor`` is the start, and that over ``final_div_factor`` the end.
    three_phase
        Fall to the start as long as the rise took, and to the end in the rest of the cycle.
    last_epoch
        See `LRScheduler`.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        total = total_steps if total_steps is not None else (epochs or 0) * (steps_per_epoch or 0)
        if total < 1 or not 0 <= pct_start <= 1:
            raise ValueError(
                f"cannot make a cycle of {total} steps that rises for {pct_start!r} of them"
            )
        if anneal_strategy not in _ANNEAL:
            raise ValueError(f"cannot anneal by {anneal_strategy!r}: expected 'cos' or 'linear'")
        self._anneal = _ANNEAL[anneal_strategy]
        self.total_steps = total
        n = len(optimizer.param_groups)
        self._max_lrs = _each(max_lr, n)
        self._momenta = list(zip(_each(max_momentum, n), _each(base_momentum, n), strict=True))
        self._cycle_momentum = cycle_momentum
        self._div_factor, self._final_div_factor = div_factor, final_div_factor
        rise = pct_start * total
        self._turns = [rise - 1, 2 * rise - 2, total - 1] if three_phase else [rise - 1, total - 1]
        if last_epoch == -1:
            for group, highest in zip(optimizer.param_groups, self._max_lrs, strict=True):
                group["initial_lr"] = highest / div_factor
        super().__init__(optimizer, last_epoch)

    def _settings(self, epoch: int, group: int, first: bool) -> dict[str, Any]:
        if epoch > self.total_steps:
            raise ValueError(f"cannot step: the cycle of {self.total_steps} steps is over")
        highest = self._max_lrs[group]
        start = highest / self._div_factor
        settings = {"lr": self._between(epoch, start, highest, start / self._final_div_factor)}
        if self._cycle_momentum:
            high, low = self._momenta[group]
            settings |= self._with_momentum(group, self._between(epoch, high, low, high))
        return settings

    def _between(self, epoch: int, start: float, peak: float, end: float) -> float:
        """Return the value on the way from start to peak, perhaps to start again, and to end."""
        stops = [start, peak, *([start] if len(self._turns) == 3 else []), end]
        since, phase = 0.0, 0
        while epoch > self._turns[phase] and phase < len(self._turns) - 1:
            since, phase = self._turns[phase], phase + 1
        length = self._turns[phase] - since
        return self._anneal(
            stops[phase], stops[phase + 1], (epoch - since) / length if length else 1
        )

    def _with_momentum(self, group: int, momentum: float) -> dict[str, Any]:
        settings = self.optimizer.param_groups[group]
        if "betas" in settings:
            return {"betas": (momentum, *settings["betas"][1:])}
        if "momentum" not in settings:
            raise ValueError(
                "cannot cycle the momentum: the optimizer has none; pass cycle_momentum=False"
            )
        return {"momentum": momentum}


class ReduceLROnPlateau(_Schedule):
    """Lowers the rate when a measured value stops improving.

    Parameters
    ----------
    optimizer
        Whose rates are set.
    mode
        ``"min"`` if lower is better, or ``"max"``.
    factor
        What the rate is multiplied with.
    patience
        How many steps without improvement are borne.
    threshold, threshold_mode
        What counts as improvement: a part of the best value (``"rel"``) or a difference
        to it (``"abs"``).
    cooldown
        How many steps after a reduction do not count.
    min_lr
        The lowest rate: one, or one a group.
    eps
        Smaller changes of the rate are not made.
    """

    _state = ("best", "num_bad_epochs", "cooldown_counter")

    def __init__(
        self,
        optimizer: HasGroups,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= factor < 1:
            raise ValueError(f"cannot use factor={factor!r}: it must be in [0, 1)")
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ValueError(f"cannot use mode={mode!r} with threshold_mode={threshold_mode!r}")
        super().__init__(optimizer)
        self.factor, self.patience, self.cooldown = factor, patience, cooldown
        self.min_lrs, self.eps = _each(min_lr, len(optimizer.param_groups)), eps
        self._sign = 1.0 if mode == "min" else -1.0
        self._threshold, self._relative = threshold, threshold_mode == "rel"
        self.best = inf  # in the sense of "min"
        self.num_bad_epochs = 0
        self.cooldown_counter = 0

    def step(self, metrics: float) -> None:
        """Take in a value that was measured."""
        value = self._sign * float(metrics)
        if self._is_better(value):
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce()
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0

    def _is_better(self, value: float) -> bool:
        if self.best == inf:
            return value < inf
        margin = abs(self.best) * self._threshold if self._relative else self._threshold
        return value < self.best - margin

    def _reduce(self) -> None:
        for group, least in zip(self.optimizer.param_groups, self.min_lrs, strict=True):
            lowered = max(group["lr"] * self.factor, least)
            if group["lr"] - lowered > self.eps:
                group["lr"] = lowered


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + cos(pi * part)) / 2


def _line(start: float, end: float, part: float) -> float:
    return start + (end - start) * part


_ANNEAL = {"cos": _cosine, "linear": _line}


def _each(value: float | Sequence[float], n: int) -> list[float]:
    """Return one value for each of ``n`` groups."""
    values = [float(value)] * n if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != n:
        raise ValueError(f"cannot schedule {n} parameter groups: {len(values)} values were given")
    return values
