"""``distgrad doctor``: what distgrad finds on this machine, and what would hurt it."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from distgrad.config import Config, config
from distgrad.launch.cli import installed_version

__all__ = ["Finding", "add_arguments", "examine", "main"]

PACKAGE = Path(__file__).parents[1]
SHARED_MEMORY = "/dev/shm"
LEAST_SHARED_MEMORY = 64 * 2**20
LEAST_FILES = 1024
LONGEST_SOCKET_PATH = 107  # bytes, of sun_path in sockaddr_un
ROOM_FOR_SOCKET = 40  # what a transport appends to the temporary directory


class Finding(NamedTuple):
    """One line of the report; ``problem`` is empty where all is well."""

    subject: str
    fact: str
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``distgrad doctor``: there are none."""


def main(args: argparse.Namespace) -> int:
    """Print all findings; return 1 if one of them is a problem."""
    findings = examine()
    for finding in findings:
        print(f"{finding.subject:16} {finding.fact}")
        if finding.problem:
            print(f"{'':16} problem: {finding.problem}")
    return int(any(finding.problem for finding in findings))


def examine() -> list[Finding]:
    """Look at this machine and this process."""
    return [finding for check in CHECKS for finding in check()]


def _versions() -> Iterator[Finding]:
    yield Finding("distgrad", installed_version())
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("numpy", version("numpy"))


def _extensions() -> Iterator[Finding]:
    for stub in sorted(PACKAGE.rglob("*.pyi")):  # one beside each extension
        name = ".".join(stub.relative_to(PACKAGE).with_suffix("").parts)
        try:
            importlib.import_module(f"distgrad.{name}")
        except ImportError as error:
            hint = "build it: pip install -e . (or pip install .)"
            yield Finding("extension", f"{name}: {error}", hint)


def _cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    spin = f"waiting threads spin up to {config.spin_us:g} µs"
    yield Finding("cores", f"{cores}; {spin if cores > 1 else 'no spinning on a single core'}")


def _shared_memory() -> Iterator[Finding]:
    if not os.path.isdir(SHARED_MEMORY):
        yield Finding("shared memory", "none", f"{SHARED_MEMORY} is missing: mount a tmpfs there")
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    small = "a container may need --shm-size" if free < LEAST_SHARED_MEMORY else ""
    yield Finding("shared memory", f"{free / 2**20:.0f} MiB free", small)


def _limits() -> Iterator[Finding]:
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < LEAST_FILES
    yield Finding(
        "open files",
        _limit(files) if files == hard else f"{_limit(files)}, at most {_limit(hard)}",
        "large worlds need more: ulimit -n" if few else "",
    )
    threads, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    yield Finding("processes", f"{_limit(threads)} processes and threads of this user")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _sockets() -> Iterator[Finding]:
    directory = tempfile.gettempdir()
    room = LONGEST_SOCKET_PATH - len(os.fsencode(directory))
    problem = "too long for Unix sockets: set TMPDIR" if room < ROOM_FOR_SOCKET else ""
    yield Finding("temporary files", directory, problem)


def _environment() -> Iterator[Finding]:
    try:  # rpc needs the extensions; if they are missing, that has been said above
        environment = importlib.import_module("distgrad.rpc.environment")
    except ImportError:
        return
    found = environment.detect(os.environ)
    where = f"rank {found.rank} of {found.world_size}" if found.launcher else "not in a world"
    yield Finding("launcher", f"{found.launcher or 'none'}: {where}")


def _secret() -> Iterator[Finding]:
    secret = next((s for s in ("SECRET", "SECRET_FILE") if os.environ.get(f"DISTGRAD_{s}")), None)
    only_own = "none: workers serve this user on this host only"
    yield Finding("secret", f"from DISTGRAD_{secret}" if secret else only_own)


def _settings() -> Iterator[Finding]:
    for field in fields(Config):
        if getattr(config, field.name) != field.default:
            yield Finding("setting", f"{field.name} = {getattr(config, field.name)}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(_versions, _extensions, _cores, _shared_memory, _limits, _sockets),
    *(_environment, _secret, _settings),
)
