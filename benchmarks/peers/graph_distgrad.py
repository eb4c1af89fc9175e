"""The graphs of bench_graph in distgrad, one process."""

from __future__ import annotations

import compiled
import graphs
import measure
import numpy as np

import distgrad as dg
from distgrad.ops.nn import relu


class DistgradGraphs(measure.Peer):
    def __init__(self) -> None:
        self.version = dg.__version__
        self.x = dg.tensor(np.ones(4), requires_grad=True)
        self.scalar = dg.tensor(np.ones(()), requires_grad=True)
        self.pair = [dg.tensor(matrix, requires_grad=True) for matrix in graphs.square_pair()]
        self.weights = [dg.tensor(weight, requires_grad=True) for weight in graphs.mlp_weights()]
        self.images, self.labels = map(dg.tensor, graphs.mlp_batch())

    def time_chain_40_plain(self) -> None:
        with dg.no_grad():
            graphs.chain_40(np, self.x)

    def time_chain_40_forward(self) -> None:
        graphs.chain_40(np, self.x)

    def time_chain_40(self) -> None:
        graphs.chain_40(np, self.x).sum().backward()
        self.x.grad = None

    def time_scalar_40(self) -> None:
        graphs.chain_40(np, self.scalar).backward()
        self.scalar.grad = None

    def time_fan(self) -> None:
        graphs.fan(self.x).sum().backward()
        self.x.grad = None

    def time_fan_10000(self) -> None:
        graphs.fan(self.x, graphs.WIDE_FAN).sum().backward()
        self.x.grad = None

    def time_line_1000(self) -> None:
        graphs.line(self.x, 1000).sum().backward()
        self.x.grad = None

    def time_line_10000(self) -> None:
        graphs.line(self.x, 10_000).sum().backward()
        self.x.grad = None

    def time_line_100000(self) -> None:
        graphs.line(self.x, 100_000).sum().backward()
        self.x.grad = None

    def time_line_1000000(self) -> None:
        graphs.line(self.x, 1_000_000).sum().backward()
        self.x.grad = None

    def time_matmul_relu_sum(self) -> None:
        first, second = self.pair
        relu(first @ second).sum().backward()
        first.grad = second.grad = None

    def time_mlp_step(self) -> None:
        graphs.mlp_loss(np, self.weights, self.images, self.labels).backward()
        for weight in self.weights:
            weight.data -= graphs.LEARNING_RATE * weight.grad.data
            weight.grad = None

    def time_accumulate_16(self) -> None:
        compiled.sums(16).by_engine(graphs.SUMS)

    def time_accumulate_1024(self) -> None:
        compiled.sums(1024).by_engine(graphs.SUMS)

    def time_accumulate_65536(self) -> None:
        compiled.sums(65536).by_engine(graphs.SUMS)


if __name__ == "__main__":
    measure.serve(DistgradGraphs)
