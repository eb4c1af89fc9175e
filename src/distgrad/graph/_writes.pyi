"""Compiled modules cimport it; there is nothing in it for Python."""

__pyx_capi__: dict[str, object]
