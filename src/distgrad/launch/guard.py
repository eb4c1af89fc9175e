"""What is left to do when the launcher itself is killed."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

__all__ = ["Guard"]


class Guard:
    """A process that kills the process groups of the workers should this process be killed.

    The kernel ends a worker with the launcher, but not what the worker started. The guard
    waits for the end of a pipe whose other end only the launcher holds.
    """

    def __init__(self) -> None:
        reading, self._writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._writing)
            os._exit(_stand_guard(reading))
        os.close(reading)

    def watch(self, group: int) -> None:
        """Take charge of a process group."""
        self._say(f"+{group}\n")

    def forget(self, group: int) -> None:
        """Leave a group alone from now on: its number may soon belong to others."""
        self._say(f"-{group}\n")

    def _say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # somebody killed the guard
            os.write(self._writing, line.encode())

    def dismiss(self) -> None:
        """End the guard."""
        os.close(self._writing)
        os.waitpid(self._pid, 0)


def _stand_guard(reading: int) -> int:
    os.setsid()  # Ctrl-C and the end of a terminal are the launcher's business
    groups: set[int] = set()
    with os.fdopen(reading) as pipe:
        for line in pipe:
            group = int(line[1:])
            if line[0] == "+":
                groups.add(group)
            else:
                groups.discard(group)
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    return 0
