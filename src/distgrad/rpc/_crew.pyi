from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, final

from typing_extensions import disjoint_base

from distgrad.rpc._activity import Activity
from distgrad.rpc._future import Desk
from distgrad.rpc._leader import Leadership
from distgrad.transport._poller import Poller

@final
class Waiter:
    def wake(self) -> None: ...

@disjoint_base
class Job:
    def __call__(self) -> None: ...

@disjoint_base
class CrewCore(Desk):
    base_activity: Activity | None
    wake_at: float
    watched: bool
    summoned: bool
    def __init__(
        self,
        name: str,
        poller: Poller,
        on_events: Callable[[list[Any]], None],
        on_tick: Callable[[float], float],
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def poller(self) -> Poller: ...
    @property
    def busy(self) -> int: ...
    @property
    def leadership(self) -> Leadership: ...
    @property
    def backlog(self) -> deque[Callable[[], None]]: ...
    @property
    def followers(self) -> deque[Waiter]: ...
    @property
    def idle(self) -> bool: ...
    def polls_here(self) -> bool: ...
    def drain(self, connection: Any, deadline: float = ...) -> bool: ...
    def submit(self, task: Callable[[], None], chain: Hashable = None) -> None: ...
    def withdraw(self, wanted: Callable[[Any], bool]) -> bool: ...
    def _serve_until_surplus(self) -> None: ...
