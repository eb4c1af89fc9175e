"""A pytest plugin: fork only while no other thread runs.

A child has one thread, and for ever the locks that other threads of its parent held. Python and
the C library release theirs; AddressSanitizer's allocator does not, and the child then waits in
its first allocation. A thread that sleeps is not in the allocator.
"""

import ctypes
import os
import time

_PATIENCE_S = 5.0  # then fork all the same: a thread that computes may not be in the allocator
# Calls that keep the GIL, so that no thread that was seen asleep takes it and runs.
_c = ctypes.PyDLL(None)


def _sleeps(thread: str) -> bool:
    content = ctypes.create_string_buffer(256)
    fd = _c.open(f"/proc/self/task/{thread}/stat".encode(), os.O_RDONLY | os.O_CLOEXEC)
    if fd < 0:
        return True  # it has ended
    _c.read(fd, content, 255)
    _c.close(fd)
    return content.value.rpartition(b") ")[2][:1] in (b"S", b"")


def wait_for_others() -> None:
    """Return when all other threads of this process sleep."""
    own = str(_c.gettid())
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        others = [thread for thread in os.listdir("/proc/self/task") if thread != own]
        if all(map(_sleeps, others)):
            return
        _c.sched_yield()


os.register_at_fork(before=wait_for_others)
