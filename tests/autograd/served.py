"""What the workers of the autograd tests call on each other."""

from __future__ import annotations

import threading
from typing import Any

import distgrad as dg
from distgrad import autograd as dist_autograd
from distgrad import rpc

NOTHING = {
    "autograd.contexts": 0,
    "autograd.passes": 0,
    "autograd.sends": 0,
    "autograd.recvs": 0,
}


@rpc.expose
def counters(*route: int) -> dict[str, int]:
    """Return the autograd counters of the last worker of a route.

    A release reaches a worker along the calls that were made to it, so a call over the
    same route comes after it.
    """
    if route:
        found: dict[str, int] = rpc.rpc_sync(route[0], counters, args=route[1:])
        return found
    return {k: v for k, v in rpc.debug_info().items() if k.startswith("autograd.")}


@rpc.expose
def scale(x: Any, factor: float = 3.0) -> Any:
    return x * factor


@rpc.expose
def add(x: Any, y: Any) -> Any:
    return x + y


@rpc.expose
def multiply(x: Any, y: Any) -> Any:
    return x * y


@rpc.expose
def fail(*args: Any) -> Any:
    raise KeyError("this function always fails")


@rpc.expose
def pair_of(x: Any) -> Any:
    return x * 2.0, x * 5.0


@rpc.expose
def bounce(x: Any, hops: int) -> Any:
    """Pass a value back and forth between two workers; each hop doubles it twice."""
    me = rpc.get_worker_info().id
    y = x * 2.0
    if hops > 1:
        y = rpc.rpc_sync(1 - me, bounce, args=(y, hops - 1))
    return y * 2.0


@rpc.expose
def through(x: Any, route: list[int]) -> Any:
    """Pass a value along a route and back; each worker adds it to what comes back."""
    if not route:
        return x * 1.0
    return x + rpc.rpc_sync(route[0], through, args=(x, route[1:]))


@rpc.expose
@rpc.functions.async_execution
def through_future(x: Any) -> Any:
    return rpc.rpc_async("worker2", through, args=(x, [])).then(lambda y: y.wait() + x)


@rpc.expose
async def through_coroutine(x: Any) -> Any:
    return x + await rpc.rpc_async("worker2", through, args=(x, []))


@rpc.expose
def gradient_inside(x: Any) -> Any:
    """Return the gradient of the squares of some values, recorded here and now."""
    with dg.enable_grad():
        value = x.detach().requires_grad_()
        return dg.grad((value * value).sum(), [value])[0]


started, may_go_on = threading.Event(), threading.Event()


class Held(dg.Function):
    """The identity; its rule says that it started, and waits until it may go on."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        started.set()
        assert may_go_on.wait(30)
        return grad


@rpc.expose
def held(x: Any) -> Any:
    started.clear()
    may_go_on.clear()
    return Held.apply(x)


@rpc.expose
def held_behind(x: Any) -> Any:
    return rpc.rpc_sync("worker2", held, args=(x * 1.0,)) * 1.0


@rpc.expose
def wait_for_start() -> bool:
    return started.wait(30)


@rpc.expose
def let_go() -> None:
    may_go_on.set()


broken = threading.Event()


class Fickle(dg.Function):
    """The identity; its rule raises while this process is broken."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if broken.is_set():
            raise ZeroDivisionError("this rule is broken")
        return grad


@rpc.expose
def fickle(x: Any) -> Any:
    return Fickle.apply(x)


@rpc.expose
def break_rules(on: bool) -> None:
    broken.set() if on else broken.clear()


may_return = threading.Event()


@rpc.expose
def wait_for_permission(x: Any) -> Any:
    assert may_return.wait(30)
    return x * 1.0


@rpc.expose
def forbid() -> None:
    may_return.clear()


@rpc.expose
def permit() -> None:
    may_return.set()


class Weights:
    """A parameter on each worker of this process, made when it is first used."""

    def __init__(self) -> None:
        self.of: dict[int, Any] = {}

    def mine(self) -> Any:
        me = rpc.get_worker_info().id
        if me not in self.of:
            self.of[me] = dg.tensor([2.0, 3.0], requires_grad=True)
        return self.of[me]


weights = Weights()


@rpc.expose
def weigh(x: Any) -> Any:
    return x * weights.mine()


@rpc.expose
def gradient_of_weight(context_id: int) -> Any:
    gradient = dist_autograd.get_gradients(context_id).get(weights.mine())
    return None if gradient is None else gradient.numpy()


@rpc.expose
def stored_gradient_of_weight() -> Any:
    gradient, weights.mine().grad = weights.mine().grad, None
    return None if gradient is None else gradient.numpy()
