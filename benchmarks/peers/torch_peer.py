"""PyTorch's RPC and distributed autograd: two processes, the default TensorPipe backend."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Iterator

import measure

FLOATS_16MB = 4 * 2**20
PARAMETERS = 100  # of the optimizers, half of them on each worker


def noop():
    return None


def echo(value):
    return value


def size_of(value):
    return len(value)


def double(value):
    return value * 2.0


def chain(value, hops):
    """Pass ``value`` to and fro between the two workers, ``hops`` calls deep."""
    from torch.distributed import rpc

    other = "client" if rpc.get_worker_info().name == "server" else "server"
    value = value * 1.01
    return value if hops == 0 else rpc.rpc_sync(other, chain, args=(value, hops - 1))


class Counter:
    """A value with a method, and state."""

    def __init__(self):
        self.value = 0

    def add(self, amount):
        self.value += amount
        return self.value


@functools.cache
def weights():
    import torch

    return [torch.ones(64, requires_grad=True) for _ in range(PARAMETERS // 2)]


def refer_to_weights():
    from torch.distributed import rpc

    return [rpc.RRef(weight) for weight in weights()]


def sum_weights():
    return sum(weight.sum() for weight in weights())


def join(name: str, folder: str) -> None:
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/meeting")
    rank = ("client", "server").index(name)
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


class TorchPeer(measure.Peer):
    def __init__(self) -> None:
        import torch
        import torch.distributed.autograd as dist_autograd
        from torch.distributed import rpc

        self.version = torch.__version__
        self.torch, self.rpc, self.dist_autograd = torch, rpc, dist_autograd
        self.folder = tempfile.TemporaryDirectory(prefix="bench-torch-")
        self.server = measure.start_server("server", self.folder.name)
        join("client", self.folder.name)
        self.small = torch.zeros(1)
        self.leaf = torch.ones(1, requires_grad=True)
        self.large = torch.ones(FLOATS_16MB)
        self.larger = torch.ones(4 * FLOATS_16MB)
        self.largest = torch.ones(16 * FLOATS_16MB)
        self.large_leaf = torch.ones(FLOATS_16MB, requires_grad=True)
        self.counter = rpc.remote("server", Counter)
        self.optimizers = {}
        self.context_id = 0
        self.time_noop()

    @contextlib.contextmanager
    def awake(self, case: str) -> Iterator[None]:
        if not case.startswith("step_"):
            yield
            return
        if case not in self.optimizers:
            from torch import optim
            from torch.distributed.optim import DistributedOptimizer

            kind = {"step_sgd_100": optim.SGD, "step_adam_100": optim.Adam}[case]
            rrefs = refer_to_weights() + self.rpc.rpc_sync("server", refer_to_weights)
            self.optimizers[case] = DistributedOptimizer(kind, rrefs, lr=1e-6)
        with self.dist_autograd.context() as self.context_id:
            loss = sum_weights() + self.rpc.rpc_sync("server", sum_weights)
            self.dist_autograd.backward(self.context_id, [loss])
            yield

    def close(self) -> None:
        self.optimizers.clear()
        del self.counter
        self.rpc.shutdown()
        self.server.wait(30)
        self.folder.cleanup()

    def time_noop(self) -> None:
        self.rpc.rpc_sync("server", noop)

    def time_echo_small(self) -> None:
        self.rpc.rpc_sync("server", echo, args=(self.small,))

    def time_noop_1000_in_flight(self) -> None:
        for future in [self.rpc.rpc_async("server", noop) for _ in range(1000)]:
            future.wait()

    def time_echo_1000_in_flight(self) -> None:
        rpc_async, small = self.rpc.rpc_async, self.small
        for future in [rpc_async("server", echo, args=(small,)) for _ in range(1000)]:
            future.wait()

    def time_echo_16mb(self) -> None:
        self.rpc.rpc_sync("server", echo, args=(self.large,))

    def time_echo_64mb(self) -> None:
        self.rpc.rpc_sync("server", echo, args=(self.larger,))

    def time_echo_256mb(self) -> None:
        self.rpc.rpc_sync("server", echo, args=(self.largest,))

    def tail_noop_p99(self, budget_s: float) -> float:
        return measure.tail(self.time_noop, budget_s)

    @functools.cached_property
    def gigabyte(self):
        return self.torch.ones(2**30, dtype=self.torch.uint8)

    def transfer_1gb(self) -> None:
        self.rpc.rpc_sync("server", size_of, args=(self.gigabyte,))

    def tail_noop_p99_beside_1gb(self, budget_s: float) -> tuple[float, float]:
        return measure.tail_beside(self.time_noop, self.transfer_1gb, budget_s)

    def time_remote_to_here(self) -> None:
        self.rpc.remote("server", echo, args=(self.small,)).to_here()

    def time_proxy_call(self) -> None:
        self.counter.rpc_sync().add(1)

    def time_step_sgd_100(self) -> None:
        self.optimizers["step_sgd_100"].step(self.context_id)

    def time_step_adam_100(self) -> None:
        self.optimizers["step_adam_100"].step(self.context_id)

    def time_backward_call(self) -> None:
        with self.dist_autograd.context() as context_id:
            loss = self.rpc.rpc_sync("server", double, args=(self.leaf,)).sum()
            self.dist_autograd.backward(context_id, [loss])
            self.dist_autograd.get_gradients(context_id)

    def time_backward_chain_9(self) -> None:
        with self.dist_autograd.context() as context_id:
            loss = self.rpc.rpc_sync("server", chain, args=(self.leaf, 8)).sum()
            self.dist_autograd.backward(context_id, [loss])
            self.dist_autograd.get_gradients(context_id)

    def time_backward_16mb(self) -> None:
        with self.dist_autograd.context() as context_id:
            loss = self.rpc.rpc_sync("server", double, args=(self.large_leaf,)).sum()
            self.dist_autograd.backward(context_id, [loss])
            self.dist_autograd.get_gradients(context_id)

    def time_backward_16mb_weighted(self) -> None:
        with self.dist_autograd.context() as context_id:
            doubled = self.rpc.rpc_sync("server", double, args=(self.large_leaf,))
            self.dist_autograd.backward(context_id, [(doubled * self.large).sum()])
            self.dist_autograd.get_gradients(context_id)


def main() -> None:
    if sys.argv[1:2] == ["server"]:
        from torch.distributed import rpc

        measure.end_with_parent()
        join("server", sys.argv[2])
        rpc.shutdown()
    else:
        measure.serve(TorchPeer)


if __name__ == "__main__":
    main()
