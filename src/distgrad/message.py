"""The messages between workers: one class a kind, and the table from code to class.

A message travels as one frame (`distgrad._codec`). The frame's header names the kind by
its code and carries what every kind shares: request id, chain, deadline, context id and
autograd message id. The body is the tuple of the fields below, in order.
``docs/wire-format.md`` has the bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "KINDS",
    "Arrived",
    "Bye",
    "Call",
    "Cancel",
    "CleanupContext",
    "Departed",
    "Error",
    "JoinContext",
    "PassAbort",
    "PassBegin",
    "PassComplete",
    "PassEnd",
    "PropagateGradients",
    "RRefBackward",
    "RRefCall",
    "RRefChildAccept",
    "RRefFetch",
    "RRefForkRequest",
    "RRefUserDelete",
    "RemoteCall",
    "Reply",
    "StepDecide",
    "StepPrepare",
    "StepQuestion",
    "code_of",
]


class Call(NamedTuple):
    """Run an exposed function; answered by `Reply` or `Error`."""

    function: str  # "module:qualname"
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None


class Reply(NamedTuple):
    """The value a request produced."""

    value: Any


class Error(NamedTuple):
    """A request failed. Plain data: nothing is executed to rebuild the exception."""

    type_name: str  # "module:qualname" of the exception's class
    message: str
    args: tuple[Any, ...] | None  # arguments of the exception, if they can be sent
    traceback: str
    workers: tuple[str, ...]  # the workers that the error crossed, origin first
    state: dict[str, Any] | None = None  # further attributes, those that can be sent


class Cancel(NamedTuple):
    """The caller no longer waits for the request whose id the header carries."""


class Bye(NamedTuple):
    """The sender leaves in good order; the end of its stream is no loss."""

    reason: str


class Arrived(NamedTuple):
    """The sender is idle and wants to leave; how many requests it issued and handled."""

    issued: int
    handled: int


class Departed(NamedTuple):
    """Answers all `Arrived`: leave now, report again, or do not hope for it."""

    finished: bool
    reason: str | None  # why the world cannot leave together


class RemoteCall(NamedTuple):
    """Run a function and keep its value as a new RRef of the receiver."""

    rref_id: int
    fork_id: int
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None


class RRefFetch(NamedTuple):
    """Send the value of an RRef; waits at the owner until there is one."""

    rref_id: int


class RRefCall(NamedTuple):
    """Call a method of the value of an RRef at its owner."""

    rref_id: int
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] | None


class RRefForkRequest(NamedTuple):
    """A new user tells the owner of its fork."""

    rref_id: int
    fork_id: int


class RRefChildAccept(NamedTuple):
    """A new user tells its parent that the owner knows it now."""

    fork_id: int


class RRefUserDelete(NamedTuple):
    """A user let go of forks: pairs of RRef id and fork id."""

    forks: tuple[tuple[int, int], ...]


class RRefBackward(NamedTuple):
    """Run a backward pass from the value of an RRef; the owner becomes the root."""

    rref_id: int
    context_id: int
    retain_graph: bool


class PropagateGradients(NamedTuple):
    """Gradients and nones of one or more sends of a pass.

    ``entries`` holds ``(message id, gradients)``, where ``gradients`` is None, or a tuple
    with an array or None a slot. ``complete`` is None, or reports as in `PassComplete`.
    """

    pass_id: int
    flags: int
    entries: tuple[tuple[int, tuple[Any, ...] | None], ...]
    complete: tuple[int, ...] | None


class PassBegin(NamedTuple):
    """A pass has begun; ``uncertain`` are sends that may never have been delivered."""

    pass_id: int
    flags: int
    uncertain: tuple[int, ...]


class PassComplete(NamedTuple):
    """Reports of workers whose part of the pass is done, on their way to its root.

    A report is the id of the worker, the number of its peers, and their ids (``~id`` of those
    that it left out as lost); reports stand one behind the other.
    """

    pass_id: int
    complete: tuple[int, ...]


class PassEnd(NamedTuple):
    """The whole pass is over; its id may be forgotten."""

    pass_id: int


class PassAbort(NamedTuple):
    """The pass failed; every participant drops its state."""

    pass_id: int
    node: str  # name of the node whose rule raised, or ""
    site: str  # where that node was recorded, if the worker remembers, or ""
    error: tuple[Any, ...]  # the fields of an `Error`


class CleanupContext(NamedTuple):
    """The context whose id the header carries is released."""


class JoinContext(NamedTuple):
    """Asks the creator of the context in the header to tell the sender of its release.

    Sent when a worker is lost that might have passed the release on. To another worker than
    the creator it says that the sender has lost the creator, and to ask for itself.
    """


class StepPrepare(NamedTuple):
    """Compute a step of a distributed optimizer aside; answered by whether that was possible.

    The sender is the first of ``line``; the owners of parameters follow, by id.
    """

    step: int
    optimizer: int  # names the optimizer on all its owners
    line: tuple[int, ...]
    context_id: int  # of the gradients
    settings: tuple[dict[str, Any], ...]  # one dict a parameter group
    mode: int  # see `distgrad.optim.steps`


class StepDecide(NamedTuple):
    """Apply a step that all owners have prepared, or drop it."""

    step: int
    commit: bool


class StepQuestion(NamedTuple):
    """Asks what the receiver knows of a step whose coordinator is lost to the sender."""

    step: int
    optimizer: int
    line: tuple[int, ...]


#: Code on the wire to class. Codes are never reused; 0 is invalid.
KINDS: dict[int, type] = {
    1: Call,
    2: Reply,
    3: Error,
    4: Cancel,
    5: Bye,
    6: Arrived,
    7: Departed,
    16: RemoteCall,
    17: RRefFetch,
    18: RRefCall,
    19: RRefForkRequest,
    20: RRefChildAccept,
    21: RRefUserDelete,
    22: RRefBackward,
    32: PropagateGradients,
    33: PassBegin,
    34: PassComplete,
    35: PassEnd,
    36: PassAbort,
    37: CleanupContext,
    38: JoinContext,
    48: StepPrepare,
    49: StepDecide,
    50: StepQuestion,
}

_CODES = {cls: code for code, cls in KINDS.items()}


def code_of(cls: type) -> int:
    """Return the code of a message class."""
    return _CODES[cls]
