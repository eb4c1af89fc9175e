"""The graphs of bench_graph in PyTorch, one thread."""

from __future__ import annotations

import graphs
import measure


class TorchGraphs(measure.Peer):
    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.version = torch.__version__
        self.x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        self.scalar = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.pair = [torch.tensor(m, requires_grad=True) for m in graphs.square_pair()]
        self.weights = [torch.tensor(w, requires_grad=True) for w in graphs.mlp_weights()]
        self.images, self.labels = map(torch.tensor, graphs.mlp_batch())

    def time_chain_40_plain(self) -> None:
        with self.torch.no_grad():
            graphs.chain_40(self.torch, self.x)

    def time_chain_40_forward(self) -> None:
        graphs.chain_40(self.torch, self.x)

    def time_chain_40(self) -> None:
        graphs.chain_40(self.torch, self.x).sum().backward()
        self.x.grad = None

    def time_scalar_40(self) -> None:
        graphs.chain_40(self.torch, self.scalar).backward()
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

    def time_matmul_relu_sum(self) -> None:
        first, second = self.pair
        self.torch.relu(first @ second).sum().backward()
        first.grad = second.grad = None

    def time_mlp_step(self) -> None:
        graphs.mlp_loss(self.torch, self.weights, self.images, self.labels).backward()
        for weight in self.weights:
            weight.data -= graphs.LEARNING_RATE * weight.grad
            weight.grad = None


if __name__ == "__main__":
    measure.serve(TorchGraphs)
