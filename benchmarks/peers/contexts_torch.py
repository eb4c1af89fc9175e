"""PyTorch's distributed autograd: a client and three servers, the default backend."""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import measure

NAMES = ("client", "server0", "server1", "server2")
SENDS = 1000
THREADS, STEPS = 20, 5


def double(value):
    return value * 2.0


def join(name: str, folder: str) -> None:
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/meeting")
    rpc.init_rpc(name, rank=NAMES.index(name), world_size=len(NAMES), rpc_backend_options=options)


class ContextsPeer(measure.Peer):
    def __init__(self) -> None:
        import torch
        import torch.distributed.autograd as dist_autograd
        from torch.distributed import rpc

        self.version = torch.__version__
        self.torch, self.rpc, self.dist_autograd = torch, rpc, dist_autograd
        self.folder = tempfile.TemporaryDirectory(prefix="bench-torch-")
        self.servers = [measure.start_server("serve", name, self.folder.name) for name in NAMES[1:]]
        join("client", self.folder.name)
        self.leaf = torch.ones(1, requires_grad=True)
        self.pool = ThreadPoolExecutor(THREADS)
        self.time_threads_20()

    def close(self) -> None:
        self.pool.shutdown()
        self.rpc.shutdown()
        for server in self.servers:
            server.wait(30)
        self.folder.cleanup()

    def time_sends_1000(self) -> None:
        with self.dist_autograd.context() as context_id:
            calls = [self.rpc.rpc_async("server0", double, args=(self.leaf,)) for _ in range(SENDS)]
            loss = calls[0].wait()
            for call in calls[1:]:
                loss = loss + call.wait()
            self.dist_autograd.backward(context_id, [loss.sum()])
            self.dist_autograd.get_gradients(context_id)

    def train(self, thread: int) -> None:
        leaf = self.torch.ones(1, requires_grad=True)
        for _ in range(STEPS):
            with self.dist_autograd.context() as context_id:
                loss = leaf.sum()
                for name in NAMES[1:]:
                    loss = loss + self.rpc.rpc_sync(name, double, args=(leaf,)).sum()
                self.dist_autograd.backward(context_id, [loss])
                self.dist_autograd.get_gradients(context_id)

    def time_threads_20(self) -> None:
        list(self.pool.map(self.train, range(THREADS)))


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        from torch.distributed import rpc

        measure.end_with_parent()
        join(sys.argv[2], sys.argv[3])
        rpc.shutdown()
    else:
        measure.serve(ContextsPeer)


if __name__ == "__main__":
    main()
