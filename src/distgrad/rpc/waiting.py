"""The threads that wait, and for which chain of calls each of them does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from queue import SimpleQueue

from distgrad.config import config

__all__ = ["Task", "Waiter", "WaitingThreads"]

Task = Callable[[], None]


class Waiter:
    """A thread that waits for a future.

    Attributes
    ----------
    chain
        The chain it waits for; its tasks may run on this thread.
    depth
        How many waiting threads of the same chain lie below on this stack.
    tasks
        Tasks given to this thread.
    leads
        The role was handed to this thread, which has not taken it up yet, or polls.
    mailbox
        Where it is woken; made when it first has to sleep.
    """

    __slots__ = ("chain", "depth", "leads", "mailbox", "over", "previous", "tasks", "thread")

    def __init__(self, chain: Hashable, previous: Waiter | None) -> None:
        self.chain = chain
        self.previous = previous
        self.thread = threading.get_ident()
        self.depth: int = 0
        if previous is not None and previous.thread == self.thread:
            self.depth = previous.depth + 1
        self.tasks: deque[Task] = deque()
        self.leads = False
        self.over = False
        self.mailbox: SimpleQueue[None] | None = None

    def wake(self) -> None:
        """Rouse the thread if it sleeps, or when it goes to sleep next."""
        if self.mailbox is not None:
            self.mailbox.put(None)


class WaitingThreads:
    """Finds the thread that waits for a chain: the innermost, where one waits within another."""

    def __init__(self) -> None:
        self._innermost: dict[Hashable, Waiter] = {}

    def enter(self, chain: Hashable) -> Waiter:
        """Note that the current thread begins to wait for a chain; None is no chain."""
        if not chain:
            return Waiter(chain, None)
        waiter = self._innermost[chain] = Waiter(chain, self._innermost.get(chain))
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Note that a thread waits no longer."""
        waiter.over = True
        if not waiter.chain or self._innermost.get(waiter.chain) is not waiter:
            return
        previous = waiter.previous
        if previous is not None and not previous.over:
            self._innermost[waiter.chain] = previous
        else:
            self._innermost.pop(waiter.chain, None)

    def find(self, chain: Hashable) -> Waiter | None:
        """Return the thread that may run a task of a chain on its stack, if there is one."""
        waiter = self._innermost.get(chain)
        if waiter is None or waiter.over or waiter.depth >= config.inline_depth:
            return None
        return waiter
