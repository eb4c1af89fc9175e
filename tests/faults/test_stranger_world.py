"""A stranger at the door of a running world: the connection closes, the world goes on."""

import os
import socket
import struct

import pytest

from distgrad import rpc
from distgrad.config import config
from distgrad.testing import World


@rpc.expose
def double(x):
    return 2 * x


def address(rank):
    return rpc.current_worker().agent.links.listeners[0].address


def call_neighbour(rank):
    return rpc.rpc_sync(1 - rank, double, (rank,))


def calls_in_flight(rank):
    return rpc.debug_info()["rpc.connections"]


def knock(where, data):
    """Send bytes to a listener; return what it says before it closes the connection."""
    scheme, _, rest = where.partition("://")
    if scheme == "unix":
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect(rest)
    else:
        host, _, port = rest.rpartition(":")
        stranger = socket.create_connection((host, int(port)))
    with stranger:
        stranger.settimeout(20)
        heard = b""
        try:
            stranger.sendall(data)
            while piece := stranger.recv(65536):
                heard += piece
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed while we were still sending: what we came for
        return heard


HELLO = b"DG1\0\1" + bytes(32) + os.urandom(32) + struct.pack("<QQ", 0, 1)

STRANGERS = {
    "silence then nothing": b"\0",
    "a megabyte of random bytes": os.urandom(1 << 20),
    "a hello without the secret": struct.pack("<H", len(HELLO)) + HELLO,
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100,
    "an oversized handshake": struct.pack("<H", 0xFFFF) + bytes(4096),
}


@pytest.mark.parametrize("what", list(STRANGERS))
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_stranger_changes_nothing(transport, what, monkeypatch):
    monkeypatch.setattr(config, "handshake_timeout", 0.5)
    with World(2, transport=transport, secret="s3cret") as world:
        assert world.run(call_neighbour) == [0, 2]
        for where in world.run(address):
            heard = knock(where, STRANGERS[what])
            assert b"s3cret" not in heard
        assert world.run(call_neighbour) == [0, 2]
        assert world.run(calls_in_flight) == [1, 1]
