"""The exception tree of distgrad.

Every error is a `DistgradError`, and also derives from the builtin that a caller
would catch without knowing distgrad. Messages read ``cannot <verb> <thing>: <fact>``
and name the worker; ``detail`` carries long facts (a remote traceback, a report),
``hint`` the way out.
"""

from __future__ import annotations

__all__ = [
    "AuthenticationError",
    "BackwardError",
    "ContextError",
    "DistgradError",
    "GraphError",
    "NotExposedError",
    "OwnerLostError",
    "ProtocolError",
    "RemoteError",
    "RpcTimeoutError",
    "SerializationError",
    "TransportError",
    "UnknownWorkerError",
    "WorkerLostError",
]


class DistgradError(RuntimeError):
    """Base of all errors that distgrad raises.

    Parameters
    ----------
    message
        One line: ``cannot <verb> <thing>: <fact>``.
    detail
        Further facts, shown below the message.
    hint
        What the user can do, shown last.
    """

    def __init__(
        self, message: str = "", *, detail: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.detail:
            lines.append(self.detail)
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class RpcTimeoutError(DistgradError, TimeoutError):
    """A call, wait or pass did not end before its deadline."""


class TransportError(DistgradError, ConnectionError):
    """A connection could not be made or broke."""


class WorkerLostError(TransportError):
    """A worker of the world is gone: its process ended or its connection broke."""


class OwnerLostError(WorkerLostError):
    """The owner of an RRef is gone, and the value with it."""


class UnknownWorkerError(DistgradError, ValueError):
    """No worker of this world has that name or id."""


class NotExposedError(DistgradError, PermissionError):
    """The callee does not offer this function to remote callers."""


class AuthenticationError(DistgradError, PermissionError):
    """A peer could not prove that it belongs to this world."""


class SerializationError(DistgradError, TypeError):
    """A value cannot be sent; the message names the path to it."""


class ProtocolError(DistgradError, ValueError):
    """Bytes from a peer do not follow the wire format."""


class RemoteError(DistgradError):
    """An exception on another worker whose class is not known here.

    ``detail`` holds the remote traceback.
    """


class ContextError(DistgradError):
    """An autograd context is unknown, finished or used in the wrong place."""


class BackwardError(DistgradError):
    """A distributed backward pass failed; its ``__cause__`` is the original exception.

    Attributes
    ----------
    worker
        Name of the worker where it failed.
    node
        Name of the node whose rule or hook raised, or "".
    site
        ``file:line in function`` of the forward code that recorded the node, if
        ``config.trace_graph`` was set there, or "".
    remote_traceback
        Text; "" if it failed on this worker.
    """

    worker: str = ""
    node: str = ""
    site: str = ""
    remote_traceback: str = ""


class GraphError(DistgradError):
    """The autograd graph does not allow this: freed, modified, or without a rule."""
