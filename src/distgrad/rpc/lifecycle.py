"""Joining a world and leaving it."""

from __future__ import annotations

import atexit
import os
import resource
import threading
from typing import Any

from distgrad.config import config
from distgrad.rpc import extensions, rendezvous
from distgrad.rpc.activity import (
    Activity,
    activity,
    current_worker,
    discharge,
    enlist,
    hosted_workers,
)
from distgrad.rpc.departure import Departure
from distgrad.rpc.environment import detect
from distgrad.rpc.exposure import Exposure
from distgrad.rpc.options import RpcBackendOptions
from distgrad.rpc.payload import apply_limits
from distgrad.rpc.pulse import Doors
from distgrad.rpc.worker import Worker
from distgrad.rpc.world import World
from distgrad.transport._poller import Poller
from distgrad.transport.base import Listener
from distgrad.transport.registry import transport_for

__all__ = ["init_rpc", "shutdown"]

# Descriptors a peer: two that connect to each other at once have two connections, over TCP of two
# sockets each; and one knocks.
_FILES_EACH = 5
_FILES = 256  # for all else that a process has open


def init_rpc(
    name: str | None = None,
    backend: str | None = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: RpcBackendOptions | None = None,
) -> Worker:
    """Join a world and make the new worker the current one of this thread.

    Parameters
    ----------
    name
        Of this worker, unique in the world; by default ``DISTGRAD_NAME`` or
        ``worker<rank>``.
    backend
        Scheme of the transport; None takes the fastest that reaches each peer.
    rank, world_size
        Number of this worker and how many there are; by default from the environment
        (``RANK``, ``WORLD_SIZE``, or what torchrun, mpirun or srun set).
    rpc_backend_options
        Everything else.

    Returns
    -------
    Worker
        The worker; module-level functions find it by themselves.

    Raises
    ------
    ValueError
        If rank, world size, name or address are missing or taken, the workers do not agree on
        the size, or a pattern of ``expose`` names nothing that can be called.
    AuthenticationError
        If the world does not share this worker's secret, or needs one.
    RpcTimeoutError
        If the other workers do not arrive within ``config.rendezvous_timeout``.
    """
    options = rpc_backend_options or RpcBackendOptions()
    if not isinstance(options, RpcBackendOptions):
        raise TypeError(f"cannot use rpc_backend_options={options!r}: expected RpcBackendOptions")
    place = rendezvous.find_place(options.init_method, rank, world_size, os.environ)
    name = name or detect(os.environ).name or f"worker{place.rank}"
    _make_room(place.world_size)
    meeting = rendezvous.meet(place, options)
    joining = _Joining(options, meeting)
    try:
        worker = joining.worker(backend, name)
    except BaseException as error:
        joining.abandon()
        meeting.fail(name, error)
        raise
    finally:
        meeting.close()
    enlist(worker)
    activity.set(Activity(worker))
    return worker


def _make_room(world_size: int) -> None:
    """Raise the soft limit of file descriptors where the connections might not fit in."""
    wanted = _FILES_EACH * world_size + _FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Joining:
    """The steps from a meeting to a running worker."""

    def __init__(self, options: RpcBackendOptions, meeting: rendezvous.Meeting) -> None:
        self._options = options
        self._meeting = meeting
        self._secret = options.find_secret()
        self._poller = Poller()
        self._listeners: list[Listener] = []
        self._doors = Doors((), None)
        self._worker: Worker | None = None
        self._ready = threading.Event()

    def worker(self, backend: str | None, name: str) -> Worker:
        exposure = Exposure(name, self._options.expose)  # first: others wait for who cannot join
        published = _schemes(backend, self._meeting.place.scheme, self._secret)
        schemes = list(dict.fromkeys((*published, "inproc")))  # the last one leads to itself
        for scheme in schemes:
            self._listeners.append(self._listen(scheme))
        by_scheme = dict(zip(schemes, self._listeners, strict=True))
        addresses = [by_scheme[scheme].address for scheme in published]
        if self._options.heartbeat_interval > 0:
            self._doors = Doors(published, self._options.host or self._meeting.host)
        rank = self._meeting.place.rank
        own = rendezvous.new_member(name, rank, addresses, self._doors.addresses, apply_limits())
        members = self._meeting.exchange(own)
        members[own.id] = own._replace(addresses=(by_scheme["inproc"].address,))
        world = World(members, own.id, self._secret)
        worker = Worker(world, self._options, self._poller, exposure)
        worker.agent.links.listeners = self._listeners
        worker.agent.beat(self._doors, self._options.heartbeat_interval)
        worker.extensions["departure"] = Departure(worker)
        extensions.install(worker)
        self._worker = worker
        self._ready.set()
        worker.agent.crew.start()
        return worker

    def _listen(self, scheme: str) -> Listener:
        return transport_for(scheme).listen(
            self._poller,
            self._handshake,
            self._accept,
            host=self._options.host or self._meeting.host,
            secure=self._secret is not None,
        )

    # Both run on the thread that polls, and nobody polls before the worker is there; but a
    # worker of this process that came earlier shakes hands on its own thread.

    def _handshake(self, peer_uid: int | None) -> Any:
        self._ready.wait(config.handshake_timeout)
        assert self._worker is not None
        return self._worker.world.handshake(connecting=False, peer_uid=peer_uid)

    def _accept(self, connection: Any, identity: Any) -> None:
        assert self._worker is not None
        self._worker.agent.links.accept(connection, identity)

    def abandon(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._doors.close()
        self._poller.close()


def _schemes(backend: str | None, meeting: str, secret: bytes | None) -> list[str]:
    if backend is not None:
        transport_for(backend)
        return [backend]
    if meeting == "memory":
        return ["inproc"]
    return ["unix", "tcp"] if secret is not None else ["unix"]


def shutdown(graceful: bool = True, timeout: float = 0) -> None:
    """Leave the world.

    Parameters
    ----------
    graceful
        Wait until every worker has called `shutdown` and no call runs anywhere, however
        many calls those calls make. False leaves at once; calls of others to this worker
        fail with `WorkerLostError`.
    timeout
        Seconds to wait at most; 0 for no limit. The worker leaves in any case.

    Raises
    ------
    RpcTimeoutError
        If the others do not come in time.
    WorkerLostError
        If a worker was lost before all could leave together.
    """
    leave(current_worker(), graceful, timeout)


def leave(worker: Worker, graceful: bool = True, timeout: float = 0) -> None:
    """Do what `shutdown` does, for one worker of this process."""
    if worker.closed:
        return
    try:
        if graceful:
            worker.extensions["departure"].wait(timeout)
    finally:
        worker.close("shutdown")
        worker.extensions["departure"].give_up()
        discharge(worker)


@atexit.register
def _leave_all() -> None:
    for worker in hosted_workers():
        leave(worker, graceful=False)
