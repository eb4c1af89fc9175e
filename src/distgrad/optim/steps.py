"""The steps of distributed optimizers at one worker: locks, threads and messages around the book.

Invariants
    1. The book and the locks are touched under the lock only; actions are performed after it
       is released.
    2. Requests and decisions are noted by the polling thread, in the order of their arrival.
       What computes runs on serving threads.
    3. A step gives its locks back when it is settled, and is settled once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from distgrad.autograd.api import gradients_here
from distgrad.errors import DistgradError, TransportError
from distgrad.message import StepDecide, StepPrepare, StepQuestion
from distgrad.optim.locks import LockTable
from distgrad.optim.optimizer import PreparedStep
from distgrad.optim.protocol import Action, Answer, Ask, Outcome, Settle, StepBook
from distgrad.rpc import Future, Worker
from distgrad.rpc.activity import Activity, activity

if TYPE_CHECKING:
    from distgrad._codec import Frame
    from distgrad._core import Tensor
    from distgrad.optim.part import OptimizerPart

__all__ = ["HOGWILD", "TRY", "WAIT", "StepTable"]

#: Modes of a request: fail if another step holds a parameter, wait for it, or step at once,
#: in place, whatever others do.
TRY, WAIT, HOGWILD = range(3)


class StepTable:
    """The steps that a worker coordinates or takes part in.

    Parameters
    ----------
    worker
        Whose parameters are written.

    Attributes
    ----------
    parts, coordinated
        The optimizers here, by their ids: parts on owners, and those that this worker made.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._book = StepBook(worker.id)
        self._locks = LockTable()
        self._granted: dict[int, Future] = {}  # waiting step -> future of whether it has its locks
        self._prepared: dict[int, PreparedStep] = {}
        self.parts: WeakValueDictionary[int, OptimizerPart] = WeakValueDictionary()
        self.coordinated: WeakValueDictionary[int, Any] = WeakValueDictionary()
        worker.on_lost.append(lambda peer, reason: self._do(self._book.lose, peer))
        worker.register(StepPrepare, _on_prepare, inline=True)
        worker.register(StepDecide, _on_decide, inline=True)
        worker.register(StepQuestion, _on_question, inline=True)

    def add(self, optimizer: int, part: OptimizerPart) -> None:
        """Take in the part of an optimizer that lives here."""
        with self._lock:
            self._book.forget(lambda known: known in self.parts or known in self.coordinated)
            self.parts[optimizer] = part

    # --- the life of a step -----------------------------------------------------------------

    def begin(self, step: int, optimizer: int, line: tuple[int, ...]) -> bool:
        """Note a step; False if it must not be prepared, because its coordinator is lost."""
        with self._lock:
            return self._book.begin(step, optimizer, line)

    def prepare(
        self, step: int, optimizer: int, context_id: int, settings: Any, mode: int
    ) -> bool | Future:
        """Lock the parameters that have gradients and compute their new values.

        Returns
        -------
        bool or Future
            Whether that is done; false if another step holds a parameter and ``mode`` does
            not allow to wait.
        """
        part = self.parts.get(optimizer)
        if part is None:
            raise DistgradError(
                f"cannot step on worker {self._worker.name!r}: the optimizer was dropped"
            )
        gradients = gradients_here(context_id)
        if mode == HOGWILD:
            part.step(gradients, settings)
            return True
        work = part.gather(gradients)
        compute = partial(self._compute, step, part, work, settings)
        params = [param for _, params, _ in work for param in params]
        granted = self._acquire(step, params, mode == WAIT)
        if isinstance(granted, Future):
            return granted.then(lambda granted: granted.wait() and compute())
        if granted:
            return compute()
        self.decide(step, commit=False)
        return False

    def _acquire(self, step: int, params: Sequence[Tensor], wait: bool) -> bool | Future:
        with self._lock:
            if step not in self._book.steps:
                raise DistgradError(f"cannot prepare step {step:#x}: it was aborted")
            granted = self._locks.acquire(step, params, wait)
            if granted or not wait:
                return granted
            future = self._granted[step] = Future(agent=self._worker.agent)
            return future

    def _compute(self, step: int, part: OptimizerPart, work: Any, settings: Any) -> bool:
        try:
            prepared = part.prepare(work, settings)
        except BaseException:
            self.decide(step, commit=False)
            raise
        with self._lock:
            alive = self._book.prepare(step)
            if alive:
                self._prepared[step] = prepared
        return alive

    def decide(self, step: int, commit: bool) -> None:
        """Apply a step and drop it from the book, or only drop it."""
        self._do(self._book.decide, step, commit)

    def _settle(self, step: int, commit: bool) -> None:
        with self._lock:
            prepared = self._prepared.pop(step, None)
        if commit and prepared is not None:
            prepared.commit()
        with self._lock:
            given_up = self._granted.pop(step, None)
            granted = [self._granted.pop(other) for other in self._locks.release(step)]
        if given_up is not None:
            given_up.set_result(False)
        for future in granted:
            future.set_result(True)

    # --- the book -----------------------------------------------------------------------------

    def _do(self, event: Callable[..., list[Action]], *args: Any) -> None:
        with self._lock:
            actions = event(*args)
        for action in actions:
            match action:
                case Settle(step, commit):
                    self._settle(step, commit)
                case Answer((peer, request_id), outcome):
                    self._worker.agent.reply(peer, request_id, int(outcome))
                case Ask():  # not on this thread: it may have to connect
                    self._worker.submit(partial(self._ask, action))

    def _ask(self, ask: Ask) -> None:
        def answered(answer: Future) -> None:
            if answer.exception() is None:
                self._do(self._book.on_answer, ask.step, ask.to, Outcome(answer.result()))
            else:
                self._do(self._book.lose, ask.to)

        question = StepQuestion(ask.step, ask.optimizer, ask.line)
        try:
            answer = self._worker.request(ask.to, question, timeout=0)
        except TransportError:
            self._do(self._book.lose, ask.to)
        else:
            answer.add_done_callback(answered, inline=True)

    def question(self, peer: int, request_id: int, body: Any) -> None:
        """Answer what another worker asks, now or when it is known."""
        step, optimizer, line = body
        token = (peer, request_id)
        self._do(self._book.on_question, peer, token, step, optimizer, tuple(line))

    def tell(self, to: int, step: int, commit: bool) -> None:
        """Tell an owner what was decided; a lost one need not know."""
        with suppress(TransportError):
            self._worker.post(to, StepDecide(step, commit))

    def debug_info(self) -> dict[str, int]:
        """Return counters; all are 0 while no step is under way."""
        return {"optim.steps": len(self._book.steps), "optim.locks": len(self._locks)}


# --- messages: on the polling thread -----------------------------------------------------------


def _table_of(worker: Worker) -> StepTable:
    table: StepTable = worker.extensions["optim"]
    return table


def _on_prepare(worker: Worker, peer: int, frame: Frame, body: Any) -> Callable[[], None] | None:
    step, optimizer, line, _, _, mode = body
    if mode != HOGWILD and not _table_of(worker).begin(step, optimizer, tuple(line)):
        worker.agent.count_handled()  # nobody waits for the answer
        return None
    return partial(_serve_prepare, worker, peer, frame.request_id, frame.chain, body)


def _serve_prepare(worker: Worker, peer: int, request_id: int, chain: int, body: Any) -> None:
    activity.set(Activity(worker, chain))
    step, optimizer, _, context_id, settings, mode = body
    table, agent = _table_of(worker), worker.agent
    try:
        answer = table.prepare(step, optimizer, context_id, settings, mode)
    except BaseException as error:
        table.decide(step, commit=False)
        agent.reply_error(peer, request_id, error)
        if not isinstance(error, Exception):
            raise
        return
    if not isinstance(answer, Future):
        agent.reply(peer, request_id, answer)
        return

    def completed(answer: Future) -> None:
        if (error := answer.exception()) is None:
            agent.reply(peer, request_id, answer.result())
        else:
            agent.reply_error(peer, request_id, error)

    answer.add_done_callback(completed)


def _on_decide(worker: Worker, peer: int, frame: Frame, body: Any) -> None:
    _table_of(worker).decide(*body)


def _on_question(worker: Worker, peer: int, frame: Frame, body: Any) -> None:
    _table_of(worker).question(peer, frame.request_id, body)
