"""The graphs of bench_graph in PyTorch, default number of threads."""

from __future__ import annotations

import graphs
import measure


class TorchGraphs(measure.Peer):
    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.version = torch.__version__
        self.x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        self.weights = [torch.tensor(w, requires_grad=True) for w in graphs.mlp_weights()]
        self.images, self.labels = map(torch.tensor, graphs.mlp_batch())

    def time_chain_40_forward(self) -> None:
        graphs.chain_40(self.torch, self.x)

    def time_chain_40(self) -> None:
        graphs.chain_40(self.torch, self.x).sum().backward()
        self.x.grad = None

    def time_fan(self) -> None:
        graphs.fan(self.x).sum().backward()
        self.x.grad = None

    def time_mlp_step(self) -> None:
        graphs.mlp_loss(self.torch, self.weights, self.images, self.labels).backward()
        for weight in self.weights:
            weight.data -= graphs.LEARNING_RATE * weight.grad
            weight.grad = None


if __name__ == "__main__":
    measure.serve(TorchGraphs)
