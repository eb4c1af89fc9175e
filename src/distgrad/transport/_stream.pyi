from typing import Any, final

from distgrad._codec import Outgoing
from distgrad.transport._poller import Pollable
from distgrad.transport._poller import Poller as Poller
from distgrad.transport._ring import Ring
from distgrad.transport.base import Connection

@final
class StreamConnection(Pollable, Connection):
    def __new__(
        cls,
        poller: Poller,
        fd: int,
        *,
        scheme: str,
        peer_address: str,
        identity: object,
        ring: Ring | None = None,
        lane: int = -1,
    ) -> StreamConnection: ...
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def scheme(self) -> str: ...  # type: ignore[override]
    @property
    def peer_address(self) -> str: ...  # type: ignore[override]
    @property
    def identity(self) -> Any: ...
    peer: Any
    @property
    def closed(self) -> bool: ...
    def send(self, message: Outgoing) -> bool: ...
    def flushed(self) -> bool: ...
    def waiting(self) -> int: ...
    def refusal(self) -> Exception: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def give_up(self) -> None: ...
