"""The classes of the records in golden/*.bin; importing this registers them."""

import dataclasses
import enum
from typing import NamedTuple

from distgrad._codec import register_record


class Level(enum.Enum):
    HIGH = "h"


class Mode(enum.IntFlag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Point:
    x: int
    y: object = None


class Size(NamedTuple):
    width: int
    height: int


for record in (Level, Mode, Point, Size):
    register_record(record, f"golden.{record.__name__}")
