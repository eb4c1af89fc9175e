"""Cimported only: no names for Python."""

__pyx_capi__: dict[str, object]
