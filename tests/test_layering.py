"""Data flows one way: a module imports only from its own room and from rooms above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "fourierft_export"
SOURCE = Path(__file__).resolve().parent.parent / PACKAGE

ROOMS = (
    "errors", "types", "spectral", "files", "models", "bundle", "adapt", "train", "merge",
    "onnx_graph", "recover", "proof", "demo", "cli",
)  # fmt: skip
# proof checks what these make, so it must not share their code.
CHECKED_BY_PROOF = {"adapt", "merge", "onnx_graph", "recover"}
# Within onnx_graph: what all of it shares, then folder by folder, then the verbs.
FOLDERS = (
    {"feeds", "adapter_interface", "mode_names", "report", "adapters"},
    {"graph"}, {"locate"}, {"modes"}, {"trace"}, {"runtime"},
)  # fmt: skip
STRANGERS = {"trace", "runtime"}
NOT_IN_ROOMS = {"__init__", "__main__"}  # the front door: it may see every room


def imported_modules(
    source: str, module: str, is_package: bool, *, for_types: bool = True
) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in `source`, inside functions too.

    Without `for_types`, those under `if TYPE_CHECKING:` are left out.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    nodes = [*ast.walk(ast.parse(source))]
    if not for_types:
        checks = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
        left_out = {id(inner) for check in checks for inner in ast.walk(check)}
        nodes = [node for node in nodes if id(node) not in left_out]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*anchor, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports in `source` that reach a room below its own, or around a room's independence."""
    room = module.split(".")[1]
    found = []
    for line, name in imported_modules(source, module, is_package):
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target not in ROOMS:
            if target != "__version__":
                found.append(f"{module}:{line} imports {name}, which is in no room")
        elif ROOMS.index(target) > ROOMS.index(room):
            found.append(f"{module}:{line} imports {name}, which is below {room}")
        elif room == "proof" and target in CHECKED_BY_PROOF:
            found.append(f"{module}:{line} imports {name}, which proof has to check")
    return found


def import_circles(sources: dict[str, str]) -> set[frozenset[str]]:
    """Groups of modules that import each other, directly or through others.

    Args:
        sources: module -> its text; packages end in `.__init__`. Imports in functions count.
    """
    reaches: dict[str, set[str]] = {}
    for module, source in sources.items():
        is_package = module.endswith(".__init__")
        name = module.removesuffix(".__init__")
        reaches[module] = set()
        for _, target in imported_modules(source, name, is_package, for_types=False):
            stems = [target, target.rpartition(".")[0]]
            found = [s for stem in stems for s in (stem, f"{stem}.__init__") if s in sources]
            reaches[module] |= set(found[:1])
    for middle in sources:
        for module in sources:
            if middle in reaches[module]:
                reaches[module] |= reaches[middle]
    circles = (
        frozenset(other for other in reaches[module] if module in reaches[other])
        for module in sources
    )
    return {circle for circle in circles if circle}


def modules() -> list[tuple[str, Path]]:
    paths = sorted(SOURCE.rglob("*.py"))
    return [(".".join(p.relative_to(SOURCE.parent).with_suffix("").parts), p) for p in paths]


def test_every_module_is_in_a_room() -> None:
    names = {name.split(".")[1] for name, _ in modules()}
    assert names - NOT_IN_ROOMS == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_upwards(room: str) -> None:
    found = []
    for name, path in modules():
        if name.split(".")[1] == room:
            is_package = name.endswith(".__init__")
            module = name.removesuffix(".__init__")
            found += violations(path.read_text("utf-8"), module, is_package)
    assert found == []


def test_folders_of_onnx_graph_import_only_upwards() -> None:
    """Each folder imports only from those before it; trace and runtime do not know each other."""
    order = {name: level for level, names in enumerate(FOLDERS) for name in names}
    found, seen = [], set()
    for name, path in modules():
        parts = name.split(".")
        if parts[1] != "onnx_graph" or parts[2] == "__init__":
            continue
        own = order.get(parts[2], len(FOLDERS))
        for line, there in imported_modules(path.read_text("utf-8"), name, parts[-1] == "__init__"):
            if there.split(".")[0] == "torch" and parts[2] != "trace":
                found.append(f"{name}:{line} imports torch")
            target = there.split(".")[2] if there.startswith(f"{PACKAGE}.onnx_graph.") else None
            level = order.get(target, len(FOLDERS)) if target else -1
            seen.add(target)
            if level > own or (target != parts[2] and {target, parts[2]} == STRANGERS):
                found.append(f"{name}:{line} imports {there}")
    assert found == []
    assert seen >= {"adapter_interface", "graph", "locate", "modes", "trace", "runtime"}


def test_no_import_circles() -> None:
    assert import_circles({name: path.read_text("utf-8") for name, path in modules()}) == set()


def test_import_circles_are_found() -> None:
    sources = {
        "p.__init__": "from .c import f",
        "p.a": "from . import b",
        "p.b": "def f():\n    from .c import x",
        "p.c": "from p.a import y",
        "p.d": "from __future__ import annotations\nif TYPE_CHECKING:\n    from .e import z",
        "p.e": "from .d import z",
    }
    assert import_circles(sources) == {frozenset({"p.a", "p.b", "p.c"})}


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import fourierft_export.merge.engine", "adapt.fourier_linear", "below adapt"),
        ("from fourierft_export import cli", "proof.run", "below proof"),
        ("from ..cli import main", "demo.run", "below demo"),
        ("def f():\n    from ..merge import x", "spectral.delta", "below spectral"),
        ("import_module('fourierft_export.cli.main')", "merge.a", "below merge"),
        ("from fourierft_export.merge import x", "proof.run", "has to check"),
        ("from fourierft_export import Bundle", "merge.a", "in no room"),
        ("from . import entries", "spectral.delta", None),
        ("from ..errors import UsageError", "cli.main", None),
        ("from fourierft_export import __version__", "cli.main", None),
    ],
)
def test_the_rule_sees_every_kind_of_import(source: str, module: str, expected: str | None) -> None:
    found = violations(source, f"fourierft_export.{module}")
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]
