"""One optimizer over parameters of many workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from math import inf, sqrt
from operator import index
from typing import Any

from distgrad import autograd
from distgrad.errors import DistgradError
from distgrad.message import StepPrepare
from distgrad.optim.checks import check_at_least, check_groups
from distgrad.optim.optimizer import Optimizer
from distgrad.optim.part import OptimizerPart
from distgrad.optim.steps import HOGWILD, TRY, WAIT, StepTable
from distgrad.rpc import UNSET_RPC_TIMEOUT, Future, current_worker, remote
from distgrad.rpc.calls import allowed_timeout
from distgrad.rpc.exposure import name_of
from distgrad.rref import RRef

__all__ = ["DistributedOptimizer"]


class DistributedOptimizer:
    """Updates parameters where they live, from the gradients of an autograd context.

    Each owner of parameters gets one optimizer. A step changes all parameters on all
    owners that live, or none: the owners first compute the new values aside, and apply them
    only after all have succeeded. Steps of several optimizers over the same parameters, from
    any workers, are applied one after another, parameter by parameter.

    Parameters
    ----------
    optimizer_class
        A class of `distgrad.optim`, or an own `Optimizer` that all owners expose.
    params_rref
        RRefs to leaf tensors, on any workers; or dicts with RRefs under ``"params"`` and
        settings, one a parameter group.
    hogwild
        Do without all that: every owner steps at once, in place, whatever others do to the
        parameters meanwhile and whether or not the other owners can.
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
        hogwild: bool = False,
        **kwargs: Any,
    ) -> None:
        groups = _as_groups(params_rref)
        self._worker = current_worker()
        self._steps: StepTable = self._worker.extensions["optim"]
        self._number = self._worker.agent.new_id()
        self._steps.coordinated[self._number] = self
        self._stepping = threading.Lock()  # one step at a time
        self._hogwild = hogwild
        owners = sorted({rref.owner() for group in groups for rref in group["params"]}, key=_id)
        self._num_groups = len(groups)
        self._owners = {owner.name: owner.id for owner in owners}
        others = [owner.id for owner in owners if owner.id != self._worker.id]
        self._line = (self._worker.id, *others)
        name = name_of(optimizer_class)
        self._parts = {
            owner.name: remote(
                owner, OptimizerPart, (self._number, name, _only(groups, owner.id), args, kwargs)
            )
            for owner in owners
        }
        settings = self._ask_all("make an optimizer", "settings")
        self.param_groups: list[dict[str, Any]] = [
            {**settings[owners[0].name][i], "params": group["params"]}
            for i, group in enumerate(groups)
        ]

    def step(self, context_id: int) -> None:
        """Apply the gradients of a context, on all owners or on none.

        Parameters that got no gradient in the context stay as they are. What this worker asks
        an owner afterwards finds the new values; other workers find them as soon as the owner
        knows that all have succeeded, see `wait`.

        Parameters
        ----------
        context_id
            A context that this worker knows and that is not finished.

        Raises
        ------
        ContextError
            If it is not.
        DistgradError
            If an owner failed or is lost; names it, and its cause is the original exception.
            No parameter was changed anywhere, unless ``hogwild`` was asked for.
        """
        number = _context(context_id)
        with self._stepping:
            if self._hogwild:
                self._step_at_once(number)
            elif len(self._owners) == 1 or not self._attempt(number, TRY):
                self._attempt(number, WAIT)

    def wait(self) -> None:
        """Wait until every owner has applied the steps that were made so far.

        Raises
        ------
        DistgradError
            If an owner is lost; names it.
        """
        self._ask_all("wait", "settings")

    def clip_grad_norm_(self, context_id: int, max_norm: float) -> float:
        """Scale the gradients of a context down to a norm, over all parameters together.

        Returns
        -------
        float
            The Euclidean norm before. If it is not finite, the gradients stay as they are.

        Raises
        ------
        ContextError
            If this worker does not know the context, or it is finished.
        """
        check_at_least(0, max_norm=max_norm)
        number = _context(context_id)
        squares = self._ask_all("clip", "square_of_gradients", number)
        norm = sqrt(sum(squares.values()))
        if max_norm < norm < inf:
            self._ask_all("clip", "scale_gradients", number, max_norm / norm)
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
        DistgradError
            If an owner cannot load its part, or is lost; names it. Nothing was changed
            anywhere then, unless the owner was lost after all had found that they can.
        """
        if not isinstance(state_dict, dict) or state_dict.keys() != self._parts.keys():
            found = sorted(state_dict) if isinstance(state_dict, dict) else type(state_dict)
            raise ValueError(
                f"cannot load the state of a distributed optimizer: it is of {found}, "
                f"the parameters here live on {sorted(self._parts)}"
            )
        with self._stepping:
            staged = {o: self._ask(o, "stage_state", s) for o, s in state_dict.items()}
            fit = not _failures(staged)
            settled = {o: self._ask(o, "settle_state", fit) for o in self._parts}
            _gather("load the state", staged)
            _gather("load the state", settled)
        for group, loaded in zip(
            self.param_groups, next(iter(state_dict.values()))["param_groups"], strict=True
        ):
            group.update({k: v for k, v in loaded.items() if k != "params"})

    # --- a step ----------------------------------------------------------------------------

    def _attempt(self, context_id: int, mode: int) -> bool:
        """Prepare a step on all owners, and decide; False if another step was in the way."""
        step, prepared = self._worker.agent.new_id(), False
        self._steps.begin(step, self._number, self._line)
        try:
            prepare = self._prepare_in_turn if mode == WAIT else self._prepare_at_once
            answers = prepare(self._requests(step, context_id, mode))
            self._raise_failure(answers, "so no parameter was changed anywhere")
            prepared = all(answer.result() for answer in answers.values())
        finally:
            # From here on the step has happened, or not, whoever is lost (docs/protocol/step.md).
            self._steps.decide(step, prepared)
            for owner in self._line[1:]:
                self._steps.tell(owner, step, prepared)
        return prepared

    def _prepare_at_once(self, request: Callable[[str], Future]) -> dict[str, Future]:
        """Ask all owners in parallel; this worker does its own part meanwhile."""
        here = [owner for owner, worker in self._owners.items() if worker == self._worker.id]
        order = [owner for owner in self._owners if owner not in here] + here
        return {owner: request(owner) for owner in order}

    def _prepare_in_turn(self, request: Callable[[str], Future]) -> dict[str, Future]:
        """Ask one owner after another, in the order in which all steps take turns.

        A step waits only for steps that wait for nobody before it, so none waits for ever.
        """
        answers = {}
        for owner in self._owners:
            answers[owner] = request(owner)
            if answers[owner].exception() is not None:
                break
        return answers

    def _step_at_once(self, context_id: int) -> None:
        step = self._worker.agent.new_id()
        answers = self._prepare_at_once(self._requests(step, context_id, HOGWILD))
        self._raise_failure(answers, "and others may have stepped")

    def _requests(self, step: int, context_id: int, mode: int) -> Callable[[str], Future]:
        """Return what asks an owner to prepare; its future fails also if it cannot be asked."""
        settings = tuple(
            {k: v for k, v in group.items() if k != "params"} for group in self.param_groups
        )
        if len(settings) != self._num_groups:
            raise ValueError(
                f"cannot step: param_groups has {len(settings)} groups, "
                f"it had {self._num_groups} when the optimizer was made"
            )
        timeout = allowed_timeout(self._worker, UNSET_RPC_TIMEOUT, "a step")
        body = StepPrepare(step, self._number, self._line, context_id, settings, mode)

        def request(owner: str) -> Future:
            try:
                if self._owners[owner] != self._worker.id:
                    return self._worker.request(
                        self._owners[owner], body, timeout=timeout, what="a step of an optimizer"
                    )
                done = self._steps.prepare(step, self._number, context_id, settings, mode)
            except Exception as error:
                failed = Future(agent=self._worker.agent)
                failed.set_exception(error)
                return failed
            if not isinstance(done, Future):
                answer = Future(agent=self._worker.agent)
                answer.set_result(done)
                return answer
            return done

        return request

    def _raise_failure(self, answers: dict[str, Future], consequence: str) -> None:
        for owner, error in _failures(answers).items():
            raise DistgradError(
                f"cannot step: the optimizer on worker {owner!r} failed, {consequence}: {error}"
            ) from error

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


def _failures(answers: dict[str, Future]) -> dict[str, BaseException]:
    """Wait for all answers; return the failures by owner."""
    outcomes = {owner: answer.exception() for owner, answer in answers.items()}
    return {owner: error for owner, error in outcomes.items() if error is not None}


def _gather(purpose: str, answers: dict[str, Future]) -> dict[str, Any]:
    for owner, error in _failures(answers).items():
        raise DistgradError(f"cannot {purpose} on worker {owner!r}: {error}") from error
    return {owner: answer.result() for owner, answer in answers.items()}


def _as_groups(params: Sequence[RRef] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(params, Iterable):
        raise TypeError(
            f"cannot optimize {type(params).__name__}: pass a list of RRefs or of groups"
        )
    entries: list[Any] = list(params)
    groups: list[Any] = [{"params": entries}]
    if entries and isinstance(entries[0], dict):
        check_groups(entries)
        groups = [{**group, "params": _as_list(group["params"])} for group in entries]
    rrefs = [rref for group in groups for rref in group["params"]]
    for rref in rrefs:
        if not isinstance(rref, RRef):
            raise TypeError(f"cannot optimize {type(rref).__name__}: parameters are RRefs")
    if not rrefs:
        raise ValueError("cannot make a distributed optimizer: there are no parameters")
    return groups


def _as_list(params: Any) -> list[Any]:
    return list(params) if isinstance(params, Iterable) else [params]


def _context(context_id: int) -> int:
    """Return the number of a context that this worker knows."""
    try:
        number = index(context_id)
    except TypeError:
        raise TypeError(
            f"cannot find an autograd context: {context_id!r} is no id of one"
        ) from None
    autograd.retrieve_context(number)
    return number


def _only(groups: list[dict[str, Any]], owner: int) -> list[dict[str, Any]]:
    """Return the groups with the parameters of one owner; they keep their positions."""
    return [
        {**group, "params": [rref for rref in group["params"] if rref.owner().id == owner]}
        for group in groups
    ]


def _id(info: Any) -> int:
    identifier: int = info.id
    return identifier
