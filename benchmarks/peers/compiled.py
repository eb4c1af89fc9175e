"""Compile ``accumulate.pyx`` when it is first needed; what was built is kept in ``build/``."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "accumulate.pyx"
BUILT = HERE.parents[1] / "build" / "benchmarks"


@functools.cache
def sums(n: int) -> Any:
    """Return gradients of float64[n] to be added up, from the compiled module."""
    return accumulate().Sums(n)


def accumulate() -> Any:
    """Return the compiled module; needs Cython and a C compiler."""
    target = BUILT / f"accumulate{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists() or target.stat().st_mtime < SOURCE.stat().st_mtime:
        build(target)
    spec = importlib.util.spec_from_file_location("accumulate", target)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {target}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(target: Path) -> None:
    import numpy as np

    import distgrad

    package = Path(distgrad.__file__).parent
    BUILT.mkdir(parents=True, exist_ok=True)
    c_file = BUILT / "accumulate.c"
    includes = [np.get_include(), sysconfig.get_path("include"), str(package)]
    paths = ["-I", str(package.parent), str(SOURCE), "-o", str(c_file)]
    subprocess.run([sys.executable, "-m", "cython", *paths], check=True)
    options = ["-O3", "-march=native", "-shared", "-fPIC", "-DDISTGRAD_DEBUG=0"]
    options += [f"-I{include}" for include in includes]
    subprocess.run(["cc", *options, str(c_file), "-o", str(target)], check=True)
