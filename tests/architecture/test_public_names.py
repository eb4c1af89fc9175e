"""What a module offers is written down: a literal, sorted ``__all__`` that holds."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "distgrad"
MODULES = sorted(PACKAGE.rglob("*.py"))
FACES = sorted(PACKAGE.rglob("__init__.py"))
PUBLIC_FACES = ["distgrad", "distgrad.rpc", "distgrad.autograd", "distgrad.optim"]


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def literal_all(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            return list(names)
    return None


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_public_names_are_a_literal_without_repetition(path: Path) -> None:
    names = literal_all(path)
    if names is None:
        assert path.name in ("__init__.py", "__main__.py"), "a module needs an __all__"
        assert path.parent != PACKAGE or path.name == "__main__.py"
    else:
        assert len(names) == len(set(names))


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__main__.py"], ids=relative)
def test_public_names_resolve(path: Path) -> None:
    module = importlib.import_module(name_of(path))
    assert [name for name in literal_all(path) or [] if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", FACES, ids=relative)
def test_public_names_faces_hold_no_logic(path: Path) -> None:
    """A package's ``__init__`` imports and names; ``install``, ``__getattr__`` are its hooks."""
    allowed = {"__getattr__", "__dir__", "install"}
    functions = {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert functions <= allowed


def test_public_names_import_needs_numpy_alone() -> None:
    code = "import sys, json, distgrad; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    roots = {name.split(".")[0] for name in json.loads(output)}
    site = {"sitecustomize", "usercustomize"}
    hooks = {name for name in roots if name.startswith(("__editable__", "_distutils_hack"))}
    foreign = roots - set(sys.stdlib_module_names) - site - hooks - {"cython_runtime"}
    assert {name for name in foreign if not name.startswith("_")} == {"distgrad", "numpy"}
