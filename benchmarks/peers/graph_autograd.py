"""The graphs of bench_graph in HIPS autograd, whose forward pass cannot be run alone."""

from __future__ import annotations

from importlib.metadata import version

import graphs
import measure
import numpy as np


class AutogradGraphs(measure.Peer):
    def __init__(self) -> None:
        import autograd
        import autograd.numpy as anp

        self.version = version("autograd")
        self.x = np.ones(4)
        self.scalar = 1.0
        self.pair = graphs.square_pair()
        self.weights = graphs.mlp_weights()
        self.images, self.labels = graphs.mlp_batch()
        self.chain = autograd.grad(lambda x: anp.sum(graphs.chain_40(anp, x)))
        self.fan = autograd.grad(lambda x: anp.sum(graphs.fan(x)))
        self.scalar_chain = autograd.grad(lambda x: graphs.chain_40(anp, x))
        self.wide_fan = autograd.grad(lambda x: anp.sum(graphs.fan(x, graphs.WIDE_FAN)))
        self.product = autograd.grad(lambda pair: anp.sum(anp.maximum(pair[0] @ pair[1], 0)))
        self.mlp = autograd.grad(lambda *parameters: graphs.mlp_loss(anp, *parameters))

    def time_chain_40(self) -> None:
        self.chain(self.x)

    def time_scalar_40(self) -> None:
        self.scalar_chain(self.scalar)

    def time_fan(self) -> None:
        self.fan(self.x)

    def time_fan_10000(self) -> None:
        self.wide_fan(self.x)

    def time_matmul_relu_sum(self) -> None:
        self.product(self.pair)

    def time_mlp_step(self) -> None:
        gradients = self.mlp(self.weights, self.images, self.labels)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight -= graphs.LEARNING_RATE * gradient


if __name__ == "__main__":
    measure.serve(AutogradGraphs)
