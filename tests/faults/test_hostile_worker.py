"""A worker of this world turns hostile: it costs its peers its own connection, and no more.

Real processes: worker 0 is attacked, worker 1 attacks, worker 2 is an honest witness.
"""

import ctypes
import faulthandler
import gc
import os
import random
import socket
import struct
import threading
import time
import traceback
from contextlib import suppress

import numpy as np
import pytest

from distgrad import rpc
from distgrad._codec import encode
from distgrad.config import config
from distgrad.errors import WorkerLostError
from distgrad.testing import World

PATIENCE_S = 30.0
PAGE = 4096
RING = 512 * 1024
#: By what the accepting side, here the attacker, produces and consumes.
PRODUCED, CONSUMED = PAGE, 3 * PAGE
RING_DATA = 5 * PAGE
FIELDS = {"tail": (0, 8), "starving": (64, 4), "head": (128, 8), "asleep": (192, 4)}
WORDS = (0, 1, 2, 63, 64, RING, RING + 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)

known = {"maps": [], "fds": []}  # of the attacker, before it has a connection


# -- what the workers do for each other ----------------------------------------------------


@rpc.expose
def double(x):
    return 2 * x


@rpc.expose
def total(array):
    """Read all of an array whose bytes may change meanwhile."""
    return float(np.asarray(array, np.uint8).sum())


@rpc.expose
def never():
    threading.Event().wait(PATIENCE_S)


# -- the attacker --------------------------------------------------------------------------


def mapped(name):
    """Return start and end of the mappings of memory files of a name."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if name in line:
                start, _, end = line.split()[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def sockets():
    """Return the descriptors that are sockets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.append(int(name))
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def remember(rank):
    """Note what belongs to nobody's connection."""
    known["maps"] = mapped("memfd:distgrad-")
    known["fds"] = sockets()


def new_memory(name):
    return [place for place in mapped(name) if place not in known["maps"]]


def peer_sockets():
    """Return the sockets of the connection; over TCP the lane is the second."""
    return [socket.socket(fileno=os.dup(fd)) for fd in sockets() if fd not in known["fds"]]


def poke(address, data):
    ctypes.memmove(address, data, len(data))


def scribble_fields(dice, start, blocks):
    for block in blocks:
        for offset, nbytes in dice.sample(list(FIELDS.values()), dice.randint(1, 4)):
            value = dice.choice((*WORDS, dice.getrandbits(64)))
            poke(start + block + offset, value.to_bytes(8, "little")[:nbytes])


def attack_indices(dice, sock):
    [(start, _)] = new_memory("distgrad-ring")
    for _ in range(50):
        scribble_fields(dice, start, (PRODUCED, CONSUMED))
        sock.send(b"\1")


def attack_data(dice, sock):
    [(start, _)] = new_memory("distgrad-ring")
    length = dice.choice((64, 1000, RING))
    poke(start + RING_DATA, dice.randbytes(RING))
    tail = int.from_bytes(ctypes.string_at(start + PRODUCED, 8), "little")
    poke(start + PRODUCED, struct.pack("<Q", tail + length))
    sock.send(b"\1")


def attack_loans(dice, sock):
    """Records of loans that were never made, each a page of the ring."""
    [(start, _)] = new_memory("distgrad-ring")
    record = struct.pack(
        "<B3xIIIQQ32x",
        255,
        dice.choice((0, 5, 1023, 1024, 2**32 - 1)),
        dice.choice((0, 1, 2**32 - 1)),
        dice.choice((0, 1, 7, 2**32 - 1)),
        dice.choice((0, PAGE, 1, 2**20, 2**63)),
        dice.choice((0, 1, 2**20, 2**63, 2**64 - 1)),
    )
    tail = int.from_bytes(ctypes.string_at(start + PRODUCED, 8), "little")
    for number in range(2):
        at = (tail + 64 * number) % RING
        if at <= RING - 64:
            poke(start + RING_DATA + at, record)
    poke(start + PRODUCED, struct.pack("<Q", tail + 128))
    sock.send(b"\1")


def attack_arena(dice, sock):
    """Large arrays both ways, while all that is lent changes, and the words that return it."""
    [(start, _)] = new_memory("distgrad-ring")
    done = threading.Event()

    def scribble():
        while not done.is_set():
            for first, last in new_memory("distgrad-arena"):
                at = dice.randrange(first, last - PAGE)
                poke(at, dice.randbytes(PAGE))
            word = start + dice.choice((PRODUCED, CONSUMED)) + 256 + 4 * dice.randrange(8)
            poke(word, struct.pack("<I", dice.choice((0, 1, 2, 3, 2**32 - 1))))

    thread = threading.Thread(target=scribble)
    thread.start()
    calls = [rpc.rpc_async(0, total, (np.ones(200_000, np.uint8),)) for _ in range(30)]
    for call in calls:
        call.wait()
    done.set()
    thread.join()


def attack_lane(dice, sock, lane):
    """Payloads that are announced and do not come, that come unannounced, or from two threads."""
    array = np.ones(400_000, np.uint8)
    head = b"\xfe" + bytes(63) + bytes(encode(1, array).parts()[0])
    calls = [rpc.rpc_async(0, total, (array,)) for _ in range(dice.randrange(3))]
    for _ in range(dice.randint(1, 4)):
        which = dice.choice((sock, lane, lane))
        part = dice.choice((head, head[: dice.randrange(len(head))], dice.randbytes(70_000)))
        which.sendall(part if which is sock else dice.randbytes(dice.choice((1, 64, 300_000))))
    dice.choice((sock, lane)).shutdown(dice.choice((socket.SHUT_WR, socket.SHUT_RDWR)))
    for call in calls:
        with suppress(WorkerLostError):
            call.wait()


def attack_socket(dice, sock, *lane):
    sock.send(dice.choice((b"\x77", b"\1\1\3", dice.randbytes(1), dice.randbytes(5000))))


def attack_flood(dice, sock):
    """Descriptors that are no chunks."""
    with open("/dev/null") as nothing:
        for _ in range(10):
            socket.send_fds(sock, [b"\2"], [nothing.fileno()] * dice.randint(1, 3))


ATTACKS = {
    "indices": attack_indices,
    "data": attack_data,
    "loans": attack_loans,
    "arena": attack_arena,
    "socket": attack_socket,
    "lane": attack_lane,
    "descriptors": attack_flood,
}


@rpc.expose
def turn(kind, seed):
    """Attack the caller, then go."""
    try:
        faulthandler.disable()  # it may well pull the ground from under its own feet
        ATTACKS[kind](random.Random(seed), *peer_sockets())
    except OSError:  # it has closed the connection on us
        pass
    except BaseException:  # the answer of an attacker that has not attacked
        return traceback.format_exc()
    os._exit(0)


# -- who is attacked -----------------------------------------------------------------------


def held():
    """Count what a connection holds: descriptors, and mappings of shared memory."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(mapped("memfd:distgrad-"))


def settled(expected):
    """Whether no more is held, at last; the witness is served meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert rpc.rpc_sync(2, double, (21,)) == 42
        if all(now <= then for now, then in zip(held(), expected, strict=True)):
            return True
    return False


def endure(rank, kind, seed, large):
    """Be attacked; tell how the calls to the attacker ended and whether anything is left."""
    assert total(rpc.rpc_sync(2, double, (np.ones(100_000, np.uint8),))) == 200_000
    expected = held()
    if large:
        assert rpc.rpc_sync(1, total, (np.ones(100_000, np.uint8),)) == 100_000
        assert rpc.rpc_sync(1, double, (np.ones(100_000, np.uint8),)).sum() == 200_000
    calls = [rpc.rpc_async(1, never, timeout=PATIENCE_S)]
    calls.append(rpc.rpc_async(1, turn, (kind, seed), timeout=PATIENCE_S))
    ends = []
    for call in calls:
        try:
            answer = call.wait()
            ends.append(answer)
        except WorkerLostError:
            ends.append("lost")
    del calls, call
    try:
        rpc.rpc_sync(1, double, (1,))
    except WorkerLostError:
        ends.append("lost")
    return ends, settled(expected), held(), expected


def assail(transport, kind, seed, large=True):
    with World(3, transport=transport, secret="s3cret") as world:
        world.run(remember, ranks=[1])
        ends, clean, now, before = world.run(endure, kind, seed, large, ranks=[0])[0]
        assert ends == ["lost"] * 3
        assert clean, f"descriptors and mappings: {now} after, {before} before"
        assert world.run(witness, ranks=[2]) == [42]
        world.kill(1)


def witness(rank):
    """The witness calls, too."""
    return rpc.rpc_sync(0, double, (21,))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [kind for kind in ATTACKS if kind != "lane"])
def test_hostile_worker_with_shared_memory_costs_its_own_connection_only(kind, seed):
    assail("unix", kind, seed)


@pytest.mark.parametrize(
    ("transport", "kind"), [("tcp", "socket"), ("unix", "socket"), ("tcp", "lane")]
)
@pytest.mark.parametrize("seed", range(3))
def test_hostile_worker_on_a_socket_costs_its_own_connection_only(
    transport, kind, seed, monkeypatch
):
    monkeypatch.setattr(config, "shared_memory", False)
    assail(transport, kind, seed)
