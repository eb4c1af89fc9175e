"""distgrad: two processes, the transport named on the command line (unix or tcp)."""

from __future__ import annotations

import sys
import tempfile

import measure
import numpy as np

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc

FLOATS_16MB = 4 * 2**20


@rpc.expose
def noop():
    return None


@rpc.expose
def echo(value):
    return value


@rpc.expose
def double(value):
    return value * 2.0


@rpc.expose
def chain(value, hops):
    """Pass ``value`` to and fro between the two workers, ``hops`` calls deep."""
    other = "client" if rpc.get_worker_info().name == "server" else "server"
    value = value * 1.01
    return value if hops == 0 else rpc.rpc_sync(other, chain, args=(value, hops - 1))


def join(name: str, transport: str, folder: str) -> None:
    options = rpc.RpcBackendOptions(init_method=f"file://{folder}/meeting", secret="benchmark")
    rank = ("client", "server").index(name)
    rpc.init_rpc(name, transport, rank=rank, world_size=2, rpc_backend_options=options)


class DistgradPeer(measure.Peer):
    def __init__(self) -> None:
        self.version = dg.__version__
        self.folder = tempfile.TemporaryDirectory(prefix="bench-distgrad-")
        self.server = measure.start_server(sys.argv[1], "server", self.folder.name)
        join("client", sys.argv[1], self.folder.name)
        self.small = dg.zeros(1, dtype=np.float32)
        self.leaf = dg.ones(1, dtype=np.float32, requires_grad=True)
        self.large = dg.zeros(FLOATS_16MB, dtype=np.float32)
        self.larger = dg.zeros(4 * FLOATS_16MB, dtype=np.float32)
        self.large_leaf = dg.ones(FLOATS_16MB, dtype=np.float32, requires_grad=True)
        for _ in range(100):  # all connections are made before the harness stops us
            self.time_noop()

    def close(self) -> None:
        rpc.shutdown()
        self.server.wait(30)
        self.folder.cleanup()

    def time_noop(self) -> None:
        rpc.rpc_sync("server", noop)

    def time_echo_small(self) -> None:
        rpc.rpc_sync("server", echo, args=(self.small,))

    def time_noop_1000_in_flight(self) -> None:
        for future in [rpc.rpc_async("server", noop) for _ in range(1000)]:
            future.wait()

    def time_echo_1000_in_flight(self) -> None:
        rpc_async, small = rpc.rpc_async, self.small
        for future in [rpc_async("server", echo, args=(small,)) for _ in range(1000)]:
            future.wait()

    def time_echo_16mb(self) -> None:
        rpc.rpc_sync("server", echo, args=(self.large,))

    def time_echo_64mb(self) -> None:
        rpc.rpc_sync("server", echo, args=(self.larger,))

    def time_remote_to_here(self) -> None:
        rpc.remote("server", echo, args=(self.small,)).to_here()

    def time_backward_call(self) -> None:
        with dist_autograd.context() as context_id:
            loss = rpc.rpc_sync("server", double, args=(self.leaf,)).sum()
            dist_autograd.backward(context_id, [loss])
            dist_autograd.get_gradients(context_id)

    def time_backward_chain_9(self) -> None:
        with dist_autograd.context() as context_id:
            loss = rpc.rpc_sync("server", chain, args=(self.leaf, 8)).sum()
            dist_autograd.backward(context_id, [loss])
            dist_autograd.get_gradients(context_id)

    def time_backward_16mb(self) -> None:
        with dist_autograd.context() as context_id:
            loss = rpc.rpc_sync("server", double, args=(self.large_leaf,)).sum()
            dist_autograd.backward(context_id, [loss])
            dist_autograd.get_gradients(context_id)


def main() -> None:
    if sys.argv[2:3] == ["server"]:
        measure.end_with_parent()
        join("server", sys.argv[1], sys.argv[3])
        rpc.shutdown()
    else:
        measure.serve(DistgradPeer)


if __name__ == "__main__":
    main()
