"""Who is in the world: names, ids, addresses, incarnations, and the secret they share."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

from distgrad.errors import UnknownWorkerError
from distgrad.rpc.auth import HmacHandshake
from distgrad.rpc.options import WorkerInfo
from distgrad.transport.base import Handshake

__all__ = ["Member", "World"]


class Member(NamedTuple):
    """One worker as the rendezvous published it."""

    name: str
    id: int
    incarnation: int  # random, tells a restarted worker from its predecessor
    host: str  # the same for workers that can share Unix sockets
    process: str  # the same for workers of one process
    addresses: tuple[str, ...]  # where it listens, the fastest way first
    doors: tuple[str, ...] = ()  # where it says that it runs, see `pulse`
    limits: tuple[int, ...] = ()  # of the messages that it takes, see `_codec.receivable`


class World:
    """The members of a world, seen by one of them.

    Parameters
    ----------
    members
        All workers, in the order of their ids.
    own_id
        Which of them this is.
    secret
        Proves membership; None only among processes of one user on one host.
    """

    def __init__(self, members: Sequence[Member], own_id: int, secret: bytes | None) -> None:
        self.members = tuple(members)
        self.infos = tuple(WorkerInfo(m.name, m.id) for m in members)
        self.own = self.members[own_id]
        self._secret = secret
        self._by_name = {m.name: m.id for m in members}
        self._key = f"{self.members[0].incarnation:016x}"

    def id_of(self, to: WorkerInfo | str | int) -> int:
        """Return the id of a worker given by name, id or `WorkerInfo`.

        Raises
        ------
        UnknownWorkerError
            If no worker of this world is meant.
        TypeError
            If ``to`` is something else.
        """
        if type(to) is str:
            found = self._by_name.get(to, -1)
        elif isinstance(to, WorkerInfo):
            found = to.id if 0 <= to.id < len(self.infos) and self.infos[to.id] == to else -1
        elif isinstance(to, Integral) and not isinstance(to, bool):
            found = int(to) if 0 <= to < len(self.infos) else -1
        else:
            raise TypeError(f"cannot find worker {to!r}: expected a name, an id or a WorkerInfo")
        if found < 0:
            known = ", ".join(repr(info.name) for info in self.infos[:8])
            more = ", ..." if len(self.infos) > 8 else ""
            raise UnknownWorkerError(
                f"cannot find worker {to!r}: this world has {known}{more}",
            )
        return found

    def name_of(self, worker_id: int) -> str:
        """Return a worker's name; a made-up one for ids outside the world."""
        known = 0 <= worker_id < len(self.infos)
        return self.infos[worker_id].name if known else f"worker {worker_id}"

    def addresses_of(self, worker_id: int) -> tuple[str, ...]:
        """Return where a worker can be reached from here, the fastest way first."""
        member = self.members[worker_id]
        out_of_reach = set()
        if member.host != self.own.host:
            out_of_reach.add("unix")
        if member.process != self.own.process:
            out_of_reach.add("inproc")
        return tuple(a for a in member.addresses if a.partition("://")[0] not in out_of_reach)

    def doors_of(self, worker_id: int) -> tuple[str, ...]:
        """Return where a worker tells whether it runs."""
        return self.members[worker_id].doors

    def recognises(self, identity: Any, worker_id: int) -> bool:
        """Whether an authenticated identity is that of the member with this id."""
        if not 0 <= worker_id < len(self.members):
            return False
        return tuple(identity) == (worker_id, self.members[worker_id].incarnation)

    def handshake(self, *, connecting: bool, peer_uid: int | None) -> Handshake:
        """Return a fresh handshake in which this worker proves who it is."""
        return HmacHandshake(
            self._secret,
            connecting=connecting,
            identity=(self.own.id, self.own.incarnation),
            peer_uid=peer_uid,
            world=self._key,
            # Who connects says who it is; so each takes up no more than what one worker may.
            admits=None if connecting else lambda identity: self.recognises(identity, identity[0]),
        )
