"""The graphs of bench_graph in distgrad, one process."""

from __future__ import annotations

import graphs
import measure
import numpy as np

import distgrad as dg


class DistgradGraphs(measure.Peer):
    def __init__(self) -> None:
        self.version = dg.__version__
        self.x = dg.tensor(np.ones(4), requires_grad=True)
        self.weights = [dg.tensor(weight, requires_grad=True) for weight in graphs.mlp_weights()]
        self.images, self.labels = map(dg.tensor, graphs.mlp_batch())

    def time_chain_40_forward(self) -> None:
        graphs.chain_40(np, self.x)

    def time_chain_40(self) -> None:
        graphs.chain_40(np, self.x).sum().backward()
        self.x.grad = None

    def time_fan(self) -> None:
        graphs.fan(self.x).sum().backward()
        self.x.grad = None

    def time_mlp_step(self) -> None:
        graphs.mlp_loss(np, self.weights, self.images, self.labels).backward()
        for weight in self.weights:
            weight.data -= graphs.LEARNING_RATE * weight.grad.data
            weight.grad = None


if __name__ == "__main__":
    measure.serve(DistgradGraphs)
