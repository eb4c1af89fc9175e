# cython: annotation_typing=False
"""A worker's part of one autograd context: what it recorded, and its passes as they run.

Threads record messages and bring events at any time. The events of a pass queue up in the
order of arrival and are taken by one thread at a time; whoever queues one for a pass that
nobody is busy with schedules a drain.

Invariants
    1. A recv is in the snapshot of a pass, or the pass is told of it afterwards, or both. So
       it is added first and then looks for passes, without the lock, as sends are.
    2. `Run.busy` is set exactly while a drain is scheduled or running.
    3. No lock is held while the graph runs: hooks and rules may call out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

from distgrad.autograd._lock import Lock
from distgrad.autograd.pass_table import PassTable
from distgrad.autograd.protocol import BackwardPass
from distgrad.autograd.terms import COMPLETE, FAILED, OVER, Boundary, Graph, Message
from distgrad.message import PassAbort

__all__ = ["Host", "Part", "Run"]

Event = tuple[str, tuple[Any, ...]]  # name of a method of the pass, its arguments


class Host(Protocol):
    """What a part needs of its worker."""

    worker_id: int
    lost: Collection[int]  # workers that are gone

    def post(self, part: Part, to: int, message: Message) -> None:
        """Send a message of a pass; raises if the receiver is lost."""

    def schedule(self, part: Part, run: Run) -> None:
        """Have ``run()`` called elsewhere or later, in a fresh `contextvars.Context`."""

    def build(self, part: Any, run: Run, sends: Collection[Any]) -> Graph:
        """Return the graph of a pass."""

    def missing(self, context_id: int) -> Exception:
        """Return the error that says what became of a context."""

    def foreign(self, part: Any, node: Any) -> Exception:
        """Return the error of a pass that leads to a recv of another context."""

    def describe(self, pass_id: int, error: BaseException, node: str, site: str = "") -> PassAbort:
        """Return the message that tells of a failure here.

        ``node`` is the name of the node that failed, ``site`` where it was recorded; or "".
        """


class Run(BackwardPass):
    """A pass with its queue.

    Attributes
    ----------
    part
        Whose pass it is; None until it begins or is scheduled.
    roots
        At the root worker: what the graph starts from.
    done
        At the root worker: called once, with None or the cause of failure.
    busy
        Whether a thread drains the queue or is about to.
    begun
        Whether the snapshot is taken.
    error
        The exception that failed the pass on this worker, if it was here.
    """

    __slots__ = ("begun", "busy", "done", "error", "events", "part", "roots")

    def __init__(self, worker: int, pass_id: int, flags: int) -> None:
        super().__init__(worker, pass_id, flags)
        self.events: list[Event] = []
        self.busy = False
        self.begun = False
        self.roots: Any = ()
        self.done: Callable[[PassAbort | None], None] | None = None
        self.error: BaseException | None = None
        self.part: Part | None = None

    def build(self) -> Graph:
        """Return the graph from the roots of this worker and its sends."""
        part = self.part
        assert part is not None
        return part.host.build(part, self, self._sends.values())

    def foreign(self, node: Boundary) -> Exception:
        """Return the error of a pass that leads to a recv of another context, which it names."""
        part = self.part
        assert part is not None
        error: Exception = part.host.foreign(part, node)
        return error

    def leave(self) -> None:
        """Leave the pass because the context is finished here."""
        part = self.part
        assert part is not None
        if self.state is not OVER and self.state is not FAILED:
            self.error = part.host.missing(part.context_id)
            self.on_released(part.host.describe(self.pass_id, self.error, ""))

    def __call__(self) -> None:
        """Take the events; what `Host.schedule` has called."""
        part = self.part
        assert part is not None
        part.resume(self)


class Part:
    """One context on one worker.

    Parameters
    ----------
    host
        The worker's side.
    context_id
        The context.

    Attributes
    ----------
    sends, recvs
        Recorded nodes by autograd message id.
    known
        Workers that this one sent a message of the context to.
    released
        Whether the context is finished here.
    """

    __slots__ = ("_doubted", "context_id", "host", "known", "lock", "recvs", "released",
                 "sends", "table")  # fmt: skip

    def __init__(self, host: Host, context_id: int) -> None:
        self.host = host
        self.context_id = context_id
        self.lock = Lock()
        self.sends: dict[int, Any] = {}
        self.recvs: dict[int, Any] = {}
        self.known: set[int] = set()
        self.released = False
        self.table = PassTable(host.worker_id, Run)
        self._doubted: set[int] | None = None

    # --- forward -----------------------------------------------------------------------

    def record_send(self, node: Boundary) -> None:
        """Add a message that is about to leave."""
        self.sends[node.message_id] = node

    def record_recv(self, node: Boundary) -> None:
        """Add a message that arrived; passes that have begun answer none for it."""
        self.recvs[node.message_id] = node
        if self.table.passes:
            self.lock.acquire()
            try:
                self._tell_begun("on_recorded", (node.message_id, node.peer))
            finally:
                self.lock.release()

    def drop_send(self, message_id: int) -> None:
        """Take back a message that never left."""
        self.lock.acquire()
        try:
            if self.sends.pop(message_id, None) is not None:
                self._tell_begun("on_undelivered", (message_id,))
        finally:
            self.lock.release()

    def doubt_send(self, message_id: int) -> None:
        """Note that the receiver may never record a message."""
        self.lock.acquire()
        try:
            if message_id in self.sends:
                if self._doubted is None:
                    self._doubted = set()
                self._doubted.add(message_id)
                self._tell_begun("on_uncertain", (message_id,))
        finally:
            self.lock.release()

    # --- passes ------------------------------------------------------------------------

    def start(
        self, pass_id: int, flags: int, roots: Any, done: Callable[[PassAbort | None], None]
    ) -> Run:
        """Make this worker the root of a new pass and run its first sweep on this thread."""
        self.lock.acquire()
        try:
            if self.released:
                raise self.host.missing(self.context_id)
            run: Run = self.table.open(pass_id, flags)
            run.part, run.roots, run.done, run.busy = self, roots, done, True
            ends = self.table.all_ends()
        finally:
            self.lock.release()
        for peer, end in ends:
            self._post(peer, end)
        self.drain(run)
        return run

    def receive(self, sender: int, message: Message) -> bool:
        """Take in a message of a pass, without running the graph; False if released."""
        self.lock.acquire()
        try:
            if self.released:
                return False
            run: Run | None = self.table.route(message)
            if run is not None:
                self._queue(run, "handle", (sender, message))
                return True
            answer = self.table.answer(message)
        finally:
            self.lock.release()
        if answer is not None:
            self._post(sender, answer)
        return True

    def fail(self, run: Run, error: BaseException) -> None:
        """Fail a pass from outside, as when its time is up."""
        cause = self.host.describe(run.pass_id, error, "")
        self.lock.acquire()
        try:
            if run.pass_id in self.table.passes:
                run.error = error
                self._queue(run, "fail", (cause,))
        finally:
            self.lock.release()

    def lose(self, peer: int, error: BaseException) -> None:
        """Tell the passes that a worker is gone; it is among the lost of the host already."""
        self.lock.acquire()
        try:
            for run in self.table.passes.values():
                if run.begun:
                    cause = self.host.describe(run.pass_id, error, "")
                    self._queue(run, "on_lost", (peer, cause))
        finally:
            self.lock.release()

    def release(self, error: BaseException | None = None) -> None:
        """Finish the context here; passes whose part here is not complete fail.

        With an error, such as the loss of the creator, all fail: what others still have to
        tell of a pass that is complete here could not pass through here any more.
        """
        self.lock.acquire()
        try:
            self.released = True
            self.sends, self.recvs = {}, {}
            for run in list(self.table.passes.values()):
                if error is not None:
                    cause = self.host.describe(run.pass_id, error, "")
                    self._queue(run, "fail", (cause,))
                elif run.busy or run.state is not COMPLETE or run.root == run.worker:
                    self._queue(run, "leave", ())
                else:  # nothing is to come: else it and this part would keep each other alive
                    del self.table.passes[run.pass_id]
        finally:
            self.lock.release()

    def _tell_begun(self, method: str, args: tuple[Any, ...]) -> None:
        for run in self.table.passes.values():
            if run.begun:
                self._queue(run, method, args)

    def _queue(self, run: Run, method: str, args: tuple[Any, ...]) -> None:
        run.events.append((method, args))  # called with the run, then these
        if not run.busy:
            run.busy = True
            run.part = self
            self.host.schedule(self, run)

    # --- the thread that is busy with a pass -------------------------------------------

    def resume(self, run: Run) -> None:
        """Take the events of a pass, as a task of its own."""
        self.drain(run)

    def drain(self, run: Run) -> None:
        """Take the events of a pass until there are none; the caller has set `Run.busy`."""
        interrupt: BaseException | None = None
        events: list[Event] = []  # that wait since one before them raised
        while True:
            self.lock.acquire()
            try:
                if run.events:
                    events += run.events
                    run.events = []
                if run.begun and not events:
                    over = run.state is OVER or run.state is FAILED
                    if over:
                        self.table.close(run)
                    run.busy = False
                    break
                snapshot = None if run.begun else self._snapshot(run)
            finally:
                self.lock.release()
            try:
                self._step(run, snapshot, events)
            except BaseException as error:
                self._break(run, error)
                interrupt = interrupt or (None if isinstance(error, Exception) else error)
        if over and run.done is not None:
            run.done(run.cause)
        if interrupt is not None:
            raise interrupt

    def _snapshot(self, run: Run) -> tuple[Any, ...]:
        run.begun = True
        early = self.table.early(run.pass_id)
        doubted, lost = tuple(self._doubted or ()), tuple(self.host.lost)
        return dict(self.sends), dict(self.recvs), doubted, lost, early

    def _step(self, run: Run, snapshot: tuple[Any, ...] | None, events: list[Event]) -> None:
        if snapshot is not None:
            sends, recvs, doubted, lost, early = snapshot
            run.begin(sends, recvs, doubted, lost, early)
        while events:  # what follows an event that raises is answered later
            method, args = events.pop(0)
            if method == "handle":  # by far the most; a direct call where this is compiled
                run.handle(args[0], args[1])
            else:
                getattr(run, method)(*args)
        outbox = run.advance()
        for to, message in outbox:
            if run.state is FAILED:
                self._post(to, message)
            else:
                self.host.post(self, to, message)

    def _break(self, run: Run, error: BaseException) -> None:
        """Fail a pass because of an exception on this worker."""
        if run.error is None:
            run.error = error
        node, site = getattr(run.graph, "failed_node", ""), getattr(run.graph, "failed_site", "")
        run.fail(self.host.describe(run.pass_id, error, node, site))
        for to, message in run.advance():
            self._post(to, message)

    def _post(self, to: int, message: Message) -> None:
        """Send what may be lost with its receiver."""
        try:
            self.host.post(self, to, message)
        except ConnectionError:
            return  # whoever needs that worker hears of its loss
