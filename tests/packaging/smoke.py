"""A first program against an installed distgrad: a gradient here, a gradient across workers."""

import numpy as np

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad.testing import World


@rpc.expose
def double(x: dg.Tensor) -> dg.Tensor:
    return x * 2


def train(rank: int) -> None:
    if rank != 0:
        return
    x = dg.tensor(np.ones(3), requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync(1, double, args=(x,)).sum()
        dist_autograd.backward(context_id, [loss])
        gradient = dist_autograd.get_gradients(context_id)[x]
    assert np.array_equal(gradient.numpy(), np.full(3, 2.0))


def main() -> None:
    x = dg.tensor([1.0, 2.0], requires_grad=True)
    np.sin(x).sum().backward()
    assert np.allclose(x.grad.numpy(), np.cos([1.0, 2.0]))
    with World(2) as world:
        world.run(train)
    print(f"distgrad at {dg.__file__} works")


if __name__ == "__main__":
    main()
