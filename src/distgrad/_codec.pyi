import sys
from typing import Any, NoReturn, final

from typing_extensions import Buffer

from distgrad.wire._schema import (
    DTYPES,
    TAGS,
    Bounds,
    configure,
    name_fields,
    receivable,
    register_exceptions,
    register_record,
    register_type,
    set_tensor_type,
)

__all__ = [
    "DTYPES",
    "HEADER_FIELDS",
    "TAGS",
    "Bounds",
    "Frame",
    "Outgoing",
    "configure",
    "decode",
    "encode",
    "name_fields",
    "parse",
    "receivable",
    "register_exceptions",
    "register_record",
    "register_type",
    "set_tensor_type",
]

HEADER_FIELDS: tuple[tuple[str, int, int], ...]
__pyx_capi__: dict[str, object]

@final
class Outgoing:
    def __init__(self, *args: object, **kwargs: object) -> NoReturn: ...
    kind: int
    request_id: int
    context_id: int
    message_id: int
    chain: int
    deadline_us: int
    overtakes: bool
    no_grad: bool
    @property
    def nbytes(self) -> int: ...
    def seal(self) -> None: ...
    def own(self) -> int: ...
    def parts(self) -> list[Buffer]: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Frame:
    def __init__(self, *args: object, **kwargs: object) -> NoReturn: ...
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
    @property
    def nbytes(self) -> int: ...

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
    bounds: Bounds | None = None,
) -> Outgoing: ...
def decode(frame: Frame, session: Any = None) -> Any: ...
def parse(data: Buffer, payload: Buffer | None = None) -> Frame: ...
def _crc32c(data: Buffer, *, portable: bool = False) -> int: ...
def _recompute_crc(frame: bytearray) -> None: ...
