"""Remote references: values that stay on one worker and are used from all."""

from distgrad.rpc import Worker
from distgrad.rref import owner
from distgrad.rref.remote import remote
from distgrad.rref.rref import RRef
from distgrad.rref.table import RRefTable

__all__ = ["RRef", "install", "remote"]


def install(worker: Worker) -> None:
    """Give a worker its table of references; rpc calls this when a worker starts."""
    worker.extensions["rref"] = RRefTable(worker)
    owner.register(worker)
