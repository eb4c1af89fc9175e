"""Who joins a worker at its start.

Layers above rpc register themselves on each worker: their message handlers and hooks. A
worker must answer their messages even if its own script never imports them, so they are
named here, as text, and loaded when the first worker starts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distgrad.rpc.worker import Worker

__all__ = ["install", "load"]

#: Modules with a function ``install(worker)``, in the order in which they are called.
EXTENSIONS = ("distgrad.autograd", "distgrad.rref", "distgrad.optim")


def load() -> None:
    """Import what `install` needs, and the transports.

    To be called before a fork: the lock of a module that another thread imports at that moment
    stays locked in the child for ever.
    """
    for name in (*EXTENSIONS, "distgrad.transport.inproc", "distgrad.transport.stream"):
        import_module(name)


def install(worker: Worker) -> None:
    """Let every extension register itself on a worker."""
    for name in EXTENSIONS:
        import_module(name).install(worker)
