"""Who is at the other end: mutual proof of a shared secret, or of the same local user.

Four messages (docs/protocol/handshake.md):

1. connecting -> accepting  HELLO: magic, mode, digest of the world, nonce, identity
2. accepting -> connecting  HELLO: the same of the accepting side
3. connecting -> accepting  PROOF: HMAC-SHA256(secret, "connecting" + transcript)
4. accepting -> connecting  PROOF: HMAC-SHA256(secret, "accepting" + transcript)

H1  The transcript is both hellos whole, so a proof binds both nonces, both identities,
    the mode and the world; it is worth nothing in any other attempt.
H2  The proofs of the two roles differ, so neither can be reflected.
H3  The side that was called proves itself last: a stranger who connects gets no
    material to guess the secret from.
H4  Without a secret the kernel must vouch that the peer is this user; both sides check.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Callable

from distgrad.errors import AuthenticationError
from distgrad.transport.base import Handshake

__all__ = ["HmacHandshake"]

# magic, mode, sha256 of the world's name, nonce, worker id, incarnation
_HELLO = struct.Struct("<4sB32s32sQQ")
_MAGIC = b"DG1\0"
_OPEN, _SECRET = 0, 1
_ROLE = {True: b"distgrad connecting\0", False: b"distgrad accepting\0"}
_NO_PROOF = b"\0" * 32


class HmacHandshake(Handshake):
    """Prove to each other the knowledge of ``secret`` and the identity of the worker.

    Parameters
    ----------
    secret
        Shared by all workers of the world. None accepts only a peer for which the
        kernel vouches (``peer_uid``) that it runs as this user.
    connecting
        True on the side that called `Transport.connect`.
    identity
        (worker id, incarnation) of this side, two unsigned 64-bit numbers.
    peer_uid
        User id of the peer if the kernel told it, else None.
    world
        Name of the world; workers of different worlds refuse each other.
    admits
        Tells whether an identity, once proved, is that of a worker; None admits all.
    """

    def __init__(
        self,
        secret: bytes | None,
        *,
        connecting: bool,
        identity: tuple[int, int],
        peer_uid: int | None,
        world: str,
        admits: Callable[[tuple[int, int]], bool] | None = None,
    ) -> None:
        if secret is not None and not secret:
            raise ValueError("cannot authenticate: the secret is empty")
        self._secret = secret
        self._connecting = connecting
        self._peer_uid = peer_uid
        self._admits = admits
        self._hello = _HELLO.pack(
            _MAGIC,
            _OPEN if secret is None else _SECRET,
            hashlib.sha256(world.encode()).digest(),
            secrets.token_bytes(32),
            *identity,
        )
        self._peer_hello: bytes | None = None
        self._peer_identity: tuple[int, int] | None = None
        self._finished = False

    def start(self) -> bytes | None:
        """Return the first hello; None on the accepting side."""
        if not self._connecting:
            return None
        self._check_user()
        return self._hello

    def receive(self, message: bytes) -> tuple[bytes | None, bool]:
        """Take the peer's hello, then its proof."""
        if self._finished:
            raise AuthenticationError("cannot authenticate the peer: it spoke after the end")
        if self._peer_hello is None:
            self._check_user()
            self._read_hello(message)
            return (self._proof(self._connecting) if self._connecting else self._hello), False
        if not hmac.compare_digest(message, self._proof(not self._connecting)):
            raise AuthenticationError(
                "cannot authenticate the peer: it does not know the secret of this world",
                hint="all workers need the same DISTGRAD_SECRET or DISTGRAD_SECRET_FILE",
            )
        assert self._peer_identity is not None
        if self._admits is not None and not self._admits(self._peer_identity):
            raise AuthenticationError("cannot authenticate the peer: it is no worker of this world")
        self._finished = True
        self.identity = self._peer_identity
        return (None if self._connecting else self._proof(False)), True

    def _check_user(self) -> None:
        if self._secret is None and self._peer_uid != os.getuid():
            whose = "an unknown user" if self._peer_uid is None else f"user {self._peer_uid}"
            raise AuthenticationError(
                f"cannot authenticate the peer: there is no secret and it runs as {whose}",
                hint="set DISTGRAD_SECRET or DISTGRAD_SECRET_FILE for all workers",
            )

    def _read_hello(self, message: bytes) -> None:
        if len(message) != _HELLO.size or message[:4] != _MAGIC:
            raise AuthenticationError("cannot authenticate the peer: it does not speak distgrad")
        _, mode, world, nonce, worker_id, incarnation = _HELLO.unpack(message)
        _, own_mode, own_world, own_nonce, _, _ = _HELLO.unpack(self._hello)
        if mode != own_mode:
            raise AuthenticationError(
                "cannot authenticate the peer: only one of the two sides has a secret",
                hint="set DISTGRAD_SECRET or DISTGRAD_SECRET_FILE for all workers",
            )
        if world != own_world:
            raise AuthenticationError("cannot authenticate the peer: it is of another world")
        if nonce == own_nonce:
            raise AuthenticationError("cannot authenticate the peer: it repeats our own words")
        self._peer_hello = message
        self._peer_identity = (worker_id, incarnation)

    def _proof(self, connecting: bool) -> bytes:
        """Return the proof of the connecting or of the accepting side."""
        assert self._peer_hello is not None
        if self._secret is None:
            return _NO_PROOF
        hellos = [self._hello, self._peer_hello]
        if not self._connecting:
            hellos.reverse()
        return hmac.digest(self._secret, _ROLE[connecting] + b"".join(hellos), "sha256")
