"""A world of workers on a virtual network, for the passes of distributed autograd.

The workers are real `Part`s; programs, threads and the network are simulated in one thread.
A seeded scheduler picks the next thing to happen: a message arrives, a call is decoded, a
thread takes up the events of a pass, a program goes on, a call times out, a worker dies. The
network keeps the order of the messages from one worker to another and promises nothing more.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from integer_graph import IntegerTask, Value, Vertex, combine, leaf, received, send_vertex

from distgrad.autograd.part import Part, Run
from distgrad.autograd.terms import RETAIN, Message, State
from distgrad.errors import WorkerLostError
from distgrad.message import PassAbort, PassBegin, PropagateGradients

Program = Generator["Promise", Any, Any]


class Failed(Exception):
    """What a program sees of a call or pass that failed."""


@dataclass(eq=False)
class Promise:
    """What a program waits for."""

    done: bool = False
    error: str = ""
    value: Any = None
    on_done: list[Callable[[], None]] = field(default_factory=list)

    def settle(self, value: Any = None, error: str = "") -> None:
        if not self.done:
            self.done, self.value, self.error = True, value, error
            for callback in self.on_done:
                callback()


@dataclass(eq=False)
class Call:
    """A call on its way, at its caller."""

    caller: int
    callee: int
    context_id: int
    message_id: int
    promise: Promise


@dataclass(eq=False)
class Pass:
    """A pass as its program sees it."""

    pass_id: int
    context_id: int
    weights: dict[str, int]
    promise: Promise
    gradients: dict[str, int] = field(default_factory=dict)


class Site:
    """One worker: implements `Host` and serves calls."""

    def __init__(self, world: World, worker_id: int) -> None:
        self.world = world
        self.worker_id = worker_id
        self.alive = True
        self.lost: set[int] = set()
        self.parts: dict[int, Part] = {}
        self.released: set[int] = set()
        self.cancelled: set[int] = set()  # ids of calls whose caller gave up
        self.calls: dict[int, Call] = {}
        self.stored: dict[int, list[Value]] = {}  # by context: what earlier calls left here
        self.counter = worker_id << 48

    def new_id(self) -> int:
        self.counter += 1
        return self.counter

    # --- Host --------------------------------------------------------------------------

    def post(self, part: Part, to: int, message: Message) -> None:
        self.world.count(message)
        self.send(to, "pass", part.context_id, message)

    def schedule(self, part: Part, run: Run) -> None:
        self.world.drains.append((self, part, run))

    def build(self, part: Part, run: Run, sends: Iterable[Vertex]) -> IntegerTask:
        table = self.world.passes[run.pass_id].gradients
        return IntegerTask(run.roots, sends, bool(run.flags & RETAIN), table)

    def missing(self, context_id: int) -> Exception:
        return LookupError("released")

    def foreign(self, part: Part, node: Any) -> Exception:
        return LookupError("received in another context")

    def describe(self, pass_id: int, error: BaseException, node: str, site: str = "") -> PassAbort:
        return PassAbort(pass_id, node, site, (type(error).__name__, str(error), self.worker_id))

    # --- messages ----------------------------------------------------------------------

    def send(self, to: int, *frame: Any) -> None:
        unreachable = not self.world.sites[to].alive and (to, self.worker_id) not in (
            self.world.channels
        )
        if to in self.lost or unreachable:
            raise WorkerLostError(f"worker {to} is lost")
        self.world.put(self.worker_id, to, frame)

    def receive(self, sender: int, frame: Sequence[Any]) -> None:
        kind, *rest = frame
        getattr(self, f"on_{kind}")(sender, *rest)

    def on_pass(self, sender: int, context_id: int, message: Message) -> None:
        part = self.part(context_id)
        if part is not None and part.receive(sender, message):
            return
        if isinstance(message, PassBegin | PropagateGradients):
            error = LookupError("released")
            self.send(sender, "pass", context_id, self.describe(message.pass_id, error, ""))

    def on_call(self, sender: int, *call: Any) -> None:
        self.world.decodes.append((self, sender, call))

    def on_reply(self, sender: int, call_id: int, context_id: int, message_id: int, values: Any,
                 error: str) -> None:  # fmt: skip
        call = self.calls.pop(call_id, None)
        taken = values if call is not None else []  # a late answer has no tensors
        taken = self.take_in(sender, context_id, message_id, taken)
        if call is None:
            return
        if error:
            self.doubt(call)
        call.promise.settle(taken, error)

    def on_cancel(self, sender: int, call_id: int) -> None:
        self.cancelled.add(call_id)

    def on_cleanup(self, sender: int, context_id: int) -> None:
        if context_id >> 48 != self.worker_id:
            self.release(context_id, sender)

    def on_lost(self, sender: int) -> None:
        self.lost.add(sender)
        error = WorkerLostError(f"worker {sender} is lost")
        for call_id in [i for i, call in self.calls.items() if call.callee == sender]:
            call = self.calls.pop(call_id)
            self.doubt(call)
            call.promise.settle(error="lost")
        for part in list(self.parts.values()):
            part.lose(sender, error)
            self.rejoin(part.context_id)

    # --- contexts ----------------------------------------------------------------------

    def part(self, context_id: int) -> Part | None:
        if context_id == 0 or context_id in self.released or context_id >> 48 in self.lost:
            return None
        if context_id not in self.parts:
            self.parts[context_id] = Part(self, context_id)
            if self.lost:
                self.rejoin(context_id)
        return self.parts.get(context_id)

    def release(self, context_id: int, sender: int = -1, error: Exception | None = None) -> None:
        self.released.add(context_id)
        part = self.parts.pop(context_id, None)
        if part is None:
            return
        part.release(error)
        word = "join" if error else "cleanup"
        for peer in sorted(part.known - {sender, self.worker_id} - self.lost):
            with suppress(WorkerLostError):
                self.send(peer, word, context_id)

    def rejoin(self, context_id: int) -> None:
        """Have the creator tell of the release itself: who would have told may be lost."""
        try:
            if context_id >> 48 != self.worker_id:
                self.send(context_id >> 48, "join", context_id)
        except WorkerLostError as error:
            self.release(context_id, error=error)

    def on_join(self, sender: int, context_id: int) -> None:
        if context_id >> 48 != self.worker_id:
            self.rejoin(context_id)
        elif context_id in self.parts:
            self.parts[context_id].known.add(sender)
        else:
            self.send(sender, "cleanup", context_id)

    def record(self, to: int, context_id: int, values: Sequence[Value]) -> tuple[int, int]:
        """Return what goes into the header: context id and message id."""
        part = self.part(context_id)
        if part is None:
            return 0, 0
        part.known.add(to)
        for end in part.table.ends_for(to):
            self.send(to, "pass", context_id, end)
        if not values:
            return context_id, 0
        message_id = self.new_id()
        part.record_send(send_vertex(values, message_id, to))
        return context_id, message_id

    def take_in(
        self, sender: int, context_id: int, message_id: int, values: Sequence[Value]
    ) -> list[Value]:
        if message_id == 0:
            return [self.leaf_of(value) for value in values]
        vertex, taken = received(values, message_id, sender)
        part = self.part(context_id)
        if part is not None:
            part.record_recv(vertex)
        return taken

    def leaf_of(self, value: Value) -> Value:
        """Return what a tensor is here if no history travelled with it."""
        return leaf(f"copy{self.new_id():x}") if value.weights else combine([])

    def doubt(self, call: Call) -> None:
        part = self.parts.get(call.context_id)
        if part is not None and call.message_id:
            part.doubt_send(call.message_id)

    # --- calls -------------------------------------------------------------------------

    def call(
        self, to: int, context_id: int, values: Sequence[Value], record: bool, depth: int
    ) -> tuple[int, Promise]:
        promise, call_id, message_id = Promise(), self.new_id(), 0
        try:
            context_id, message_id = self.record(to, context_id, values if record else ())
            call = Call(self.worker_id, to, context_id, message_id, promise)
            self.send(to, "call", call_id, context_id, message_id, tuple(values), depth)
            self.calls[call_id] = call
        except WorkerLostError:
            part = self.parts.get(context_id)
            if part is not None:
                part.drop_send(message_id)
            promise.settle(error="lost")
        return call_id, promise

    def give_up(self, call_id: int) -> None:
        """The caller's time is up."""
        call = self.calls.pop(call_id, None)
        if call is not None:
            self.doubt(call)
            self.send(call.callee, "cancel", call_id)
            call.promise.settle(error="timed out")

    def decode(self, sender: int, call: Sequence[Any]) -> None:
        call_id, context_id, message_id, values, depth = call
        if call_id in self.cancelled:
            return
        if self.world.rng.random() < self.world.undecodable:
            self.answer(sender, call_id, context_id, (), "undecodable")
            return
        values = self.take_in(sender, context_id, message_id, values)
        program = self.world.serve(self, context_id, values, depth)

        def reply(result: Sequence[Value], error: str) -> None:
            self.answer(sender, call_id, context_id, result, error)

        self.world.run(self, program, reply)

    def answer(
        self, to: int, call_id: int, context_id: int, values: Sequence[Value], error: str
    ) -> None:
        if to in self.lost:
            return
        values = [v for v in values if v.weights]
        context_id, message_id = self.record(to, context_id, values) if values else (0, 0)
        self.send(to, "reply", call_id, context_id, message_id, tuple(values), error)

    def backward(self, context_id: int, roots: Sequence[Value], retain: bool) -> Pass | None:
        part = self.part(context_id)
        if part is None:
            return None
        weights: Counter[str] = Counter()
        for root in roots:
            weights.update(root.weights)
        mine = Pass(self.new_id(), context_id, dict(weights), Promise())
        self.world.passes[mine.pass_id] = mine

        def done(cause: PassAbort | None) -> None:
            mine.promise.settle(error=str(cause) if cause else "")

        part.start(mine.pass_id, RETAIN if retain else 0, roots, done)
        return mine


class World:
    """Sites, channels and the scheduler."""

    def __init__(self, count: int, seed: int, serve: Callable[..., Program]) -> None:
        self.rng = random.Random(seed)
        self.serve = serve
        self.sites = [Site(self, number) for number in range(count)]
        self.channels: dict[tuple[int, int], deque[Any]] = {}
        self.decodes: list[tuple[Site, int, Any]] = []
        self.drains: list[tuple[Site, Part, Run]] = []
        self.runnable: list[Callable[[], None]] = []
        self.timeouts: list[tuple[Site, int]] = []
        self.passes: dict[int, Pass] = {}
        self.messages: Counter[str] = Counter()
        self.programs: dict[Any, Site] = {}  # that have not ended
        self.cuts = 0
        self.filled: list[tuple[int, int]] = []  # channels with messages under way
        self.acts: tuple[Callable[[Any], object], ...] = (
            self.arrive,
            lambda job: job[0].alive and job[0].decode(*job[1:]),
            lambda job: job[0].alive and job[1].drain(job[2]),
            lambda job: job[0].alive and job[0].give_up(job[1]),
            lambda program: program(),
        )
        self.undecodable = 0.0  # chance of a call
        self.duplicated = 0.0  # chance of a message of a pass

    def count(self, message: Message) -> None:
        self.messages[type(message).__name__] += 1

    def put(self, source: int, target: int, frame: Any) -> None:
        frames = self.channels.setdefault((source, target), deque())
        frames.append(frame)
        if len(frames) == 1:
            self.filled.append((source, target))

    def kill(self, site: Site) -> None:
        """End a worker; of what it sent last, some may be lost."""
        site.alive = False
        me = site.worker_id
        for (source, target), frames in list(self.channels.items()):
            if target == me:
                frames.clear()
                self.channels.setdefault((me, source), deque())  # it sees the connection end too
        for (source, _), frames in self.channels.items():
            if source == me:
                for _ in range(self.rng.randint(0, len(frames))):
                    frames.pop()
                frames.append(("lost",))
        self.filled = [ends for ends, frames in self.channels.items() if frames]

    def cut(self) -> None:
        """Break the connection of two workers that live on; what was under way may be lost."""
        pairs = [ends for ends in self.channels if ends[0] != ends[1]]
        if not pairs:
            return
        self.cuts += 1
        a, b = self.rng.choice(pairs)
        for ends in ((a, b), (b, a)):
            frames = self.channels.setdefault(ends, deque())
            for _ in range(self.rng.randint(0, len(frames))):
                frames.pop()
            frames.append(("lost",))
        self.filled = [ends for ends, frames in self.channels.items() if frames]

    # --- programs ----------------------------------------------------------------------

    def run(
        self, site: Site, program: Program, finish: Callable[[Any, str], None] | None = None
    ) -> None:
        """Run a program on a site; each wait is a step of the scheduler."""
        self.programs[program] = site

        def step(promise: Promise | None = None) -> None:
            if not site.alive:
                return
            try:
                if promise is not None and promise.error:
                    waits_for = program.throw(Failed(promise.error))
                else:
                    waits_for = program.send(promise and promise.value)
            except StopIteration as stop:
                end(stop.value, "")
            except Failed as error:
                end((), str(error))
            else:
                wake = lambda: self.runnable.append(lambda: step(waits_for))  # noqa: E731
                wake() if waits_for.done else waits_for.on_done.append(wake)

        def end(value: Any, error: str) -> None:
            del self.programs[program]
            if finish is not None:
                finish(value, error)

        self.runnable.append(step)

    # --- the scheduler -----------------------------------------------------------------

    def happen(self) -> bool:
        """Let one thing happen, any with the same chance; False if there is nothing left."""
        kinds = (self.filled, self.decodes, self.drains, self.timeouts, self.runnable)
        total = sum(map(len, kinds))
        if not total:
            return False
        chosen = self.rng.randrange(total)
        for todo, act in zip(kinds, self.acts, strict=True):
            if chosen < len(todo):
                todo[chosen], todo[-1] = todo[-1], todo[chosen]  # order is no matter
                act(todo.pop())
                return True
            chosen -= len(todo)
        raise AssertionError("unreachable")

    def arrive(self, ends: tuple[int, int]) -> None:
        source, target = ends
        frames = self.channels[ends]
        frame = frames.popleft()
        if frames:
            self.filled.append(ends)
        site = self.sites[target]
        if not site.alive or (source in site.lost):
            return
        twice = frame[0] == "pass" and self.rng.random() < self.duplicated
        try:
            for _ in range(1 + twice):
                site.receive(source, frame)
        except WorkerLostError:
            return  # an answer to a worker that is gone

    def settle(self, most: int = 1_000_000) -> None:
        """Let everything happen, in random order, until nothing is left."""
        for _ in range(most):
            if not self.happen():
                return
        raise AssertionError("the world does not come to rest")

    def alive(self) -> list[Site]:
        return [site for site in self.sites if site.alive]

    def waiting(self) -> list[int]:
        """Return the live workers whose programs have not ended."""
        return [site.worker_id for site in self.programs.values() if site.alive]

    def unfinished(self) -> list[tuple[int, int, State]]:
        """Return the passes that run on live workers: worker, pass, state."""
        return [
            (site.worker_id, run.pass_id, run.state)
            for site in self.alive()
            for part in site.parts.values()
            for run in part.table.passes.values()
            if run.state is not State.COMPLETE
        ]
