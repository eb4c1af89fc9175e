"""Who may import whom: the table of docs/architecture.md, held against every import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "distgrad"

# From the bottom up; one layer is a list of columns that do not see each other.
LAYERS: list[list[set[str]]] = [
    [{"errors", "config"}],
    [{"_core", "graph"}, {"_codec", "wire"}],
    [{"ops", "functional", "xp"}, {"message"}, {"transport"}],
    [{"rpc"}],
    [{"autograd"}, {"rref"}],
    [{"optim"}, {"nn"}],
    [{"launch"}, {"interop"}, {"profiler"}, {"testing"}],
]
# Layer 3 reaches down only where its purpose needs it.
CODEC = {"_codec", "wire"}
BLIND = {
    "ops": CODEC,
    "message": CODEC | {"_core", "graph"},
    "transport": {"_core", "graph", "wire"},
}
# The package's own faces import from all layers; the highest layer uses them as users do.
TOP = {"__init__", "__main__"}
# Upward communication is by registration. These two name upper layers, as text: the one
# loads them when a worker starts, the other shows RRef and remote where users look for them.
NAMING_UPWARD = {"rpc/extensions.py": {"autograd", "rref"}, "rpc/__init__.py": {"rref"}}

OPTIONAL = {"cupy", "jax", "mpi4py", "ray", "torch"}
DEMO_ONLY = {"rich", "sklearn"}
NOT_IN_PROTOCOLS = {
    *("asyncio", "concurrent", "multiprocessing", "os", "queue", "random", "secrets"),
    *("select", "selectors", "signal", "socket", "subprocess", "threading", "time", "uuid"),
}

SOURCES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyi", ".pyx", ".pxd"))
PROTOCOLS = [p for p in SOURCES if p.name == "protocol.py"]
COMPILED_IMPORT = re.compile(
    r"^\s*(?:from\s+(?P<base>[\w.]+)\s+)?c?import\s+(?:\((?P<many>[^)]*)\)|(?P<names>[^#\n]+))",
    re.M,
)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def absolute(path: Path, module: str | None, level: int) -> str:
    """Return the full name behind ``from <level dots><module> import``."""
    if level == 0:
        return module or ""
    parents = ("distgrad", *path.relative_to(PACKAGE).parent.parts)
    return ".".join((*parents[: len(parents) - level + 1], *([module] if module else [])))


def python_imports(path: Path) -> Iterator[str]:
    """Yield full names: modules, and ``module.name`` of a from-import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(path, node.module, node.level)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def compiled_imports(path: Path) -> Iterator[str]:
    for match in COMPILED_IMPORT.finditer(path.read_text()):
        base = match["base"] or ""
        dots = len(base) - len(base.lstrip("."))
        base = absolute(path, base[dots:] or None, dots)
        for entry in (match["many"] or match["names"]).split(","):
            if name := entry.split(" as ")[0].strip():
                yield f"{base}.{name}" if base else name


def imports(path: Path) -> set[str]:
    reader = python_imports if path.suffix in (".py", ".pyi") else compiled_imports
    return set(reader(path))


def inside(path: Path) -> set[str]:
    """Return the top-level rooms of the package that `path` imports from."""
    names = (name.split(".") for name in imports(path) if name.split(".")[0] == "distgrad")
    return {parts[1] if is_room(parts[1:2]) else "__init__" for parts in names}


def is_room(parts: list[str]) -> bool:
    return bool(parts) and any(parts[0] in column for layer in LAYERS for column in layer)


def outside(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} - {"distgrad"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].split(".")[0]


def place(name: str) -> tuple[int, int]:
    """Return layer and column of a room; the package's own faces stand on top."""
    if name in TOP:
        return len(LAYERS), 0
    for height, layer in enumerate(LAYERS):
        for column, rooms in enumerate(layer):
            if name in rooms:
                return height, column
    raise AssertionError(f"{name!r} has no place in the layering table")


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or importer in TOP:
        return True
    here, there = place(importer), place(imported)
    if imported == "__init__":
        return here[0] == len(LAYERS) - 1
    return here == there or (there[0] < here[0] and imported not in BLIND.get(importer, ()))


def test_layering_every_source_has_a_place() -> None:
    assert SOURCES
    for path in SOURCES:
        place(room(path))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_layering_imports_go_strictly_downward(path: Path) -> None:
    wrong = {name for name in inside(path) if not may_import(room(path), name)}
    assert wrong <= NAMING_UPWARD.get(relative(path), set())


@pytest.mark.parametrize("path", PROTOCOLS, ids=relative)
def test_layering_protocols_do_no_input_or_output(path: Path) -> None:
    assert not outside(path) & NOT_IN_PROTOCOLS
    assert not {name for name in imports(path) if name.startswith("numpy.random")}
    assert inside(path) <= {"errors", "config", "message", room(path)}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_layering_optional_libraries_stay_in_the_file_named_after_them(path: Path) -> None:
    assert outside(path) & OPTIONAL <= {path.stem}
    if not relative(path).startswith("launch/demo"):
        assert not outside(path) & DEMO_ONLY


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("rpc", "transport", True),
        ("transport", "rpc", False),
        ("autograd", "rref", False),
        ("ops", "transport", False),
        ("transport", "_codec", True),
        ("transport", "_core", False),
        ("functional", "ops", True),
        ("rpc", "__init__", False),
        ("launch", "__init__", True),
        ("launch", "testing", False),
        ("__init__", "nn", True),
    ],
)
def test_layering_rule_says_what_the_house_says(
    importer: str, imported: str, allowed: bool
) -> None:
    assert may_import(importer, imported) is allowed


def test_layering_reader_sees_every_form_of_import(tmp_path: Path) -> None:
    source = tmp_path / "x.pyx"
    source.write_text(
        "cimport numpy as cnp\nimport os, sys\nfrom distgrad cimport _codec\n"
        "from distgrad._core cimport (\n    Node,\n    Tensor,\n)\n"
    )
    assert imports(source) == {
        *("numpy", "os", "sys", "distgrad._codec"),
        *("distgrad._core.Node", "distgrad._core.Tensor"),
    }


def test_layering_table_is_the_one_in_the_documentation() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^(\d)  ([^(\n]+)", text, re.M))
    documented = [[set(c.split()) for c in rows[n].split("|")] for n in sorted(rows)]
    assert documented == LAYERS


def test_layering_every_room_is_described_in_the_documentation() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    house = text[text.index("src/distgrad/") : text.index("## Who may import whom")]
    assert {room(path) for path in SOURCES} - TOP - set(re.findall(r"\w+", house)) == set()
