"""The house: rooms import in one direction only, without cycles, and pure rooms know nothing of models."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
MODELS = {"torch", "transformer_lens", "transformers"}

# Room -> the rooms it may import besides itself. A module belongs to the room with the longest matching name.
_SHARED = [
    "replacement.number_checks",
    "replacement.scratch_folders",
    "replacement.files",
    "replacement.memory",
    "replacement.console",
    "replacement.notebook",
    "replacement.allocator",
    "replacement.start",
    "replacement.threads",
    "replacement.token_texts",
]
_LIBRARY = [
    "replacement.crosscoder",
    "replacement.language_model",
    "replacement.splicing",
    "replacement.loading",
    "replacement.demo.corpus",
    "replacement.data",
    "replacement.index",
    "replacement.validation",
    "replacement.training",
]
_COMMANDS = ["replacement"]  # what stands beside the rooms: loading, demo, the command line
ROOMS: dict[str, set[str]] = {room: set(_SHARED[:number]) for number, room in enumerate(_SHARED)}
ROOMS |= {room: {*_SHARED, *_LIBRARY[:number]} for number, room in enumerate(_LIBRARY)}
ROOMS["replacement"] = {*_SHARED, *_LIBRARY}
_REPLACEMENT = {*_SHARED, *_LIBRARY, *_COMMANDS}
ROOMS |= {
    "circuits.graph": {*_SHARED, "replacement.splicing"},
    "circuits.export": {"replacement.number_checks", "replacement.token_texts", "circuits.graph"},
    "circuits.viewer": {
        "replacement.number_checks",
        "replacement.token_texts",
        "replacement.index",
        "circuits.graph",
        "circuits.export",
    },
    "circuits.attribution": {"circuits.graph", *_REPLACEMENT},
    "circuits.heads": {"circuits.graph", "circuits.attribution", *_REPLACEMENT},
    "circuits.validation": {"circuits.graph", "circuits.attribution", "circuits.heads", *_REPLACEMENT},
    "circuits.explain": {
        *(f"circuits.{room}" for room in ("graph", "attribution", "heads", "validation")),
        *_REPLACEMENT,
    },
    "circuits.progress": set(),
    "circuits.trace_options": {
        *(f"circuits.{room}" for room in ("graph", "export", "viewer", "attribution", "heads")),
        *_REPLACEMENT,
    },
    "circuits.server": {
        *(f"circuits.{room}" for room in ("graph", "viewer", "attribution", "progress", "trace_options")),
        *_REPLACEMENT,
    },
    "circuits": {
        *(f"circuits.{room}" for room in ("graph", "export", "viewer", "attribution", "heads", "validation")),
        *(f"circuits.{room}" for room in ("explain", "server")),
        *(f"circuits.{module}" for module in ("progress", "trace_options")),
        *_REPLACEMENT,
    },
}
PURE_ROOMS = ("circuits.graph.", "circuits.export.", "circuits.viewer.")
PURE_MODULES = (
    "circuits.heads.relu_credit",
    "circuits.heads.qk_result",
    "replacement.start",
    "replacement.console",
    "replacement.notebook",
    "replacement.token_texts",
)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of both packages."""
    result = {}
    for package in ("replacement", "circuits"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


MODULES = modules()
LAZY = {package: importlib.import_module(package)._LAZY for package in ("replacement", "circuits")}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the modules a file imports, those in functions too; not those for type checkers only.

    `from a import b` counts as `a.b` where that is a module, as the module that `b` is taken from on first use where `a` is
    one of our packages, else as `a`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    result: set[str] = set()
    for node in _nodes(tree, top_level_only=top_level_only):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                result.add(full if full in MODULES else LAZY.get(str(node.module), {}).get(alias.name, node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            result |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return result


def _nodes(node: ast.AST, *, top_level_only: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        for_checkers = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        skipped = top_level_only and isinstance(child, ast.FunctionDef)
        if not (for_checkers or skipped):
            yield from _nodes(child, top_level_only=top_level_only)


def import_graph() -> nx.DiGraph:
    """An edge for every import between our own modules, lazy ones included."""
    graph = nx.DiGraph()
    graph.add_nodes_from(MODULES)
    for name, path in MODULES.items():
        reached = imports(path)
        if name in LAZY:
            reached |= set(LAZY[name].values())
        graph.add_edges_from((name, target) for target in reached & MODULES.keys() if target != name)
    return graph


def room_of(module: str) -> str:
    """The room a module belongs to."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def test_rooms_are_imported_in_one_direction() -> None:
    against = {
        (name, target)
        for name, target in import_graph().edges
        if room_of(target) not in ROOMS[room_of(name)] | {room_of(name)}
    }
    assert sorted(against) == []


def test_replacement_never_imports_circuits() -> None:
    against = [
        edge for edge in import_graph().edges if [name.split(".")[0] for name in edge] == ["replacement", "circuits"]
    ]
    assert against == []


def test_no_import_cycles() -> None:
    graph = import_graph()
    assert [sorted(cycle) for cycle in nx.strongly_connected_components(graph) if len(cycle) > 1] == []


def test_pure_rooms_reach_no_model() -> None:
    graph = import_graph()
    pure = [name for name in MODULES if name.startswith(PURE_ROOMS)]
    assert len(pure) > 12
    for room in (*pure, *PURE_MODULES):
        for name in {room} | nx.descendants(graph, room):
            foreign = {imported.split(".")[0] for imported in imports(MODULES[name])}
            assert not foreign & MODELS, f"{room} reaches {name}"


def test_the_walker_sees_an_import(tmp_path: Path) -> None:
    """The tests above could pass by seeing nothing."""
    graph = import_graph()
    assert graph.has_edge("circuits.attribution.direct_effects", "circuits.attribution.sources")
    assert graph.has_edge("replacement.command_line", "replacement"), "lazily"
    assert graph.has_edge("replacement", "replacement.loading"), "by name"
    assert graph.has_edge("circuits", "circuits.export"), "through importlib"
    assert "torch" in imports(MODULES["circuits.attribution.direct_effects"])
    file = tmp_path / "a.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom replacement import Wiring\nif TYPE_CHECKING:\n    import numpy\n"
        "def f():\n    class C:\n        from circuits.graph import nodes\n        import json\n"
    )
    assert imports(file) == {"typing", "replacement.crosscoder.wiring", "circuits.graph.nodes", "json"}
    assert imports(file, top_level_only=True) == {"typing", "replacement.crosscoder.wiring"}
    assert room_of("replacement.demo.report") == "replacement"
    assert room_of("replacement.demo.corpus.mixture") == "replacement.demo.corpus"


@pytest.mark.parametrize("package", ["replacement", "circuits"])
def test_a_lazy_name_is_the_function_however_often_it_is_used(package: str) -> None:
    """A submodule of the same name would take its place in the package once it is imported."""
    module = importlib.import_module(package)
    for name in module.__all__:
        first = getattr(module, name)
        assert getattr(module, name) is first
        if name != "checkpoint":  # is a module
            assert not isinstance(first, types.ModuleType)
            assert f"{package}.{name}" not in MODULES, "the module would hide the name"
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


@pytest.mark.parametrize("package", ["replacement", "circuits"])
def test_entry_points_are_light(package: str) -> None:
    """Until the entry point has taken hold of Ctrl-C nothing that takes time is imported; help waits for no model."""
    heavy = {"numpy", "typer", "rich", "networkx", *MODELS}
    script = (
        f"import sys, {package}.__main__; assert not {heavy} & set(sys.modules), 'entry'\n"
        f"import {package}.cli; assert not {MODELS} & set(sys.modules), 'command'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
