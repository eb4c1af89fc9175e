"""distgrad: two processes, the transport named on the command line (unix or tcp)."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Iterator

import measure
import numpy as np

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import optim, rpc

FLOATS_16MB = 4 * 2**20
PARAMETERS = 100  # of the optimizers, half of them on each worker

weights = [dg.ones(64, dtype=np.float32, requires_grad=True) for _ in range(PARAMETERS // 2)]


@rpc.expose
def noop():
    return None


@rpc.expose
def echo(value):
    return value


@rpc.expose
def size_of(value):
    return len(value)


@rpc.expose
def double(value):
    return value * 2.0


@rpc.expose
def chain(value, hops):
    """Pass ``value`` to and fro between the two workers, ``hops`` calls deep."""
    other = "client" if rpc.get_worker_info().name == "server" else "server"
    value = value * 1.01
    return value if hops == 0 else rpc.rpc_sync(other, chain, args=(value, hops - 1))


@rpc.expose
class Counter:
    """A value with a method, and state."""

    def __init__(self):
        self.value = 0

    def add(self, amount):
        self.value += amount
        return self.value


@rpc.expose
def refer_to_weights():
    return [rpc.RRef(weight) for weight in weights]


@rpc.expose
def sum_weights():
    return sum(weight.sum() for weight in weights)


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
        self.large = dg.ones(FLOATS_16MB, dtype=np.float32)
        self.larger = dg.ones(4 * FLOATS_16MB, dtype=np.float32)
        self.largest = dg.ones(16 * FLOATS_16MB, dtype=np.float32)
        self.large_leaf = dg.ones(FLOATS_16MB, dtype=np.float32, requires_grad=True)
        self.counter = rpc.remote("server", Counter)
        self.optimizers: dict[str, optim.DistributedOptimizer] = {}
        self.context_id = 0
        for _ in range(100):  # all connections are made before the harness stops us
            self.time_noop()

    @contextlib.contextmanager
    def awake(self, case: str) -> Iterator[None]:
        if not case.startswith("step_"):
            yield
            return
        if case not in self.optimizers:
            kind = {"step_sgd_100": optim.SGD, "step_adam_100": optim.Adam}[case]
            rrefs = refer_to_weights() + rpc.rpc_sync("server", refer_to_weights)
            self.optimizers[case] = optim.DistributedOptimizer(kind, rrefs, lr=1e-6)
        with dist_autograd.context() as self.context_id:
            loss = sum_weights() + rpc.rpc_sync("server", sum_weights)
            dist_autograd.backward(self.context_id, [loss])
            yield

    def close(self) -> None:
        self.optimizers.clear()
        del self.counter
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

    def time_echo_256mb(self) -> None:
        rpc.rpc_sync("server", echo, args=(self.largest,))

    def tail_noop_p99(self, budget_s: float) -> float:
        return measure.tail(self.time_noop, budget_s)

    @functools.cached_property
    def gigabyte(self):
        return np.ones(2**30, np.uint8)

    def transfer_1gb(self) -> None:
        rpc.rpc_sync("server", size_of, args=(self.gigabyte,))

    def tail_noop_p99_beside_1gb(self, budget_s: float) -> tuple[float, float]:
        return measure.tail_beside(self.time_noop, self.transfer_1gb, budget_s)

    def time_remote_to_here(self) -> None:
        rpc.remote("server", echo, args=(self.small,)).to_here()

    def time_proxy_call(self) -> None:
        self.counter.rpc_sync().add(1)

    def time_step_sgd_100(self) -> None:
        self.optimizers["step_sgd_100"].step(self.context_id)

    def time_step_adam_100(self) -> None:
        self.optimizers["step_adam_100"].step(self.context_id)

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

    def time_backward_16mb_weighted(self) -> None:
        with dist_autograd.context() as context_id:
            doubled = rpc.rpc_sync("server", double, args=(self.large_leaf,))
            dist_autograd.backward(context_id, [(doubled * self.large).sum()])
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
