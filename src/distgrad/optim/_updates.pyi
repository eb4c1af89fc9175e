from collections.abc import Iterable, Mapping
from typing import Any, final

from distgrad._core import Tensor
from distgrad.optim.optimizer import Array

__pyx_capi__: dict[str, object]

@final
class Update: ...

def step_in_place(
    update: Update | None,
    params: Iterable[Tensor],
    gradients: Mapping[Tensor, Tensor] | None,
    states: dict[Tensor, dict[str, Any]],
) -> list[tuple[Tensor, Tensor]]: ...
def step_aside(
    update: Update | None,
    params: Iterable[Tensor],
    gradients: Mapping[Tensor, Tensor] | None,
    states: dict[Tensor, dict[str, Any]],
    spares: dict[Tensor, tuple[Array, dict[str, Any]]],
    outcomes: list[tuple[Tensor, Array, dict[str, Any]]],
) -> list[tuple[Tensor, Tensor]]: ...
def exchange(
    outcomes: list[tuple[Tensor, Array, dict[str, Any]]],
    states: dict[Tensor, dict[str, Any]],
    spares: dict[Tensor, tuple[Array, dict[str, Any]]],
) -> None: ...
def sgd(group: dict[str, Any]) -> Update: ...
def adam(group: dict[str, Any], decoupled: bool) -> Update: ...
def adamax(group: dict[str, Any]) -> Update: ...
def adagrad(group: dict[str, Any]) -> Update: ...
def rmsprop(group: dict[str, Any]) -> Update: ...
def adadelta(group: dict[str, Any]) -> Update: ...
def rprop(group: dict[str, Any]) -> Update: ...
