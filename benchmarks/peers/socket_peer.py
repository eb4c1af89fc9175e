"""The control: bytes to and fro over a blocking Unix socket, plain Python on both sides.

No call, no type, no graph: what the machine charges for the messages alone. The cases of
bench_backward exchange as many messages as the forward and backward pass need at least.
``socket_peer.py together`` binds both processes to one core, ``socket_peer.py apart`` to two:
waking a process on another core is what a blocking round trip pays for.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import tempfile

import measure

SMALL, LARGE, LARGER = 4, 16 * 2**20, 64 * 2**20


def receive(link: socket.socket, view: memoryview) -> None:
    while len(view):
        count = link.recv_into(view)
        if count == 0:
            raise EOFError("the other side is gone")
        view = view[count:]


class SocketPeer(measure.Peer):
    def __init__(self) -> None:
        self.version = f"Python {platform.python_version()}"
        self.folder = tempfile.TemporaryDirectory(prefix="bench-socket-")
        path = os.path.join(self.folder.name, "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            self.server = measure.start_server(sys.argv[1], "server", path)
            bind(0)
            self.link, _ = listener.accept()
        self.buffers = {size: memoryview(bytearray(size)) for size in (SMALL, LARGE, LARGER)}

    def close(self) -> None:
        self.link.close()
        self.server.wait(10)
        self.folder.cleanup()

    def echo(self, size: int) -> None:
        """Send ``size`` bytes and get them back; the header is the size."""
        buffer = self.buffers[size]
        if size <= 4096:
            self.link.sendall(size.to_bytes(8, "little") + buffer)
        else:
            self.link.sendall(size.to_bytes(8, "little"))
            self.link.sendall(buffer)
        receive(self.link, buffer)

    def time_noop(self) -> None:
        self.echo(SMALL)

    def time_echo_small(self) -> None:
        self.echo(SMALL)

    def time_echo_16mb(self) -> None:
        self.echo(LARGE)

    def time_echo_64mb(self) -> None:
        self.echo(LARGER)

    def time_backward_call(self) -> None:
        for _ in range(2):
            self.echo(SMALL)

    def time_backward_chain_9(self) -> None:
        for _ in range(18):
            self.echo(SMALL)

    def time_backward_16mb(self) -> None:
        self.time_backward_16mb_weighted()

    def time_backward_16mb_weighted(self) -> None:
        for _ in range(2):
            self.echo(LARGE)


def bind(position: int) -> None:
    """Bind this process to the first or last core it may use, both to the first if together."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0 if sys.argv[1] == "together" else position]})


def serve_echo(path: str) -> None:
    link = socket.socket(socket.AF_UNIX)
    link.connect(path)
    header = memoryview(bytearray(8))
    buffers: dict[int, memoryview] = {}
    try:
        while True:
            receive(link, header)
            size = int.from_bytes(header, "little")
            buffer = buffers.setdefault(size, memoryview(bytearray(size)))
            receive(link, buffer)
            link.sendall(buffer)
    except EOFError:
        link.close()


def main() -> None:
    if sys.argv[2:3] == ["server"]:
        measure.end_with_parent()
        bind(-1)
        serve_echo(sys.argv[3])
    else:
        measure.serve(SocketPeer)


if __name__ == "__main__":
    main()
