"""Nothing stays in the file system, however a worker ends."""

import socket
import tempfile
from pathlib import Path

import pytest

from distgrad import rpc
from distgrad.errors import WorkerLostError
from distgrad.testing import World
from distgrad.transport.registry import transport_for


def sockets():
    return set(Path(tempfile.gettempdir()).glob("distgrad-*/s"))


@rpc.expose
def nothing():
    return None


def call_neighbour(rank):
    rpc.rpc_sync(1 - rank, nothing)


def notice_loss(rank):
    with pytest.raises(WorkerLostError):
        while True:
            rpc.rpc_sync(1, nothing)


def test_killed_worker_leaves_no_socket_once_its_loss_is_noticed():
    before = sockets()
    with World(2, transport="unix") as world:
        world.run(call_neighbour)
        world.kill(1)
        world.run(notice_loss, ranks=[0])
        assert len(sockets() - before) == 1  # that of the living
    assert sockets() <= before


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
