from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np

from distgrad._core import Tensor
from distgrad.graph._gradient import GradientTable
from distgrad.graph._node import Node

__pyx_capi__: dict[str, object]

@final
class GraphTask:
    captured: list[Any] | None
    failed_node: str
    failed_site: str
    def __init__(
        self,
        roots: Iterable[tuple[Tensor, Any]],
        *,
        sends: Iterable[Node] = (),
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Iterable[Tensor] | None = None,
        table: GradientTable | None = None,
    ) -> None: ...
    @property
    def done(self) -> bool: ...
    def reaches(self, node: Node) -> bool: ...
    def deliver(self, node: Node, grads: Sequence[Any] | None) -> None: ...
    def run(self) -> list[tuple[Node, tuple[np.ndarray[Any, Any] | None, ...] | None]]: ...

def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple[Any, ...]: ...
