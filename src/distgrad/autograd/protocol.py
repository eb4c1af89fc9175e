# cython: annotation_typing=False
"""One worker's part of a distributed backward pass: events in, messages out.

Nothing here performs input or output: no sockets, threads, clocks or randomness. A
`BackwardPass` is what one worker knows of one pass; it drives a graph (`GraphTask` of the
core) and says which messages to send. ``docs/protocol/backward.md`` explains the protocol
and why it ends.

Invariants
    1. A send of the snapshot is resolved once in a pass, by gradients or by none; what
       comes for it afterwards has no effect.
    2. A recv of the snapshot is told once: when all its consumers have delivered, or at
       the beginning if none of them takes part. A recv recorded later is told none.
    3. After its first sweep, every worker that shares a message with this one has begun.
    4. A worker that is complete owes no gradient to anybody, and nobody owes it one.
    5. The root ends the pass when the workers reached by closing over the reports, from
       itself, have all reported, and none of them was left out as lost by another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from distgrad.autograd.closure import Closure, report_of
from distgrad.autograd.terms import (
    COMPLETE,
    FAILED,
    LATE,
    NEW,
    OVER,
    RUNNING,
    Boundary,
    Gradients,
    Graph,
    Message,
    State,
    last_word,
    lost_worker,
    made,
    refuse,
    worker_of,
)
from distgrad.errors import GraphError, ProtocolError
from distgrad.message import PassAbort, PassBegin, PassComplete, PassEnd, PropagateGradients

__all__ = ["BackwardPass"]

Entry = tuple[int, Gradients]  # message id, and what its sender is told


class BackwardPass:
    """One worker's part of one pass.

    The driver calls `begin` once, then `handle` and the ``on_…`` methods as events come, and
    `advance` after every batch of them, which returns the messages to send. Calls must not
    overlap. An exception from any of them is a failure of the pass: the driver describes it
    and calls `fail`.

    Parameters
    ----------
    worker
        This worker.
    pass_id
        16 bits of the root worker, 48 bits of its counter.
    flags
        `RETAIN`, `INTO_GRAD`.

    Attributes
    ----------
    state
        How far this worker is.
    graph
        The local part of the graph while the pass runs.
    cause
        Why the pass failed, or None.
    closure
        At the root: who takes part.
    """

    __slots__ = (
        "_announced", "_answered", "_carried", "_entries", "_excluded", "_heard", "_late", "_lost",
        "_outbox", "_own", "_peers", "_recvs", "_sends", "_uncertain", "_unresolved", "cause",
        "closure", "flags", "graph", "pass_id", "root", "state", "worker",
    )  # fmt: skip

    def __init__(self, worker: int, pass_id: int, flags: int) -> None:
        self.worker = worker
        self.pass_id = pass_id
        self.flags = flags
        self.root = worker_of(pass_id)
        self.state: State = NEW
        self.closure = Closure(worker) if self.root == worker else None
        self.cause: PassAbort | None = None
        self.graph: Graph | None = None
        self._sends: dict[int, Boundary] = {}
        self._recvs: dict[int, Boundary] = {}
        self._peers: set[int] = set()
        self._lost: Collection[int] = ()
        self._excluded: Collection[int] = ()  # peers that were lost before the pass
        self._heard: set[int] = set()
        self._unresolved: dict[int, Boundary] = {}
        self._answered: set[int] = set()  # recvs outside the snapshot that were told none
        self._uncertain: dict[int, list[int]] = {}  # by peer: sends a begin asks about
        self._entries: dict[int, list[Entry]] = {}  # by peer: what to tell
        self._late: dict[int, list[Entry]] = {}  # the same, for late recvs
        self._own: list[Entry] = []  # the same, for this worker itself
        self._carried: tuple[int, ...] = ()  # reports of others that go on with the own one
        self._announced = False
        self._outbox: list[tuple[int, Message]] = []

    # --- events ------------------------------------------------------------------------

    def begin(
        self,
        sends: dict[int, Boundary],
        recvs: dict[int, Boundary],
        uncertain: Iterable[int] = (),
        lost: Collection[int] = (),
        early: Iterable[int] = (),
    ) -> None:
        """Take part, with the messages recorded by now.

        Parameters
        ----------
        sends, recvs
            The snapshot, by message id; owned by the pass from now on.
        uncertain
            Ids of sends whose message may never have been recorded by the receiver.
        lost
            Workers that were lost before. Their sends and recvs count as none; a gradient
            for one of them is an error.
        early
            Ids of sends for which a late recv was answered before this worker began.
        """
        self.state = RUNNING
        self._sends, self._recvs, self._lost = sends, recvs, lost
        peers = self._peers
        for node in sends.values():
            peers.add(node.peer)
        for node in recvs.values():
            peers.add(node.peer)
        peers.discard(self.worker)
        if lost:
            self._excluded = peers.intersection(lost)
            peers -= self._excluded
        if self.root in lost:
            raise lost_worker(self.root)
        self._unresolved = dict(sends)
        graph = self.graph = self.build()
        for node in recvs.values():
            if not graph.reaches(node):
                self._tell(node, None)
        for message_id in early:
            self._resolve(message_id, None)
        if lost:
            for message_id in [m for m, node in sends.items() if node.peer in lost]:
                self._resolve(message_id, None)
        for message_id in uncertain:
            self.on_uncertain(message_id)

    def build(self) -> Graph:
        """Return the graph from the roots of this worker and its sends; the driver knows how."""
        raise NotImplementedError("a driver of passes makes their graphs")

    def foreign(self, node: Boundary) -> Exception:
        """Return the error of a pass that leads to a recv of another context, which it names."""
        raise NotImplementedError("a driver of passes knows the contexts")

    def handle(self, sender: int, message: Message) -> None:
        """Take in a message of this pass."""
        state = self.state
        if state is OVER or state is FAILED:
            answer = last_word(message, self.cause)
            if answer is not None:
                self._outbox.append((sender, answer))
            return
        self._heard.add(sender)
        if type(message) is PropagateGradients:
            self._on_gradients(sender, message)
        elif type(message) is PassComplete:
            self._on_reports(message.complete)
        elif type(message) is PassBegin:
            self._on_begin(sender, message)
        elif type(message) is PassEnd:
            self._on_end()
        elif type(message) is PassAbort:
            self.fail(message, sender)

    def _on_gradients(self, sender: int, message: PropagateGradients) -> None:
        for message_id, grads in message.entries:
            self._resolve(message_id, grads)
        if message.complete is not None:
            self._on_reports(message.complete)

    def _on_begin(self, sender: int, message: PassBegin) -> None:
        for message_id in message.uncertain:
            self.on_recorded(message_id, sender)

    def _on_end(self) -> None:
        if self.state is not COMPLETE:
            raise ProtocolError("cannot end a pass: this worker is not complete")
        self.state = OVER

    def on_recorded(self, message_id: int, peer: int) -> None:
        """Answer none for a recv, once; nothing happens if it is in the snapshot."""
        if message_id in self._recvs or message_id in self._answered:
            return
        self._answered.add(message_id)
        if peer == self.worker:
            self._own.append((message_id, None))
        elif peer not in self._lost:
            self._late.setdefault(peer, []).append((message_id, None))

    def on_uncertain(self, message_id: int) -> None:
        """Ask the receiver whether it knows a message that may have been dropped."""
        if message_id not in self._unresolved:
            return
        peer = self._sends[message_id].peer
        if peer != self.worker:
            self._uncertain.setdefault(peer, []).append(message_id)
        else:
            self.on_recorded(message_id, peer)

    def on_undelivered(self, message_id: int) -> None:
        """Resolve a send whose message never left."""
        self._resolve(message_id, None)

    def on_released(self, cause: PassAbort) -> None:
        """Leave a pass because the context is finished here; fail unless this part is done."""
        if self.state is COMPLETE and self.closure is None:
            self.state = OVER
        else:
            self.fail(cause)

    def on_lost(self, peer: int, cause: PassAbort) -> None:
        """Fail if the pass needs a worker that is lost."""
        reached = self.closure.reached if self.closure is not None else ()
        if peer in self._peers or peer in reached or peer == self.root:
            self.fail(cause, peer)
        else:
            self._lost = {*self._lost, peer}

    def fail(self, cause: PassAbort, sender: int = -1) -> None:
        """End the pass without success and tell all who may not know.

        Parameters
        ----------
        cause
            What everybody is told.
        sender
            The worker that told us, or is lost; it is not told.
        """
        if self.state is OVER or self.state is FAILED:
            return
        self.state = FAILED
        self.cause = cause
        # Who was heard of may wait for a message that is not recorded here yet.
        tell = self._peers | self._heard
        tell |= self.closure.workers() if self.closure else {self.root}
        tell -= {self.worker, sender, *self._lost}
        self._outbox = [(peer, cause) for peer in sorted(tell)]
        self._drop_graph()

    # --- what follows from them --------------------------------------------------------

    def advance(self) -> list[tuple[int, Message]]:
        """Run what is ready and return the messages to send, with their receivers."""
        if self.state is RUNNING:
            self._sweep()
        if self.state is RUNNING or self.state is COMPLETE:
            self._flush()
        outbox, self._outbox = self._outbox, []
        return outbox

    def _sweep(self) -> None:
        graph = self.graph
        assert graph is not None
        while True:
            for node, grads in graph.run():
                self._tell(node, grads)
            if not self._own:
                return
            own, self._own = self._own, []
            for message_id, grads in own:
                self._resolve(message_id, grads)

    def _flush(self) -> None:
        if not self._announced:
            self._announced = True
            for peer in self._peers - self._heard:
                if peer not in self._entries:
                    self._uncertain.setdefault(peer, [])  # a bare begin
        if self._late:
            self._flush_late()
        report = self._report()
        if self._entries:
            self._flush_entries(report)
        elif report is not None:
            self._outbox.append((self.root, PassComplete(self.pass_id, report)))
        if self._uncertain:
            asked, self._uncertain = self._uncertain, {}
            for peer in sorted(asked):
                note = PassBegin(self.pass_id, self.flags, tuple(asked[peer]))
                self._outbox.append((peer, note))

    def _flush_entries(self, report: tuple[int, ...] | None) -> None:
        told, self._entries = self._entries, {}
        bearer = -1
        if report is not None:
            bearer = self.root if self.root in told else next(iter(told))
        for peer, entries in told.items():
            complete = report if peer == bearer else None
            fields = (self.pass_id, self.flags, tuple(entries), complete)
            self._outbox.append((peer, made(PropagateGradients, fields)))

    def _flush_late(self) -> None:
        late, self._late = self._late, {}
        for peer, entries in late.items():
            if peer in self._entries:
                self._entries[peer] += entries
            else:
                note = PropagateGradients(self.pass_id, self.flags | LATE, tuple(entries), None)
                self._outbox.append((peer, note))

    def _tell(self, node: Boundary, grads: Gradients) -> None:
        message_id, peer = node.message_id, node.peer
        if message_id not in self._recvs:
            if grads is not None:
                raise self.foreign(node)
        elif peer == self.worker:
            self._own.append((message_id, grads))
        elif peer not in self._lost:
            self._entries.setdefault(peer, []).append((message_id, grads))
        elif grads is not None:
            raise lost_worker(peer)

    def _resolve(self, message_id: int, grads: Gradients) -> None:
        node = self._unresolved.pop(message_id, None)
        if node is not None:
            assert self.graph is not None
            self.graph.deliver(node, grads)
        elif grads is not None and message_id not in self._sends:
            raise GraphError(
                "cannot run the backward pass: gradients came for a message that was sent "
                "after the pass began",
                hint="let the forward work of a context end before its backward",
            )

    # --- completion --------------------------------------------------------------------

    def _report(self) -> tuple[int, ...] | None:
        """Complete this worker's part if that is possible now; return the report to send."""
        if self.state is COMPLETE or self._unresolved:
            return None
        assert self.graph is not None
        if not self.graph.done:
            return None
        self.state = COMPLETE
        self._drop_graph()
        peers = tuple(sorted(self._peers))
        if self._excluded:
            peers += tuple([~worker for worker in self._excluded])
        report = report_of(self.worker, peers)
        if self._carried:
            report += self._carried
        if self.closure is None:
            return report
        self._on_reports(report)
        return None

    def _drop_graph(self) -> None:
        self.graph = None
        self._own = []
        if self._unresolved:
            self._unresolved = {}

    def _on_reports(self, reports: tuple[int, ...]) -> None:
        """Take in reports; elsewhere than at the root they go on to it."""
        closure = self.closure
        if closure is None:
            if self.state is COMPLETE:
                self._outbox.append((self.root, PassComplete(self.pass_id, reports)))
            else:
                self._carried += reports
            return
        closure.take(reports)
        if self._lost:
            refuse(closure.reached.intersection(self._lost))
        if self.state is COMPLETE and not closure.missing:
            if closure.partial:
                refuse(closure.left_out())
            self.state = OVER
