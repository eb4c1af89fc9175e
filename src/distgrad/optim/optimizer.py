"""The base of all optimizers: parameter groups, state, and steps in one or two phases.

An optimizer is one formula on plain arrays (`Optimizer._update`) and its settings. `step`
runs it on the parameters themselves. `prepare` runs it aside, so that the outcome can
still be given up; `PreparedStep.commit` cannot fail. For contiguous float32 and float64 the
formulas of this package are compiled, each as one pass over the memory (`_updates`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

import numpy as np

from distgrad._core import GradientTable, Tensor
from distgrad.optim._updates import (
    Change,
    Update,
    change_to,
    exchange,
    gather,
    step_aside,
    step_in_place,
)
from distgrad.optim.checks import check_groups

__all__ = [
    "Array",
    "Gradients",
    "Optimizer",
    "Parameters",
    "PreparedStep",
    "Work",
    "as_real",
    "zeros",
]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]
Gradients: TypeAlias = Mapping[Tensor, Tensor] | GradientTable
Work: TypeAlias = tuple[dict[str, Any], list[Tensor], list[Array]]


class Optimizer(ABC):
    """Updates parameters from their gradients.

    Not safe for use by several threads at once.

    Parameters
    ----------
    params
        Tensors that require grad, or dicts with the tensors under ``"params"`` and
        settings that differ from the defaults: one dict a parameter group.
    defaults
        The settings of groups that do not say otherwise.

    Attributes
    ----------
    param_groups
        One dict a group: ``"params"`` and the settings, which may be changed at any time.
    state
        Parameter to what its updates carry from step to step.

    Raises
    ------
    TypeError
        If something other than a tensor or a group is given.
    ValueError
        If there is no parameter, one is given twice, or one does not require grad.
    """

    def __init__(self, params: Parameters, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._changes: dict[Tensor, Change] = {}  # memory of `prepare`
        self._checked: dict[int, tuple[Any, ...]] = {}  # settings that make sense, by group
        for group in _as_groups(params):
            self.add_param_group(group)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Whose formula is another one must not run the kernel of the class above.
        if "_update" in vars(cls) and "_fused" not in vars(cls):
            cls._fused = Optimizer._fused  # type: ignore[method-assign]

    def _fused(self, group: dict[str, Any]) -> Update | None:
        """Return the compiled form of `_update` with the settings of a group, if there is one."""
        return None

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if settings of a group make no sense."""
        return

    @abstractmethod
    def _update(
        self, data: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update one parameter.

        Parameters
        ----------
        data
            The parameter's values, with at least one axis, to be written in place.
        gradient
            Of the same shape and dtype; read only.
        state
            Of this parameter, empty before the first step; to be brought up to date.
        group
            The settings.
        """

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters with settings of their own.

        Parameters
        ----------
        group
            The tensors under ``"params"``, and settings.
        """
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        group = {**self.defaults, **group, "params": list(params)}
        self._check(group)
        known = {id(param) for other in self.param_groups for param in other["params"]}
        for param in group["params"]:
            _check_parameter(param, known)
        self.param_groups.append(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget ``.grad`` of all parameters, or fill it with zeros."""
        for param in self._parameters():
            if set_to_none or param.grad is None:
                param.grad = None
            else:
                param.grad.data[...] = 0

    def step(self, gradients: Gradients | None = None) -> None:
        """Update every parameter that has a gradient.

        Parameters
        ----------
        gradients
            Parameter to gradient, as `distgrad.autograd.get_gradients` returns it; other
            tensors in it are ignored. None takes ``.grad``.

        Raises
        ------
        ValueError, TypeError
            If a gradient has another shape than its parameter or cannot become of its dtype,
            a parameter cannot be written, or a setting was changed to one that makes no
            sense. No parameter was changed then.
        """
        for group, params, arrays in self.gather(gradients, in_place=True):
            for i in step_in_place(self._fused(group), params, arrays, self.state):
                data, state = params[i].data, self.state.setdefault(params[i], {})
                self._update(np.atleast_1d(data), np.atleast_1d(arrays[i]), state, group)
                params[i].data = data  # the same memory: graphs that saved the old values notice

    def gather(self, gradients: Gradients | None = None, *, in_place: bool = False) -> list[Work]:
        """Find what there is to do in a step, and check it, before anything is written.

        Parameters
        ----------
        gradients
            As for `step`.
        in_place
            Whether the parameters themselves are to be written.

        Returns
        -------
        list
            Of each group: its settings, the parameters that have gradients, those gradients.
        """
        work: list[Work] = []
        number = 0
        for group in self.param_groups:
            self._check_changed(group, len(work))
            work.append((group, *gather(group["params"], gradients, number, in_place)))
            number += len(group["params"])
        return work

    def _check_changed(self, group: dict[str, Any], number: int) -> None:
        """Check a group in which another object was set since it was checked last."""
        settings = tuple(group.values())
        checked = self._checked.get(number, ())
        if len(checked) != len(settings) or not all(map(is_, checked, settings)):
            self._check(group)
            self._checked[number] = settings

    def change_settings(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Take over new settings of the groups, all of them or, if one makes no sense, none."""
        changed = [{**g, **new} for g, new in zip(self.param_groups, settings, strict=True)]
        for number, group in enumerate(changed):
            self._check_changed(group, number)
        for group, new in zip(self.param_groups, settings, strict=True):
            group.update(new)

    def prepare(self, gradients: Gradients | None = None) -> PreparedStep:
        """Compute a step without applying it; everything that can fail fails here.

        The new values are written beside the old ones, into memory that the optimizer keeps
        for the next step, unless somebody else holds it.

        Parameters
        ----------
        gradients
            As for `step`.

        Returns
        -------
        PreparedStep
            The new values. The parameters must not change before it is committed.
        """
        return self.prepare_gathered(self.gather(gradients))

    def prepare_gathered(self, work: Iterable[Work]) -> PreparedStep:
        """Do the same with what `gather` found."""
        changes: list[Change] = []
        for group, params, arrays in work:
            left = step_aside(
                self._fused(group), params, arrays, self.state, self._changes, changes
            )
            for i in left:
                data, state = params[i].data.copy(), deepcopy(self.state.get(params[i], {}))
                self._update(np.atleast_1d(data), np.atleast_1d(arrays[i]), state, group)
                changes.append(change_to(params[i], data, state))
        return PreparedStep(self, changes)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, with parameters by their position.

        Returns
        -------
        dict
            ``"state"``: position to state; ``"param_groups"``: the groups, with positions
            under ``"params"``.
        """
        positions = {id(param): i for i, param in enumerate(self._parameters())}
        groups = [
            {**group, "params": [positions[id(param)] for param in group["params"]]}
            for group in self.param_groups
        ]
        state = {positions[id(param)]: deepcopy(kept) for param, kept in self.state.items()}
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings and state from `state_dict` of an optimizer like this one.

        Raises
        ------
        TypeError, ValueError
            See `check_state_dict`. Nothing was changed then.
        """
        self.check_state_dict(state_dict)
        for own, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({**deepcopy(loaded), "params": own["params"]})
        params = list(self._parameters())
        self.state = {params[i]: deepcopy(kept) for i, kept in dict(state_dict["state"]).items()}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise what `load_state_dict` would, and change nothing.

        Raises
        ------
        TypeError
            If it is no state of an optimizer.
        ValueError
            If the groups, their numbers of parameters or the names of their settings
            differ, or a setting makes no sense.
        """
        try:
            groups, states = state_dict["param_groups"], dict(state_dict["state"])
            found = [len(group["params"]) for group in groups]
        except (KeyError, TypeError, ValueError):
            raise TypeError(
                "cannot load the state of an optimizer: expected what state_dict() returns"
            ) from None
        sizes = [len(group["params"]) for group in self.param_groups]
        if found != sizes:
            raise ValueError(
                "cannot load the state of an optimizer: its parameter groups differ from "
                f"those here, which have {sizes} parameters"
            )
        for number, group in enumerate(groups):
            if missing := sorted(self.defaults.keys() - group.keys()):
                raise ValueError(
                    f"cannot load the state of an optimizer: its group {number} has no "
                    f"{', '.join(missing)}; it is not of {type(self).__name__}"
                )
            self._check(group)
        params = list(self._parameters())
        if strange := [i for i in states if i not in range(len(params))]:
            raise ValueError(
                f"cannot load the state of an optimizer: there is no parameter {strange[0]!r}"
            )
        if self._fused(self.param_groups[0]) is not None:  # else only `_update` knows what fits
            for i, state in states.items():
                _check_state(state, i, params[i])

    def _parameters(self) -> Iterable[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def __repr__(self) -> str:
        lines = [
            ", ".join(f"{key}={value!r}" for key, value in group.items() if key != "params")
            + f", {len(group['params'])} parameters"
            for group in self.param_groups
        ]
        return f"{type(self).__name__}({'; '.join(lines)})"


@dataclass(slots=True)
class PreparedStep:
    """New values of parameters and their state, computed and not applied."""

    optimizer: Optimizer
    changes: list[Change]

    def commit(self) -> None:
        """Put the new values in the place of the old ones.

        Arrays are exchanged, not written: who reads a parameter at this moment sees all
        of the old values or all of the new ones.
        """
        exchange(self.changes, self.optimizer.state)


def as_real(array: Array) -> Array:
    """Return a real view of a complex array, with a last axis for the two parts."""
    return array[..., None].view(array.real.dtype) if np.iscomplexobj(array) else array


def zeros(state: dict[str, Any], name: str, like: Array) -> Array:
    """Return an array of the state, made of zeros before the first step."""
    if name not in state:
        state[name] = np.zeros_like(like)
    array: Array = state[name]
    return array


def _as_groups(params: Parameters) -> list[dict[str, Any]]:
    if isinstance(params, Tensor):
        raise TypeError("cannot optimize one tensor by itself: pass a list of tensors")
    try:
        entries: list[Any] = list(params)
    except TypeError:
        raise TypeError(
            f"cannot optimize {type(params).__name__}: pass a list of tensors or of groups"
        ) from None
    if not entries:
        raise ValueError("cannot make an optimizer: there are no parameters")
    if not isinstance(entries[0], dict):
        return [{"params": entries}]
    check_groups(entries)
    return entries


def _check_state(state: Mapping[str, Any], number: int, param: Tensor) -> None:
    sizes = (param.data.size, as_real(param.data).size)
    for name, value in state.items():
        if isinstance(value, np.ndarray) and value.size not in sizes:
            raise ValueError(
                f"cannot load the state of an optimizer: {name} of parameter {number} has shape "
                f"{value.shape}, the parameter {param.shape}"
            )


def _check_parameter(param: Any, known: set[int]) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"cannot optimize {type(param).__name__}: parameters are tensors")
    if not (param.is_leaf and param.requires_grad):
        raise ValueError("cannot optimize a tensor: it is no leaf that requires grad")
    if id(param) in known:
        raise ValueError("cannot optimize a tensor twice: it is in a parameter group already")
    known.add(id(param))
