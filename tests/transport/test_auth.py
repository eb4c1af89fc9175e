"""The mutual handshake, without any I/O."""

import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.errors import AuthenticationError
from distgrad.rpc.auth import HmacHandshake
from distgrad.transport.base import MAX_HANDSHAKE_BYTES

SECRET = b"the secret of this world"
NEAR, FAR = (3, 2**63 + 1), (2**64 - 1, 9)


def near(
    secret: bytes | None = SECRET, world: str = "w", peer_uid: int | None = None
) -> HmacHandshake:
    return HmacHandshake(secret, connecting=True, identity=NEAR, peer_uid=peer_uid, world=world)


def far(
    secret: bytes | None = SECRET, world: str = "w", peer_uid: int | None = None
) -> HmacHandshake:
    return HmacHandshake(secret, connecting=False, identity=FAR, peer_uid=peer_uid, world=world)


def run(
    connecting: HmacHandshake,
    accepting: HmacHandshake,
    disturb: Callable[[int, bytes], bytes] = lambda turn, message: message,
) -> list[bytes]:
    """Carry the messages to and fro; return them."""
    sides = [accepting, connecting]
    message, finished, carried = connecting.start(), [False, False], []
    while message is not None:
        carried.append(disturb(len(carried), message))
        turn = (len(carried) + 1) % 2
        message, finished[turn] = sides[turn].receive(carried[-1])
    assert finished == [True, True]
    return carried


def test_handshake_same_secret_proves_both_identities() -> None:
    a, b = near(), far()
    messages = run(a, b)
    assert (a.identity, b.identity) == (FAR, NEAR)
    assert len(messages) == 4
    assert max(map(len, messages)) <= MAX_HANDSHAKE_BYTES
    assert all(SECRET not in message for message in messages)


def test_handshake_of_who_is_no_worker_is_refused_after_the_proof() -> None:
    asked = []
    accepting = HmacHandshake(
        SECRET, connecting=False, identity=FAR, peer_uid=None, world="w", admits=asked.append
    )
    with pytest.raises(AuthenticationError, match="no worker of this world"):
        run(near(), accepting)
    assert asked == [NEAR]
    assert accepting.identity is None


def test_handshake_accepting_side_speaks_second() -> None:
    assert far().start() is None


def test_handshake_other_secret_is_refused_by_the_accepting_side_first() -> None:
    a, b = near(b"guess"), far()
    hello, _ = b.receive(a.start() or b"")
    proof, finished = a.receive(hello or b"")
    assert not finished
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        b.receive(proof or b"")
    assert b.identity is None


def test_handshake_accepting_side_without_the_secret_is_refused() -> None:
    a, b = near(), far(b"guess")
    hello, _ = b.receive(a.start() or b"")
    a.receive(hello or b"")
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        a.receive(b"\0" * 32)
    assert a.identity is None


def test_handshake_other_world_is_refused() -> None:
    with pytest.raises(AuthenticationError, match="another world"):
        far(world="v").receive(near(world="w").start() or b"")


@pytest.mark.parametrize(("one", "other"), [(SECRET, None), (None, SECRET)])
def test_handshake_secret_on_one_side_only_is_refused(
    one: bytes | None, other: bytes | None
) -> None:
    a, b = near(one, peer_uid=os.getuid()), far(other, peer_uid=os.getuid())
    with pytest.raises(AuthenticationError, match="only one of the two sides"):
        b.receive(a.start() or b"")


def test_handshake_without_secret_accepts_the_same_user() -> None:
    a, b = near(None, peer_uid=os.getuid()), far(None, peer_uid=os.getuid())
    run(a, b)
    assert (a.identity, b.identity) == (FAR, NEAR)


@pytest.mark.parametrize("peer_uid", [None, os.getuid() + 1])
def test_handshake_without_secret_refuses_another_user(peer_uid: int | None) -> None:
    with pytest.raises(AuthenticationError, match="there is no secret"):
        near(None, peer_uid=peer_uid).start()
    hello = near(None, peer_uid=os.getuid()).start() or b""
    with pytest.raises(AuthenticationError, match="there is no secret"):
        far(None, peer_uid=peer_uid).receive(hello)


def test_handshake_empty_secret_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        near(b"")


def test_handshake_reflected_hello_is_refused() -> None:
    a = near()
    with pytest.raises(AuthenticationError, match="our own words"):
        a.receive(a.start() or b"")


def test_handshake_reflected_proof_is_refused() -> None:
    a, b = near(), far()
    hello, _ = b.receive(a.start() or b"")
    proof, _ = a.receive(hello or b"")
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        a.receive(proof or b"")


def test_handshake_replayed_attempt_is_refused() -> None:
    first, _, proof, _ = run(near(), far())
    b = far()
    b.receive(first)
    with pytest.raises(AuthenticationError, match="does not know the secret"):
        b.receive(proof)


def test_handshake_message_after_the_end_is_refused() -> None:
    a, b = near(), far()
    messages = run(a, b)
    with pytest.raises(AuthenticationError, match="after the end"):
        b.receive(messages[2])


def test_nonces_are_never_the_same() -> None:
    assert len({near().start() for _ in range(100)}) == 100


@given(st.integers(0, 3), st.integers(0, 10_000), st.integers(1, 255))
def test_handshake_any_byte_changed_on_the_way_is_refused(
    number: int, position: int, change: int
) -> None:
    def disturb(turn: int, message: bytes) -> bytes:
        changed = bytearray(message)
        if turn == number:
            changed[position % len(changed)] ^= change
        return bytes(changed)

    with pytest.raises(AuthenticationError):
        run(near(), far(), disturb)


@given(st.binary(max_size=MAX_HANDSHAKE_BYTES))
def test_handshake_any_bytes_of_a_stranger_are_refused(data: bytes) -> None:
    for side in (near(), far()):
        with pytest.raises(AuthenticationError):
            side.receive(data)


@given(st.binary(max_size=64))
def test_handshake_any_bytes_for_a_proof_are_refused(data: bytes) -> None:
    a, b = near(), far()
    b.receive(a.start() or b"")
    with pytest.raises(AuthenticationError):
        b.receive(data)
