"""What holds for every test: a deadline that shows where threads hang, and leak books.

Each phase of a test (set-up, call, tear-down) must end within `DEADLINE_S` seconds or
what its marker ``deadline(seconds)`` says. A phase that does not fails with the stacks of
all threads. Where not even that is possible, because C code holds the GIL, the run ends
half a deadline later with the same stacks on stderr.

In a debug build (``DISTGRAD_DEBUG=1``) the core counts its live objects; a test that
passes but leaves more than it found fails.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

DEADLINE_S = 60.0
SETTLE_S = 5.0  # a world that outlives the test still releases contexts on its other workers
STDERR = pytest.StashKey[int]()
BOOKS = pytest.StashKey[dict[str, int]]()
PASSED = pytest.StashKey[bool]()

# One shared, noisy machine: time is judged by the deadline above, not by hypothesis.
settings.register_profile(
    "distgrad",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("distgrad")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): fail a phase that takes longer")
    config.addinivalue_line("markers", "packaging: builds and installs the package")
    # A shell that starts the run in the background has it ignore Ctrl-C, and all its children too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not captured yet, so what is written here is seen even if the run is cut short.
    config.stash[STDERR] = os.dup(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("distgrad", "how long random tests run")
    group.addoption("--long", action="store_true", help="as long as a release needs")
    group.addoption("--programs", type=int, default=None, help="number of random programs")
    group.addoption("--seed", type=int, default=0, help="seed of the first random program")


@pytest.fixture
def extent(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """Choose between two numbers: the second with ``--long``."""
    return lambda short, long: long if pytestconfig.getoption("--long") else short


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """Return the seed of the first random program; the others follow."""
    number: int = pytestconfig.getoption("--seed")
    return number


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR])


def seconds_for(item: pytest.Item) -> float:
    marker = item.get_closest_marker("deadline")
    return float(marker.args[0]) if marker else DEADLINE_S


def stacks() -> str:
    """Return the stacks of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


@contextmanager
def deadline(item: pytest.Item) -> Iterator[None]:
    """Fail the test from a signal when its time is up; end the run when that has no effect."""
    if item.config.getoption("usepdb"):
        yield
        return
    seconds = seconds_for(item)

    def expire(_signum: int, _frame: FrameType | None) -> None:
        pytest.fail(f"the deadline of {seconds:g} s has passed; all threads:\n{stacks()}")

    before = signal.signal(signal.SIGALRM, expire)
    faulthandler.dump_traceback_later(1.5 * seconds, exit=True, file=item.config.stash[STDERR])
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def live_objects() -> Callable[[], dict[str, int]] | None:
    """Return the core's count of live objects by class, if this build keeps books."""
    try:
        core = importlib.import_module("distgrad._core")
    except ImportError:
        return None
    return getattr(core, "_debug_counts", None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with deadline(item):
        yield
    if count := live_objects():
        item.stash[BOOKS] = count()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with deadline(item):
        yield
    item.stash[PASSED] = True  # a failure's traceback keeps objects alive


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with deadline(item):
        yield
    count, books = live_objects(), item.stash.get(BOOKS, None)
    if count is None or books is None or not item.stash.get(PASSED, False):
        return
    until = time.monotonic() + SETTLE_S
    while (grown := growth(books, count)) and time.monotonic() < until:
        gc.collect()  # only now: a collection takes longer than most tests
        time.sleep(0.01)
    assert not grown, f"the test left live objects behind: {grown}"


def growth(books: dict[str, int], count: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Return of which classes more objects are alive than the books say, and how many."""
    return {name: n - books.get(name, 0) for name, n in count().items() if n > books.get(name, 0)}
