"""The extension table and the four build switches; all other metadata is in pyproject.toml.

DISTGRAD_DEBUG=1    bounds checks, invariants and live-object books, -O0 -g
DISTGRAD_PROFILE=1  frame pointers and symbols, for perf and py-spy --native
DISTGRAD_TRACE=1    Cython line tracing, for line profiles and coverage
DISTGRAD_SANITIZE=1 AddressSanitizer and UndefinedBehaviorSanitizer; instead of 1 also what the
                    compiler's -fsanitize takes (tests/fuzz/README.md)
"""

import glob
import os

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = {
    "distgrad.graph._node": "src/distgrad/graph/_node.pyx",
    "distgrad.graph._writes": "src/distgrad/graph/_writes.pyx",
    "distgrad.graph._methods": "src/distgrad/graph/_methods.pyx",
    "distgrad.graph._gradient": "src/distgrad/graph/_gradient.pyx",
    "distgrad.graph._engine": "src/distgrad/graph/_engine.pyx",
    "distgrad._core": "src/distgrad/_core.pyx",
    "distgrad._codec": "src/distgrad/_codec.pyx",
    "distgrad.wire._schema": "src/distgrad/wire/_schema.pyx",
    "distgrad.wire._encoder": "src/distgrad/wire/_encoder.pyx",
    "distgrad.wire._decoder": "src/distgrad/wire/_decoder.pyx",
    "distgrad.transport._pool": "src/distgrad/transport/_pool.pyx",
    "distgrad.transport._ring": "src/distgrad/transport/_ring.pyx",
    "distgrad.transport._arena": "src/distgrad/transport/_arena.pyx",
    "distgrad.transport._poller": "src/distgrad/transport/_poller.pyx",
    "distgrad.transport._outlet": "src/distgrad/transport/_outlet.pyx",
    "distgrad.transport._lane": "src/distgrad/transport/_lane.pyx",
    "distgrad.transport._stream": "src/distgrad/transport/_stream.pyx",
    "distgrad.autograd._current": "src/distgrad/autograd/_current.pyx",
    "distgrad.autograd._lock": "src/distgrad/autograd/_lock.pyx",
    "distgrad.rpc._leader": "src/distgrad/rpc/_leader.pyx",
    "distgrad.rpc._pulse": "src/distgrad/rpc/_pulse.pyx",
    "distgrad.rpc._activity": "src/distgrad/rpc/_activity.pyx",
    "distgrad.rpc._future": "src/distgrad/rpc/_future.pyx",
    "distgrad.rpc._crew": "src/distgrad/rpc/_crew.pyx",
    "distgrad.rpc._exchange": "src/distgrad/rpc/_exchange.pyx",
    "distgrad.optim._updates": "src/distgrad/optim/_updates.pyx",
    # Plain Python, compiled for speed; a .pxd beside some adds types.
    "distgrad.autograd.closure": "src/distgrad/autograd/closure.py",
    "distgrad.autograd.protocol": "src/distgrad/autograd/protocol.py",
    "distgrad.autograd.pass_table": "src/distgrad/autograd/pass_table.py",
    "distgrad.autograd.part": "src/distgrad/autograd/part.py",
    "distgrad.autograd.functions": "src/distgrad/autograd/functions.py",
    "distgrad.autograd.context": "src/distgrad/autograd/context.py",
    "distgrad.autograd.tombstones": "src/distgrad/autograd/tombstones.py",
    "distgrad.autograd.roots": "src/distgrad/autograd/roots.py",
    "distgrad.autograd.recording": "src/distgrad/autograd/recording.py",
    "distgrad.autograd.engine": "src/distgrad/autograd/engine.py",
}
HEADERS = glob.glob("src/distgrad/**/*.h", recursive=True)  # Cython finds those beside a .pyx only


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


SWITCHES = ("DISTGRAD_DEBUG", "DISTGRAD_PROFILE", "DISTGRAD_TRACE", "DISTGRAD_SANITIZE")
DEBUG, PROFILE, TRACE, SANITIZE = map(switched_on, SWITCHES)
SANITIZERS = os.environ.get("DISTGRAD_SANITIZE", "")
if SANITIZERS == "1":
    SANITIZERS = "address,undefined"
# One folder a combination: only timestamps are compared, and switches leave none.
BUILD = "build/" + ("-".join(filter(switched_on, SWITCHES)) or "release")
if SANITIZE:
    BUILD += "-" + SANITIZERS.replace(",", "-")

directives = {
    "language_level": 3,
    "embedsignature": True,
    "binding": True,
    "boundscheck": DEBUG,
    "wraparound": DEBUG,
    "initializedcheck": DEBUG,
    "cdivision": True,
    "linetrace": TRACE,
}
macros = [
    ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
    ("DISTGRAD_DEBUG", str(int(DEBUG))),
    ("DISTGRAD_SANITIZE", str(int(SANITIZE))),
]
if TRACE:
    macros += [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]
flags = ["-O0", "-g"] if DEBUG else ["-O3"]
flags += ["-ffp-contract=off"]  # results must not depend on the processor
flags += ["-fno-plt"]  # a pass calls the interpreter thousands of times: without stubs
if PROFILE:
    flags += ["-g", "-fno-omit-frame-pointer"]
links = []
if SANITIZE:
    links = [f"-fsanitize={SANITIZERS}"]
    flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", *links]

setup(
    options={"build": {"build_base": BUILD}},
    ext_modules=cythonize(
        [
            Extension(
                name,
                [path],
                include_dirs=[numpy.get_include(), "src/distgrad"],
                depends=HEADERS,
                define_macros=macros,
                extra_compile_args=flags,
                extra_link_args=links,
            )
            for name, path in MODULES.items()
        ],
        compiler_directives=directives,
        build_dir=BUILD,
    ),
)
