"""mpi4py: rank 0 calls, rank 1 serves. ``mpi_peer.py objects`` pickles (send/recv),
``mpi_peer.py buffers`` moves arrays between fixed buffers (Send/Recv).

Run under ``mpiexec -n 2``. A waiting MPI process polls at full speed, so between two rounds
the server waits on a named pipe instead, and the other systems have the machine.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

import measure

SIZES = {
    "echo_small": 4,
    "echo_16mb": 16 * 2**20,
    "echo_64mb": 64 * 2**20,
    "echo_256mb": 256 * 2**20,
}
FUNCTIONS = {"noop": lambda: None, "echo": lambda value: value}


class MpiPeer(measure.Peer):
    """What both forms share: waking the server for a round and sending it to sleep again."""

    def __init__(self) -> None:
        from mpi4py import MPI, __version__

        if MPI.COMM_WORLD.size != 2:
            raise RuntimeError("cannot measure MPI: run this under mpiexec -n 2")
        library = MPI.Get_library_version().split(",")[0]
        self.version = f"{__version__}, {library}"
        self.world = MPI.COMM_WORLD
        self.folder = tempfile.TemporaryDirectory(prefix="bench-mpi-")
        path = os.path.join(self.folder.name, "wake")
        os.mkfifo(path)
        self.world.send(path, 1)
        self.pipe = open(path, "w", buffering=1)  # noqa: SIM115 (lives as long as the peer)

    @contextlib.contextmanager
    def awake(self, case: str) -> Iterator[None]:
        self.pipe.write(case + "\n")
        try:
            yield
        finally:
            self.sleep()

    def sleep(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.pipe.close()
        self.folder.cleanup()


class Objects(MpiPeer):
    """A call as a pickled (function name, arguments); the answer as a pickled value."""

    def __init__(self) -> None:
        import numpy as np

        super().__init__()
        self.small = np.zeros(1, np.float32)
        self.large = np.ones(4 * 2**20, np.float32)
        self.larger = np.ones(16 * 2**20, np.float32)
        self.largest = np.ones(64 * 2**20, np.float32)

    def sleep(self) -> None:
        self.world.send(None, 1)

    def call(self, function: str, *arguments: object) -> object:
        self.world.send((function, arguments), 1)
        return self.world.recv(source=1)

    def in_flight(self, count: int, function: str, *arguments: object) -> None:
        sent = [self.world.isend((function, arguments), 1) for _ in range(count)]
        for request in sent:
            self.world.recv(source=1)
            request.wait()

    def time_noop(self) -> None:
        self.call("noop")

    def time_echo_small(self) -> None:
        self.call("echo", self.small)

    def time_noop_1000_in_flight(self) -> None:
        self.in_flight(1000, "noop")

    def time_echo_1000_in_flight(self) -> None:
        self.in_flight(1000, "echo", self.small)

    def time_echo_16mb(self) -> None:
        self.call("echo", self.large)

    def time_echo_64mb(self) -> None:
        self.call("echo", self.larger)

    def time_echo_256mb(self) -> None:
        self.call("echo", self.largest)

    @staticmethod
    def serve_round(world: object, case: str) -> None:
        while (message := world.recv(source=0)) is not None:
            function, arguments = message
            world.send(FUNCTIONS[function](*arguments), 0)


class Buffers(MpiPeer):
    """Bytes from one fixed buffer to another and back: no call, no allocation, no type."""

    @contextlib.contextmanager
    def awake(self, case: str) -> Iterator[None]:
        self.buffer = bytearray(b"\1") * SIZES[case]
        with super().awake(case):
            yield

    def sleep(self) -> None:
        self.world.Send(bytearray(0), 1)

    def echo(self) -> None:
        self.world.Send(self.buffer, 1)
        self.world.Recv(self.buffer, 1)

    time_echo_small = time_echo_16mb = time_echo_64mb = time_echo_256mb = echo

    @staticmethod
    def serve_round(world: object, case: str) -> None:
        from mpi4py import MPI

        buffer, status = bytearray(b"\1") * SIZES[case], MPI.Status()
        while True:
            world.Recv(buffer, 0, status=status)
            if status.Get_count(MPI.BYTE) == 0:
                return
            world.Send(buffer, 0)


def serve_rank_1(form: type[MpiPeer]) -> None:
    from mpi4py import MPI

    with open(MPI.COMM_WORLD.recv(source=0)) as pipe:
        for line in pipe:
            form.serve_round(MPI.COMM_WORLD, line.strip())


def main() -> None:
    form = {"objects": Objects, "buffers": Buffers}[sys.argv[1]]
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
        measure.serve(form)
    else:
        serve_rank_1(form)


if __name__ == "__main__":
    main()
