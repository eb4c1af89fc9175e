"""Public names say what they do: an imperative line, then the contract, in numpydoc."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "distgrad"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXTENSIONS = sorted(PACKAGE.rglob("*.pyx"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Function = ast.FunctionDef | ast.AsyncFunctionDef
SPEAKING = ("_", "test_")  # not public, or a sentence already


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def exported(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def inherited(node: Function) -> bool:
    """Return whether the contract of a method stands elsewhere: overrides and overloads."""
    return any(ast.unparse(d).split(".")[-1] in ("override", "overload", "setter")
               for d in node.decorator_list)  # fmt: skip


def public_definitions(path: Path) -> Iterator[tuple[str, Definition]]:
    """Yield the exported definitions of a module and the public methods of its classes."""
    tree = ast.parse(path.read_text())
    names = exported(tree)
    for node in tree.body:
        if isinstance(node, Definition) and node.name in names:
            yield node.name, node
            if isinstance(node, ast.ClassDef) and not overrides_documented_base(node):
                yield from methods(node)


def overrides_documented_base(node: ast.ClassDef) -> bool:
    """A class with bases of ours may leave overridden methods to their docstrings."""
    return any(ast.unparse(base).split(".")[-1] not in ("ABC", "NamedTuple") for base in node.bases)


def methods(node: ast.ClassDef) -> Iterator[tuple[str, Definition]]:
    for item in node.body:
        if (
            isinstance(item, Function)
            and not item.name.startswith(SPEAKING)
            and not inherited(item)
        ):
            yield f"{node.name}.{item.name}", item


def faults(doc: str | None) -> str:
    if not doc or not doc.strip():
        return "has no docstring"
    first, *rest = inspect.cleandoc(doc).splitlines()
    if not first.rstrip().endswith((".", ":")):
        return f"has a first line that is no sentence: {first!r}"
    return "has no blank line after the first" if rest and rest[0].strip() else ""


def documented_parameters(doc: str) -> set[str]:
    """Return the names that the section Parameters of a numpydoc docstring lists."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}|\Z)", doc, re.M | re.S)
    lines = section[1].splitlines() if section else []
    heads = (line.split(" : ")[0] for line in lines if line and not line[0].isspace())
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def parameters(node: Definition) -> set[str]:
    """Return the parameters of a function, or of a class: its ``__init__`` and fields."""
    if isinstance(node, ast.ClassDef):
        fields = {ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)}
        makers = (n for n in node.body if isinstance(n, Function) and n.name == "__init__")
        return fields.union(*(parameters(maker) for maker in makers))
    arguments = node.args
    rest = [a for a in (arguments.vararg, arguments.kwarg) if a]
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest]
    return {argument.arg for argument in names}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_docstrings_module_says_what_it_is_for(path: Path) -> None:
    fault = faults(ast.get_docstring(ast.parse(path.read_text())))
    assert fault == "" or path.stat().st_size == 0


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_docstrings_public_definition_has_one(path: Path) -> None:
    wrong = {name: faults(ast.get_docstring(node)) for name, node in public_definitions(path)}
    assert {name: fault for name, fault in wrong.items() if fault} == {}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_docstrings_parameters_exist(path: Path) -> None:
    unknown = {
        name: surplus
        for name, node in public_definitions(path)
        if (surplus := documented_parameters(ast.get_docstring(node) or "") - parameters(node))
    }
    assert unknown == {}


@pytest.mark.parametrize("path", EXTENSIONS, ids=relative)
def test_docstrings_compiled_public_name_has_one(path: Path) -> None:
    module = importlib.import_module("distgrad." + relative(path)[:-4].replace("/", "."))
    stub = ast.parse(path.with_suffix(".pyi").read_text())
    public = [n.name for n in stub.body if isinstance(n, Definition) and n.name[0] != "_"]
    assert public or ast.get_docstring(stub)  # one that is only cimported says so
    assert [name for name in public if not written(name, getattr(module, name).__doc__)] == []


def written(name: str, doc: str | None) -> str:
    """Return a compiled docstring without the signature that Cython puts before it."""
    lines = (doc or "").splitlines()
    return "\n".join(lines[1:] if lines and lines[0].startswith(f"{name}(") else lines).strip()


def test_docstrings_checker_reads_a_parameter_section() -> None:
    doc = (
        "Do.\n\nParameters\n----------\na, b\n    One.\n*rest\n    More.\n\nReturns\n-------\nint\n"
    )
    assert documented_parameters(doc) == {"a", "b", "rest"}


@pytest.mark.parametrize("doc", [None, "", "no end", "One.\nTwo."])
def test_docstrings_checker_finds_a_bad_one(doc: str | None) -> None:
    assert faults(doc)
