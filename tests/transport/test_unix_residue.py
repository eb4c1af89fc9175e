"""Nothing stays in the file system, however a worker ends."""

import fcntl
import os
import signal
import socket
import tempfile
from pathlib import Path

import pytest

from distgrad import rpc
from distgrad.errors import WorkerLostError
from distgrad.testing import World
from distgrad.transport.registry import transport_for


@pytest.fixture
def sockets(monkeypatch):
    """Let all sockets be made in a directory of this test alone, and list them."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield lambda: list(Path(folder).glob("distgrad-*/s"))


@rpc.expose
def nothing():
    return None


def call_neighbour(rank):
    rpc.rpc_sync(1 - rank, nothing)


def notice_loss(rank):
    lost = rpc.current_worker().agent.links.lost
    while 1 not in lost:
        with pytest.raises(WorkerLostError, match="worker1"):
            rpc.rpc_sync(1, nothing)


def test_killed_worker_leaves_no_socket_once_its_loss_is_noticed(sockets):
    with World(2, transport="unix") as world:
        world.run(call_neighbour)
        world.kill(1)
        world.run(notice_loss, ranks=[0])
    assert sockets() == []


def test_socket_of_a_process_that_was_killed_is_swept_up_by_the_next_one(sockets):
    with World(1, transport="unix") as world:
        world.run(keep_nothing)
        world.kill(0)
    assert len(sockets()) == 1
    with World(1, transport="unix") as world:  # its process looks around before it listens
        world.run(keep_nothing)
        assert len(sockets()) == 1
    assert sockets() == []


def keep_nothing(rank):
    return None


def fork_a_child_that_stays(rank):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"here")  # so what happens at a fork is done
        signal.pause()
    assert os.read(reading, 4) == b"here"
    os.close(reading)
    os.close(writing)
    return child


def test_child_of_a_fork_does_not_keep_the_lock(sockets):
    with World(1, transport="unix") as world:
        (child,) = world.run(fork_a_child_that_stays)
        world.kill(0)
    try:
        (left,) = sockets()
        transport_for("unix").tidy(f"unix://{left}")
        assert sockets() == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_tidy_spares_sockets_in_use_and_other_files(tmp_path):
    unix = transport_for("unix")
    home = tmp_path / "distgrad-home"
    home.mkdir()
    (home / "file").write_text("precious")
    for path in (home / "file", home / "absent", tmp_path / "s"):
        unix.tidy(f"unix://{path}")
    assert (home / "file").read_text() == "precious"
    (home / "file").unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(home / "s"))
        lock = os.open(home, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        unix.tidy(f"unix://{home / 's'}")
        assert (home / "s").exists()
        os.close(lock)
    unix.tidy(f"unix://{home / 's'}")
    assert not home.exists()
    with socket.socket(socket.AF_UNIX) as elsewhere:
        elsewhere.bind(str(tmp_path / "s"))
    unix.tidy(f"unix://{tmp_path / 's'}")
    assert (tmp_path / "s").exists()
