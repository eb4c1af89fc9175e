"""pyzmq with pickle 5: a call is a pickled (function name, arguments) over an ipc socket."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile

import measure

FUNCTIONS = {"noop": lambda: None, "echo": lambda value: value}


class ZmqPeer(measure.Peer):
    def __init__(self) -> None:
        import numpy as np
        import zmq

        self.version = f"{zmq.__version__}, ZeroMQ {zmq.zmq_version()}"
        self.folder = tempfile.TemporaryDirectory(prefix="bench-zmq-")
        address = "ipc://" + os.path.join(self.folder.name, "socket")
        self.server = measure.start_server("server", address)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.set_hwm(0)
        self.socket.connect(address)
        self.small = np.zeros(1, np.float32)
        self.large = np.ones(4 * 2**20, np.float32)
        self.larger = np.ones(16 * 2**20, np.float32)

    def close(self) -> None:
        self.socket.close(0)
        self.server.stdin.close()
        self.server.wait(10)
        self.folder.cleanup()

    def send(self, function: str, *arguments: object) -> None:
        self.socket.send(pickle.dumps((function, arguments), 5), copy=False)

    def receive(self) -> object:
        return pickle.loads(self.socket.recv(copy=False).buffer)

    def call(self, function: str, *arguments: object) -> object:
        self.send(function, *arguments)
        return self.receive()

    def in_flight(self, count: int, function: str, *arguments: object) -> None:
        for _ in range(count):
            self.send(function, *arguments)
        for _ in range(count):
            self.receive()

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


def serve_calls(address: str) -> None:
    import zmq

    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.bind(address)
    while True:
        sender, message = socket.recv_multipart(copy=False)
        function, arguments = pickle.loads(message.buffer)
        answer = pickle.dumps(FUNCTIONS[function](*arguments), 5)
        socket.send_multipart([sender, answer], copy=False)


def main() -> None:
    if sys.argv[1:2] == ["server"]:
        measure.end_with_parent()
        serve_calls(sys.argv[2])
    else:
        measure.serve(ZmqPeer)


if __name__ == "__main__":
    main()
