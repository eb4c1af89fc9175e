from contextvars import ContextVar
from typing import Any, final

from distgrad.rpc.worker import Worker

activity: ContextVar[Activity]

@final
class Activity:
    def __init__(self, worker: Worker, chain: Any = 0, deadline: float | None = None) -> None: ...
    @property
    def worker(self) -> Worker: ...
    @property
    def chain(self) -> int: ...
    @property
    def deadline(self) -> float | None: ...

def set_elsewhere(now: Activity | None) -> None: ...
