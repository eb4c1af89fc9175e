"""Nothing stays in the file system, however a worker ends."""

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


def test_tidy_spares_sockets_in_use_and_other_files(tmp_path):
    unix = transport_for("unix")
    file = tmp_path / "file"
    file.write_text("precious")
    unix.tidy(f"unix://{file}")
    unix.tidy(f"unix://{tmp_path / 'absent'}")
    assert file.read_text() == "precious"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        unix.tidy(f"unix://{tmp_path / 's'}")
        assert (tmp_path / "s").exists()
    unix.tidy(f"unix://{tmp_path / 's'}")
    assert not (tmp_path / "s").exists()
    assert tmp_path.exists()
