from collections.abc import Buffer, Callable
from typing import Any, TypedDict, final

import numpy as np

class _Limits(TypedDict):
    max_depth: int
    max_meta_bytes: int
    max_payload_bytes: int
    max_items: int
    max_buffers: int
    inline_array_bytes: int

TAGS: dict[str, int]
HEADER_FIELDS: tuple[tuple[str, int, int], ...]
DTYPES: dict[str, int]

@final
class Outgoing:
    kind: int
    request_id: int
    context_id: int
    message_id: int
    chain: int
    deadline_us: int
    @property
    def nbytes(self) -> int: ...
    def seal(self) -> None: ...
    def parts(self) -> list[Buffer]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Frame:
    @property
    def kind(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def request_id(self) -> int: ...
    @property
    def context_id(self) -> int: ...
    @property
    def message_id(self) -> int: ...
    @property
    def chain(self) -> int: ...
    @property
    def deadline_us(self) -> int: ...
    @property
    def meta(self) -> bytes: ...
    @property
    def payload(self) -> Buffer | None: ...

def encode(
    kind: int,
    value: object,
    session: Any = None,
    *,
    request_id: int = 0,
    chain: int = 0,
    deadline_us: int = 0,
    context_id: int = 0,
    message_id: int = 0,
) -> Outgoing: ...
def decode(frame: Frame, session: Any = None) -> Any: ...
def parse(data: Buffer, payload: Buffer | None = None) -> Frame: ...
def set_tensor_type[T](
    cls: type[T],
    unwrap: Callable[[T, Any], tuple[np.ndarray[Any, Any], bool, int]],
    wrap: Callable[[np.ndarray[Any, Any], bool, int, Any], T],
) -> None: ...
def register_type[T](
    cls: type[T],
    name: str,
    encode: Callable[[T, Any], object],
    decode: Callable[[Any, Any], T],
) -> None: ...
def register_record(cls: type, name: str) -> None: ...
def configure(
    *,
    max_depth: int | None = None,
    max_meta_bytes: int | None = None,
    max_payload_bytes: int | None = None,
    max_items: int | None = None,
    max_buffers: int | None = None,
    inline_array_bytes: int | None = None,
) -> _Limits: ...
def _crc32c(data: Buffer, *, portable: bool = False) -> int: ...
def _recompute_crc(frame: bytearray) -> None: ...
