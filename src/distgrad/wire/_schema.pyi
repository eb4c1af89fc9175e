from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar, final

import numpy as np
from typing_extensions import disjoint_base

HIGHEST: dict[str, int]
RECEIVABLE: tuple[str, ...]

_T = TypeVar("_T")

TAGS: dict[str, int]
DTYPES: dict[str, int]
__pyx_capi__: dict[str, object]

@final
class Extension:
    @property
    def cls(self) -> type: ...
    @property
    def name(self) -> str: ...
    @property
    def encode(self) -> Callable[[Any, Any], object]: ...
    @property
    def decode(self) -> Callable[[Any, Any], object]: ...
    def __init__(
        self,
        cls: type,
        name: str,
        encode: Callable[[Any, Any], object],
        decode: Callable[[Any, Any], object],
        alone: bool = False,
    ) -> None: ...

@disjoint_base
class Record:
    @property
    def cls(self) -> type: ...
    @property
    def name(self) -> str: ...
    @property
    def fields(self) -> tuple[str, ...]: ...
    def __init__(self, cls: type, name: str, fields: Sequence[str]) -> None: ...
    def values(self, obj: object) -> tuple[object, ...]: ...
    def build(self, values: Sequence[object]) -> object: ...

class Unsendable(Exception): ...

@final
class Bounds:
    @property
    def name(self) -> str: ...
    def __init__(self, name: str, told: Sequence[int]) -> None: ...

def receivable() -> tuple[int, ...]: ...

class _Limits(TypedDict):
    max_depth: int
    max_meta_bytes: int
    max_payload_bytes: int
    max_items: int
    max_buffers: int
    inline_array_bytes: int

def set_tensor_type(
    cls: type[_T] | None,
    unwrap: Callable[[_T, Any], tuple[np.ndarray[Any, Any], bool, int]] | None,
    wrap: Callable[[np.ndarray[Any, Any], bool, int, Any], _T] | None,
) -> tuple[Any, Any, Any]: ...
def register_type(
    cls: type[_T],
    name: str,
    encode: Callable[[_T, Any], object],
    decode: Callable[[Any, Any], _T],
    *,
    alone: bool = False,
) -> None: ...
def register_record(cls: type, name: str) -> None: ...
def register_exceptions(
    encode: Callable[[BaseException, Any], object],
    decode: Callable[[Any, Any], BaseException],
) -> None: ...
def name_fields(kind: int, names: Sequence[str]) -> None: ...
def configure(
    *,
    max_depth: int | None = None,
    max_meta_bytes: int | None = None,
    max_payload_bytes: int | None = None,
    max_items: int | None = None,
    max_buffers: int | None = None,
    inline_array_bytes: int | None = None,
) -> _Limits: ...
