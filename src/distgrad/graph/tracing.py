"""Where the user's code recorded a node, for ``config.trace_graph``."""

from __future__ import annotations

import os
import sys
from types import FrameType

__all__ = ["RECORDED_AT", "call_site"]

#: Under this key the metadata of a node has its call site.
RECORDED_AT = "recorded at"

_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def call_site() -> str:
    """Return ``file:line in function`` of the innermost frame outside of distgrad, or ""."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
