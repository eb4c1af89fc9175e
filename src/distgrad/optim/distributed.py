"""One optimizer over parameters of many workers."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from distgrad import autograd
from distgrad.errors import DistgradError
from distgrad.optim.optimizer import Optimizer
from distgrad.optim.part import OptimizerPart
from distgrad.rpc import Future, current_worker, remote
from distgrad.rpc.exposure import name_of
from distgrad.rref import RRef

__all__ = ["DistributedOptimizer"]


class DistributedOptimizer:
    """Updates parameters where they live, from the gradients of an autograd context.

    Each owner of parameters gets one optimizer. A step changes all parameters on all
    owners, or none: the owners first compute the new values aside, and apply them only
    after all have succeeded. Steps of several optimizers over the same parameters, from
    any workers, are applied one after another, parameter by parameter.

    Parameters
    ----------
    optimizer_class
        A class of `distgrad.optim`, or an own `Optimizer` that all owners expose.
    params_rref
        RRefs to leaf tensors, on any workers; or dicts with RRefs under ``"params"`` and
        settings, one a parameter group.
    args, kwargs
        Further arguments of the class.

    Attributes
    ----------
    param_groups
        The settings of each group, with its RRefs under ``"params"``. They travel with
        every step, so they may be changed at any time.

    Raises
    ------
    ValueError
        If there are no parameters.
    DistgradError
        If an owner cannot make its optimizer; names the owner.
    """

    def __init__(
        self,
        optimizer_class: type[Optimizer],
        params_rref: Sequence[RRef] | Sequence[dict[str, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        groups = _as_groups(params_rref)
        owners = sorted({rref.owner() for group in groups for rref in group["params"]}, key=_id)
        name = name_of(optimizer_class)
        self._parts = {
            owner.name: remote(owner, OptimizerPart, (name, _only(groups, owner.id), args, kwargs))
            for owner in owners
        }
        settings = self._ask_all("make an optimizer", "settings")
        self.param_groups: list[dict[str, Any]] = [
            {**settings[owners[0].name][i], "params": group["params"]}
            for i, group in enumerate(groups)
        ]

    def step(self, context_id: int) -> None:
        """Apply the gradients of a context, on all owners or on none.

        Parameters that got no gradient in the context stay as they are.

        Parameters
        ----------
        context_id
            A context that this worker knows and that is not finished.

        Raises
        ------
        ContextError
            If it is not.
        DistgradError
            If an owner failed; names it, and its cause is the original exception. No
            parameter was changed, unless an owner was lost or fell silent between the
            phases: then the others have stepped, and the error says so.
        """
        autograd.retrieve_context(context_id)
        step = current_worker().agent.new_id()
        if not self._prepare_at_once(step, context_id):
            step = current_worker().agent.new_id()
            self._prepare_in_turn(step, context_id)
        self._commit(step)

    def clip_grad_norm_(self, context_id: int, max_norm: float) -> float:
        """Scale the gradients of a context down to a norm, over all parameters together.

        Returns
        -------
        float
            The Euclidean norm before.
        """
        squares = self._ask_all("clip", "square_of_gradients", int(context_id))
        norm = sqrt(sum(squares.values()))
        if norm > max_norm:
            self._ask_all("clip", "scale_gradients", int(context_id), max_norm / norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all owners' optimizers, by the owner's name."""
        return self._ask_all("collect the state", "state_dict")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, for the same parameters on the same owners.

        Raises
        ------
        ValueError
            If the owners differ.
        """
        if state_dict.keys() != self._parts.keys():
            raise ValueError(
                f"cannot load the state of a distributed optimizer: it is of {sorted(state_dict)}, "
                f"the parameters here live on {sorted(self._parts)}"
            )
        answers = {o: self._ask(o, "load_state_dict", s) for o, s in state_dict.items()}
        _gather("load the state", answers)
        for group, loaded in zip(
            self.param_groups, next(iter(state_dict.values()))["param_groups"], strict=True
        ):
            group.update({k: v for k, v in loaded.items() if k != "params"})

    # --- the two phases ------------------------------------------------------------------

    def _prepare_at_once(self, step: int, context_id: int) -> bool:
        """Prepare on all owners in parallel; False if another step was in the way of one."""
        settings = self._settings()
        answers = {
            owner: self._ask(owner, "prepare", step, int(context_id), settings, False)
            for owner in self._parts
        }
        prepared = self._prepared_or_abort(step, answers)
        if not all(prepared.values()):
            self._abort(step, [owner for owner, done in prepared.items() if done])
            return False
        return True

    def _prepare_in_turn(self, step: int, context_id: int) -> None:
        """Prepare on one owner after another, in the order in which all steps take turns.

        A step waits only for steps that wait for nobody before it, so none waits for ever.
        """
        settings, answers = self._settings(), {}
        for owner in self._parts:
            answers[owner] = self._ask(owner, "prepare", step, int(context_id), settings, True)
            self._prepared_or_abort(step, answers)

    def _prepared_or_abort(self, step: int, answers: dict[str, Future]) -> dict[str, bool]:
        failures = _failures(answers)
        if failures:
            # An owner that has answered with an error keeps nothing of the step.
            self._abort(step, [o for o in answers if not hasattr(failures.get(o), "workers")])
            owner, error = next(iter(failures.items()))
            raise DistgradError(
                f"cannot step: the optimizer on worker {owner!r} failed, so no parameter was "
                f"changed anywhere: {error}"
            ) from error
        return {owner: answer.result() for owner, answer in answers.items()}

    def _abort(self, step: int, owners: Sequence[str]) -> None:
        answers = {owner: self._ask(owner, "abort", step) for owner in owners}
        _failures(answers)  # only waits: a lost owner has nothing to abort

    def _commit(self, step: int) -> None:
        failures = _failures({owner: self._ask(owner, "commit", step) for owner in self._parts})
        if failures:
            owner, cause = next(iter(failures.items()))
            stepped = sorted(self._parts.keys() - failures.keys())
            raise DistgradError(
                f"cannot finish a step on worker {owner!r}, after all had prepared it: {cause}",
                detail=f"stepped: {', '.join(stepped) or 'none'}",
            ) from cause

    # --- all owners ----------------------------------------------------------------------

    def _ask_all(self, purpose: str, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of all parts at once; return what they answer, by owner."""
        return _gather(purpose, {owner: self._ask(owner, method, *args) for owner in self._parts})

    def _ask(self, owner: str, method: str, *args: Any) -> Future:
        """Call a method of one part; the future fails also if the call cannot be made."""
        try:
            answer: Future = getattr(self._parts[owner].rpc_async(), method)(*args)
        except DistgradError as error:
            answer = Future()
            answer.set_exception(error)
        return answer

    def _settings(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]


def _failures(answers: dict[str, Future]) -> dict[str, BaseException]:
    """Wait for all answers; return the failures by owner."""
    outcomes = {owner: answer.exception() for owner, answer in answers.items()}
    return {owner: error for owner, error in outcomes.items() if error is not None}


def _gather(purpose: str, answers: dict[str, Future]) -> dict[str, Any]:
    for owner, error in _failures(answers).items():
        raise DistgradError(f"cannot {purpose} on worker {owner!r}: {error}") from error
    return {owner: answer.result() for owner, answer in answers.items()}


def _as_groups(params: Sequence[RRef] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = list(params)
    groups: list[Any] = (
        entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    )
    groups = [{**group, "params": list(group["params"])} for group in groups]
    rrefs = [rref for group in groups for rref in group["params"]]
    for rref in rrefs:
        if not isinstance(rref, RRef):
            raise TypeError(f"cannot optimize {type(rref).__name__}: parameters are RRefs")
    if not rrefs:
        raise ValueError("cannot make a distributed optimizer: there are no parameters")
    return groups


def _only(groups: list[dict[str, Any]], owner: int) -> list[dict[str, Any]]:
    """Return the groups with the parameters of one owner; they keep their positions."""
    return [
        {**group, "params": [rref for rref in group["params"] if rref.owner().id == owner]}
        for group in groups
    ]


def _id(info: Any) -> int:
    identifier: int = info.id
    return identifier
