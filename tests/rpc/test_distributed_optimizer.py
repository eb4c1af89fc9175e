"""One optimizer over parameters of several workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from references import wait_until

from distgrad import autograd as dist_autograd
from distgrad import rpc
from distgrad._core import Tensor
from distgrad.errors import ContextError, DistgradError
from distgrad.optim import SGD, Adam, DistributedOptimizer, Optimizer, lr_scheduler
from distgrad.optim.steps import TRY
from distgrad.testing import World

weights: dict[tuple[int, str], Tensor] = {}


@rpc.expose
def make_weight(name: str, values: Any) -> Any:
    """Make a parameter on the worker that is called."""
    own = rpc.get_worker_info().id
    weights[own, name] = Tensor(np.array(values, dtype=float), requires_grad=True)
    return rpc.RRef(weights[own, name])


@rpc.expose
def scale(name: str, x: Any) -> Any:
    """Multiply with a parameter of the worker that is called."""
    return weights[rpc.get_worker_info().id, name] * x


@rpc.expose
class Stubborn(SGD):
    """Refuses to step where the gradient is negative."""

    def _update(self, data: Any, gradient: Any, state: Any, group: Any) -> None:
        if (gradient < 0).any():
            raise ArithmeticError("the gradient points uphill")
        super()._update(data, gradient, state, group)


class Unexposed(SGD):
    """Is not exposed."""


@pytest.fixture
def world() -> Iterator[World]:
    with World(4) as running:
        yield running
    weights.clear()


def on(world: World, rank: int, body: Any) -> Any:
    return world.run(lambda rank: body(), ranks=[rank])[0]


def steps_at(world: World, rank: int) -> int:
    def count() -> int:
        info = rpc.debug_info()
        return info["optim.steps"] + info["optim.locks"]

    return int(on(world, rank, count))


def train(optimizer: DistributedOptimizer, inputs: dict[tuple[int, str], Any]) -> None:
    """Make ``inputs`` the gradients of the parameters, and step."""
    with dist_autograd.context() as context_id:
        products = [
            rpc.rpc_sync(owner, scale, (name, Tensor(np.array(x, dtype=float))))
            for (owner, name), x in inputs.items()
        ]
        dist_autograd.backward(context_id, [product.sum() for product in products])
        optimizer.step(context_id)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}), (Adam, {"lr": 0.05})],
    ids=["sgd", "adam"],
)
def test_steps_equal_those_of_a_local_optimizer(
    world: World, cls: type[Optimizer], settings: dict[str, Any]
) -> None:
    def body() -> None:
        places = [(0, "w"), (1, "w"), (1, "b"), (3, "w")]
        random = np.random.default_rng(3)
        first = [random.standard_normal(5) for _ in places]
        rrefs = [
            rpc.rpc_sync(owner, make_weight, (name, values))
            for (owner, name), values in zip(places, first, strict=True)
        ]
        twins = [Tensor(values.copy(), requires_grad=True) for values in first]
        optimizer, local = DistributedOptimizer(cls, rrefs, **settings), cls(twins, **settings)
        for _ in range(4):
            gradients = [random.standard_normal(5) for _ in places]
            train(optimizer, dict(zip(places, gradients, strict=True)))
            local.step(dict(zip(twins, map(Tensor, gradients), strict=True)))
        for rref, twin in zip(rrefs, twins, strict=True):
            np.testing.assert_allclose(rref.to_here().data, twin.data, rtol=1e-12)

    on(world, 0, body)


def test_step_parameter_without_gradient_stays(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 2)]
        train(DistributedOptimizer(SGD, rrefs, lr=0.5), {(1, "w"): [1.0]})
        assert [rref.to_here().item() for rref in rrefs] == [0.5, 1.0]

    on(world, 0, body)


def test_step_failure_on_one_owner_changes_nothing_anywhere(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (0, 1, 2)]
        optimizer = DistributedOptimizer(Stubborn, rrefs, lr=0.5, momentum=0.5)
        with pytest.raises(DistgradError, match="on worker 'worker1' failed") as caught:
            train(optimizer, {(0, "w"): [1.0], (1, "w"): [-1.0], (2, "w"): [1.0]})
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert [rref.to_here().item() for rref in rrefs] == [1.0, 1.0, 1.0]
        train(optimizer, {(owner, "w"): [1.0] for owner in range(3)})
        assert [rref.to_here().item() for rref in rrefs] == [0.5, 0.5, 0.5]

    on(world, 0, body)
    assert [steps_at(world, rank) for rank in range(4)] == [0] * 4


def test_step_lost_owner_is_named_and_others_keep_their_values(world: World) -> None:
    def prepare() -> Any:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 2)]
        return rrefs, DistributedOptimizer(SGD, rrefs, lr=0.5)

    rrefs, optimizer = on(world, 0, prepare)
    world.kill(2)

    def body() -> None:
        with dist_autograd.context() as context_id:
            product = rpc.rpc_sync(1, scale, ("w", Tensor(np.ones(1))))
            dist_autograd.backward(context_id, [product.sum()])
            with pytest.raises(DistgradError, match="on worker 'worker2' failed"):
                optimizer.step(context_id)
        assert rrefs[0].to_here().item() == 1.0

    on(world, 0, body)
    assert steps_at(world, 1) == 0


def test_steps_of_many_workers_at_once_are_all_applied(world: World) -> None:
    def make() -> list[Any]:
        return [rpc.rpc_sync(owner, make_weight, ("w", [0.0] * 3)) for owner in (1, 2, 3)]

    on(world, 0, make)

    def body(rank: int) -> None:
        rrefs = [rpc.rpc_sync(owner, get_weight, ("w",)) for owner in (1, 2, 3)]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=1.0)
        for _ in range(8):
            train(optimizer, {(owner, "w"): [-1.0] * 3 for owner in (1, 2, 3)})
        optimizer.wait()

    world.run(body)
    for owner in (1, 2, 3):
        np.testing.assert_array_equal(weights[owner, "w"].data, [32.0] * 3)
    assert [steps_at(world, rank) for rank in range(4)] == [0] * 4


@rpc.expose
def get_weight(name: str) -> Any:
    return rpc.RRef(weights[rpc.get_worker_info().id, name])


def test_step_of_a_lost_coordinator_is_dropped(world: World) -> None:
    def begin() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 3)]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=0.5)
        with dist_autograd.context() as context_id:
            products = [rpc.rpc_sync(o, scale, ("w", Tensor(np.ones(1)))) for o in (1, 3)]
            dist_autograd.backward(context_id, [product.sum() for product in products])
            request = optimizer._requests(77, int(context_id), TRY)
            assert all(request(owner).wait() for owner in ("worker1", "worker3"))

    on(world, 2, begin)
    assert [steps_at(world, rank) for rank in (1, 3)] == [2, 2]
    world.kill(2)
    wait_until(lambda: [steps_at(world, rank) for rank in (1, 3)] == [0, 0])
    assert [weights[owner, "w"].item() for owner in (1, 3)] == [1.0, 1.0]


@pytest.mark.parametrize("owners", [(1,), (0, 1, 2)])
def test_step_costs_one_round_trip_an_owner(world: World, owners: tuple[int, ...]) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in owners]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=0.5)
        with dist_autograd.context() as context_id:
            products = [rpc.rpc_sync(o, scale, ("w", Tensor(np.ones(1)))) for o in owners]
            dist_autograd.backward(context_id, [product.sum() for product in products])
            before = rpc.debug_info()["rpc.calls_issued"]
            optimizer.step(context_id)
            requests = rpc.debug_info()["rpc.calls_issued"] - before
        assert requests == len([owner for owner in owners if owner != 0])

    on(world, 0, body)


def test_step_hogwild_takes_no_locks_and_waits_for_nobody(world: World) -> None:
    def hold() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 2)]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=0.5)
        hogwild = DistributedOptimizer(SGD, rrefs, lr=0.25, hogwild=True)
        with dist_autograd.context() as context_id:
            products = [rpc.rpc_sync(o, scale, ("w", Tensor(np.ones(1)))) for o in (1, 2)]
            dist_autograd.backward(context_id, [product.sum() for product in products])
            request = optimizer._requests(77, int(context_id), TRY)
            optimizer._steps.begin(77, optimizer._number, optimizer._line)
            assert all(request(owner).wait() for owner in ("worker1", "worker2"))
            hogwild.step(context_id)  # although another step holds the parameters
            assert [rref.to_here().item() for rref in rrefs] == [0.75, 0.75]
            optimizer._steps.decide(77, False)
            for owner in (1, 2):
                optimizer._steps.tell(owner, 77, False)
            optimizer.wait()
        assert [rref.to_here().item() for rref in rrefs] == [0.75, 0.75]

    on(world, 3, hold)
    assert [steps_at(world, rank) for rank in range(4)] == [0] * 4


def test_step_hogwild_failure_names_the_owner(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 2)]
        optimizer = DistributedOptimizer(Stubborn, rrefs, lr=0.5, hogwild=True)
        with pytest.raises(DistgradError, match="'worker2' failed, and others may have stepped"):
            train(optimizer, {(1, "w"): [1.0], (2, "w"): [-1.0]})
        assert [rref.to_here().item() for rref in rrefs] == [0.5, 1.0]

    on(world, 0, body)


def test_step_many_hogwild_workers_at_once_lose_nothing_that_is_separate(world: World) -> None:
    def make() -> None:
        for rank in range(4):
            rpc.rpc_sync(1, make_weight, (f"w{rank}", [0.0] * 3))

    on(world, 0, make)

    def body(rank: int) -> None:
        rref = rpc.rpc_sync(1, get_weight, (f"w{rank}",))
        optimizer = DistributedOptimizer(SGD, [rref], lr=1.0, hogwild=True)
        for _ in range(8):
            train(optimizer, {(1, f"w{rank}"): [-1.0] * 3})

    world.run(body)
    for rank in range(4):
        np.testing.assert_array_equal(weights[1, f"w{rank}"].data, [8.0] * 3)


def test_step_of_what_cannot_be_is_refused(world: World) -> None:
    def body() -> None:
        weight = rpc.rpc_sync(1, make_weight, ("w", [1.0]))
        optimizer = DistributedOptimizer(SGD, [weight])
        with pytest.raises(TypeError, match="'x' is no id of one"):
            optimizer.step("x")  # type: ignore[arg-type]
        with pytest.raises(ContextError, match="context 99"):
            optimizer.clip_grad_norm_(99, 1.0)
        with dist_autograd.context() as context_id:
            with pytest.raises(ValueError, match="max_norm=-1"):
                optimizer.clip_grad_norm_(context_id, -1)
            optimizer.param_groups.clear()
            with pytest.raises(ValueError, match="has 0 groups, it had 1"):
                optimizer.step(context_id)
        with pytest.raises(ValueError, match="it is of <class 'int'>"):
            optimizer.load_state_dict(3)  # type: ignore[arg-type]
        foreign = DistributedOptimizer(Adam, [weight]).state_dict()
        with pytest.raises(DistgradError, match=r"on worker 'worker1': .*it is not of SGD"):
            optimizer.load_state_dict(foreign)

    on(world, 0, body)
    assert [steps_at(world, rank) for rank in range(4)] == [0] * 4


def test_step_outside_of_a_context_is_refused(world: World) -> None:
    def body() -> None:
        optimizer = DistributedOptimizer(SGD, [rpc.rpc_sync(1, make_weight, ("w", [1.0]))])
        with dist_autograd.context() as context_id:
            pass
        with pytest.raises(ContextError):
            optimizer.step(context_id)

    on(world, 0, body)


def test_groups_have_settings_that_travel_with_the_step(world: World) -> None:
    def body() -> None:
        a, b = (rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 2))
        optimizer = DistributedOptimizer(
            SGD, [{"params": [a]}, {"params": [b], "lr": 0.25}], lr=0.5
        )
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
        optimizer.param_groups[0]["lr"] = 0.125
        train(optimizer, {(1, "w"): [1.0], (2, "w"): [1.0]})
        assert (a.to_here().item(), b.to_here().item()) == (0.875, 0.75)

    on(world, 0, body)


def test_schedule_drives_all_owners(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [8.0])) for owner in (0, 1, 2)]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=4.0)
        schedule = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for _ in range(3):
            train(optimizer, {(owner, "w"): [1.0] for owner in range(3)})
            schedule.step()
        assert [rref.to_here().item() for rref in rrefs] == [8.0 - 4.0 - 2.0 - 1.0] * 3
        assert schedule.get_last_lr() == [0.5]

    on(world, 0, body)


def test_state_dict_loaded_continues_the_same_path(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 2)]
        whole = DistributedOptimizer(SGD, rrefs, lr=0.5, momentum=0.5)
        gradients = {(1, "w"): [1.0], (2, "w"): [1.0]}
        train(whole, gradients)
        resumed = DistributedOptimizer(SGD, rrefs, lr=0.1, momentum=0.9)
        resumed.load_state_dict(whole.state_dict())
        assert resumed.param_groups[0]["lr"] == 0.5
        train(resumed, gradients)
        assert [rref.to_here().item() for rref in rrefs] == [1 - 0.5 - 0.75] * 2
        with pytest.raises(ValueError, match=r"\['worker1', 'worker2'\]"):
            DistributedOptimizer(SGD, rrefs[:1]).load_state_dict(whole.state_dict())

    on(world, 0, body)


def test_state_dict_that_one_owner_cannot_load_is_loaded_by_none(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (1, 2)]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=0.5, momentum=0.5)
        train(optimizer, {(1, "w"): [1.0], (2, "w"): [1.0]})
        before = optimizer.state_dict()
        broken = DistributedOptimizer(SGD, rrefs, lr=0.1, momentum=0.9).state_dict()
        broken["worker2"]["param_groups"][0]["lr"] = "x"
        with pytest.raises(DistgradError, match=r"on worker 'worker2': .*lr='x'"):
            optimizer.load_state_dict(broken)
        np.testing.assert_equal(optimizer.state_dict(), before)
        assert optimizer.param_groups[0]["lr"] == 0.5

    on(world, 0, body)


def test_setting_changed_to_one_that_makes_no_sense_steps_nowhere(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [1.0])) for owner in (0, 1)]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=0.5)
        gradients = {(0, "w"): [1.0], (1, "w"): [1.0]}
        for setting in (-1.0, "x"):
            optimizer.param_groups[0]["lr"] = setting
            with pytest.raises(DistgradError, match=f"lr={setting!r}"):
                train(optimizer, gradients)
        optimizer.param_groups[0]["lr"] = 0.25
        train(optimizer, gradients)
        assert [rref.to_here().item() for rref in rrefs] == [0.75, 0.75]

    on(world, 0, body)


def test_clip_scales_by_the_norm_over_all_workers(world: World) -> None:
    def body() -> None:
        rrefs = [rpc.rpc_sync(owner, make_weight, ("w", [0.0])) for owner in (1, 2)]
        optimizer = DistributedOptimizer(SGD, rrefs, lr=1.0)
        with dist_autograd.context() as context_id:
            products = [
                rpc.rpc_sync(owner, scale, ("w", Tensor(np.array([x]))))
                for owner, x in ((1, -3.0), (2, -4.0))
            ]
            dist_autograd.backward(context_id, [product.sum() for product in products])
            assert optimizer.clip_grad_norm_(context_id, 1.0) == pytest.approx(5.0)
            assert optimizer.clip_grad_norm_(context_id, 2.0) == pytest.approx(1.0)
            optimizer.step(context_id)
        assert [rref.to_here().item() for rref in rrefs] == pytest.approx([0.6, 0.8])

    on(world, 0, body)


def test_constructor_names_the_owner_that_fails(world: World) -> None:
    def body() -> None:
        weight = rpc.rpc_sync(1, make_weight, ("w", [1.0]))
        with pytest.raises(DistgradError, match=r"on worker 'worker1': .*lr=-1"):
            DistributedOptimizer(SGD, [weight], lr=-1)
        with pytest.raises(DistgradError, match=r"on worker 'worker1': .*Unexposed"):
            DistributedOptimizer(Unexposed, [weight])
        with pytest.raises(DistgradError, match=r"'worker2': .*parameters are tensors"):
            DistributedOptimizer(SGD, [rpc.remote(2, make_number)])
        with pytest.raises(ValueError, match="there are no parameters"):
            DistributedOptimizer(SGD, [])
        with pytest.raises(DistgradError, match=r"on worker 'worker1': .*tensor twice"):
            DistributedOptimizer(SGD, [weight, rpc.rpc_sync(1, get_weight, ("w",))])
        with pytest.raises(DistgradError, match=r"on worker 'worker1': .*lr=-1"):
            DistributedOptimizer(SGD, [{"params": weight, "lr": -1}])
        with pytest.raises(TypeError, match="group 1: expected a dict with 'params'"):
            DistributedOptimizer(SGD, [{"params": [weight]}, weight])
        with pytest.raises(TypeError, match="pass a list of RRefs or of groups"):
            DistributedOptimizer(SGD, weight)
        with pytest.raises(TypeError, match="parameters are RRefs"):
            DistributedOptimizer(SGD, [Tensor(np.ones(1), requires_grad=True)])  # type: ignore[list-item]

    on(world, 0, body)


@rpc.expose
def make_number() -> int:
    return 7
