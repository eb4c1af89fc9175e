"""The control of bench_graph: plain NumPy with the derivatives written by hand, no graph."""

from __future__ import annotations

import graphs
import measure
import numpy as np


class NumpyGraphs(measure.Peer):
    def __init__(self) -> None:
        self.version = np.__version__
        self.x = np.ones(4)
        self.pair = graphs.square_pair()
        self.weights = graphs.mlp_weights()
        self.images, self.labels = graphs.mlp_batch()

    def time_chain_40_plain(self) -> None:
        graphs.chain_40(np, self.x)

    def time_chain_40_forward(self) -> None:
        graphs.chain_40(np, self.x)

    def time_chain_40(self) -> None:
        x, inputs = self.x, []
        for _ in range(10):
            inputs.append(x)
            x = np.sin(x) * 1.1 + 0.2 - 0.1
        x.sum()
        gradient = np.ones(4)
        for x in reversed(inputs):
            gradient = gradient * 1.1 * np.cos(x)

    def time_fan(self) -> None:
        graphs.fan(self.x).sum()
        gradient = np.ones(4)
        for weight in range(graphs.FAN):
            gradient = gradient + np.ones(4) * float(weight)

    def time_line_1000(self) -> None:
        graphs.line(self.x, 1000)

    def time_line_10000(self) -> None:
        graphs.line(self.x, 10_000)

    def time_line_100000(self) -> None:
        graphs.line(self.x, 100_000)

    def time_line_1000000(self) -> None:
        graphs.line(self.x, 1_000_000)

    def time_matmul_relu_sum(self) -> None:
        first, second = self.pair
        positive = np.maximum(first @ second, 0)
        positive.sum()
        gradient = (positive > 0).astype(np.float32)
        gradient @ second.T
        first.T @ gradient

    def time_mlp_step(self) -> None:
        images, labels = self.images, self.labels
        first, second = self.weights
        hidden = np.tanh(images @ first)
        scores = hidden @ second
        powers = np.exp(scores)
        sums = powers.sum(1, keepdims=True)
        (np.log(sums).sum() - (scores * labels).sum()) / graphs.BATCH
        g2 = (powers / sums - labels) / graphs.BATCH
        g1 = (g2 @ second.T) * (1 - hidden * hidden)
        for weight, left, right in ((second, hidden, g2), (first, images, g1)):
            weight -= graphs.LEARNING_RATE * (left.T @ right)

    def time_accumulate_16(self) -> None:
        self.add(16)

    def time_accumulate_1024(self) -> None:
        self.add(1024)

    def time_accumulate_65536(self) -> None:
        self.add(65536)

    def add(self, n: int) -> None:
        total, part = np.zeros(n), np.ones(n)
        for _ in range(graphs.SUMS):
            np.add(total, part, out=total)


if __name__ == "__main__":
    measure.serve(NumpyGraphs)
