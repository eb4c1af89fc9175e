"""What is shipped builds, installs into an empty environment, and works there.

One build serves all tests: an sdist of the checkout, and a wheel from that sdist.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
SOURCES = {".py", ".pyi", ".pyx", ".pxd", ".h"}
NOT_SOURCE = {".git", ".venv", "build", "dist", "__pycache__", "results"}

pytestmark = [pytest.mark.packaging, pytest.mark.deadline(900)]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def can_build_here() -> bool:
    """Return whether the build requirements are installed beside the tests."""
    try:
        enough = int(version("setuptools").split(".")[0]) >= 77
        return enough and version("Cython") >= "3.1"
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist, and the wheel that was built from it."""
    checkout = tmp_path_factory.mktemp("build") / "checkout"
    outputs = shutil.ignore_patterns(*NOT_SOURCE, "*.so", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, checkout, ignore=outputs)
    isolation = ["--no-isolation"] if can_build_here() else []
    dist = checkout.parent / "dist"
    run(sys.executable, "-m", "build", *isolation, "--outdir", dist, checkout, cwd=checkout.parent)
    return dist


@pytest.fixture(scope="module")
def sdist_names(built: Path) -> set[str]:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel_names(built: Path) -> set[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return set(archive.namelist())


def test_sdist_holds_every_source(sdist_names: set[str]) -> None:
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "src").rglob("*.*")
               if p.suffix in SOURCES}  # fmt: skip
    assert sources - sdist_names == set()
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= sdist_names


def test_sdist_holds_nothing_generated(sdist_names: set[str]) -> None:
    assert [n for n in sdist_names if n.endswith((".c", ".so", ".pyc"))] == []


def test_wheel_holds_modules_stubs_and_compiled_extensions(wheel_names: set[str]) -> None:
    for pyx in (ROOT / "src").rglob("*.pyx"):
        stem = pyx.relative_to(ROOT / "src").with_suffix("").as_posix()
        assert f"{stem}.pyi" in wheel_names
        assert any(name.startswith(f"{stem}.") and name.endswith(".so") for name in wheel_names)
    modules = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.py")}
    assert modules | {"distgrad/py.typed"} <= wheel_names


def test_wheel_holds_no_sources_of_extensions_and_no_tests(wheel_names: set[str]) -> None:
    assert [n for n in wheel_names if n.endswith((".c", ".pyx", ".h")) or "tests/" in n] == []


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_distribution_installs_into_an_empty_environment_and_works(
    built: Path, tmp_path: Path, kind: str
) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", next(built.glob(f"*.{kind}")), cwd=tmp_path)
    shown = run(python, "-W", "error", SMOKE, cwd=tmp_path)
    assert f"distgrad at {tmp_path}" in shown
    assert "numpy" in run(tmp_path / "env" / "bin" / "distgrad", "doctor", cwd=tmp_path)
