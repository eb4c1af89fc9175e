"""Build the package with sanitizers in it, and run Python with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: What every sanitized process of this project runs with. Python frees little at its end.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "PYTHONMALLOC": "malloc",  # each object in a block of its own, with guards
    "PYTHONHASHSEED": "0",
}


def can_fuzz() -> bool:
    """Whether there is a clang with libFuzzer."""
    if not shutil.which("clang++"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cc"
        source.write_text('extern "C" int LLVMFuzzerTestOneInput(const char *, long){return 0;}')
        command = ["clang++", "-fsanitize=fuzzer,address", source, "-o", f"{folder}/probe"]
        return subprocess.run(command, capture_output=True).returncode == 0


def build(sanitizers: str, compiler: str) -> Path:
    """Compile the package; return the folder to import it from."""
    folder = ROOT / "build" / ("DISTGRAD_SANITIZE-" + sanitizers.replace(",", "-"))
    library = folder / "lib"
    environment = os.environ | {
        "DISTGRAD_SANITIZE": sanitizers,
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared",
    }
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(library)]
    log = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if log.returncode:
        sys.exit(log.stdout[-4000:] + log.stderr[-4000:])
    return library


def build_driver(folder: Path) -> Path:
    """Link libFuzzer, the sanitizers and this interpreter."""
    driver, source = folder / "driver", HERE / "_driver.cc"
    if driver.exists() and driver.stat().st_mtime > source.stat().st_mtime:
        return driver
    variables = sysconfig.get_config_vars()
    flags = ["-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-rdynamic"]
    where = [f"-L{variables['LIBDIR']}", f"-Wl,-rpath,{variables['LIBDIR']}"]
    libraries = [f"-lpython{variables['LDVERSION']}", *variables["LIBS"].split(), "-lm"]
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(
        ["clang++", *flags, include, source, "-o", driver, *where, *libraries], check=True
    )
    return driver


def environment(library: Path) -> dict[str, str]:
    """Return the environment of a sanitized process."""
    path = os.pathsep.join(map(str, (library, HERE)))
    return os.environ | OPTIONS | {"PYTHONPATH": path}


def build_for_python(compiler: str) -> dict[str, str]:
    """Compile for an interpreter that knows of no sanitizer; return its environment."""
    library = build("address,undefined", compiler)
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return environment(library) | {"LD_PRELOAD": ":".join(runtimes)}
