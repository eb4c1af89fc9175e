"""distgrad: a client and three servers, the transport named on the command line."""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import measure
import numpy as np

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc

NAMES = ("client", "server0", "server1", "server2")
SENDS = 1000
THREADS, STEPS = 20, 5


@rpc.expose
def double(value):
    return value * 2.0


def join(name: str, transport: str, folder: str) -> None:
    options = rpc.RpcBackendOptions(init_method=f"file://{folder}/meeting", secret="benchmark")
    rpc.init_rpc(
        name, transport, rank=NAMES.index(name), world_size=len(NAMES), rpc_backend_options=options
    )


class ContextsPeer(measure.Peer):
    def __init__(self) -> None:
        self.version = dg.__version__
        self.folder = tempfile.TemporaryDirectory(prefix="bench-distgrad-")
        transport = sys.argv[1]
        self.servers = [
            measure.start_server(transport, "serve", name, self.folder.name) for name in NAMES[1:]
        ]
        join("client", transport, self.folder.name)
        self.leaf = dg.ones(1, dtype=np.float32, requires_grad=True)
        self.pool = ThreadPoolExecutor(THREADS)
        for _ in range(10):
            self.time_threads_20()

    def close(self) -> None:
        self.pool.shutdown()
        rpc.shutdown()
        for server in self.servers:
            server.wait(30)
        self.folder.cleanup()

    def time_sends_1000(self) -> None:
        with dist_autograd.context() as context_id:
            calls = [rpc.rpc_async("server0", double, args=(self.leaf,)) for _ in range(SENDS)]
            loss = calls[0].wait()
            for call in calls[1:]:
                loss = loss + call.wait()
            dist_autograd.backward(context_id, [loss.sum()])
            dist_autograd.get_gradients(context_id)

    def train(self, thread: int) -> None:
        leaf = dg.ones(1, dtype=np.float32, requires_grad=True)
        for _ in range(STEPS):
            with dist_autograd.context() as context_id:
                loss = leaf.sum()
                for name in NAMES[1:]:
                    loss = loss + rpc.rpc_sync(name, double, args=(leaf,)).sum()
                dist_autograd.backward(context_id, [loss])
                dist_autograd.get_gradients(context_id)

    def time_threads_20(self) -> None:
        list(self.pool.map(self.train, range(THREADS)))


def main() -> None:
    if sys.argv[2:3] == ["serve"]:
        measure.end_with_parent()
        join(sys.argv[3], sys.argv[1], sys.argv[4])
        rpc.shutdown()
    else:
        measure.serve(ContextsPeer)


if __name__ == "__main__":
    main()
