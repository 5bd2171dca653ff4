"""The house: one direction of dependency, no cycles, and pure rooms that know nothing of models."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
PURE = [
    *(
        f"circuits.{room}.{path.stem}"
        for room in ("graph", "export")
        for path in (ROOT / "circuits" / room).glob("[!_]*.py")
    ),
    *(f"circuits.heads.{name}" for name in ("credit", "qk_attribution")),
]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of both packages."""
    found = {}
    for package in ("replacement", "circuits"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    """Modules a file imports, lazy ones too unless top level only.

    `from a import b` counts as `a.b` where that is a module of ours, else as `a`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    hidden = {id(child) for node in checked for child in ast.walk(node)}
    if top_level_only:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        hidden |= {id(child) for node in functions for child in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= full & MODULES.keys() or {node.module}
    return names


MODULES = modules()


def import_graph() -> nx.DiGraph:
    """An edge for every top-level import between our own modules."""
    known = MODULES
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        targets = imports(path, top_level_only=True) & set(known)
        graph.add_edges_from((name, target) for target in targets if target != name)
    return graph


def test_replacement_never_imports_circuits() -> None:
    for name, path in MODULES.items():
        if name.startswith("replacement"):
            reached = {one for one in imports(path, top_level_only=False) if one.split(".")[0] == "circuits"}
            assert not reached, f"{name} imports {reached}"


def test_no_import_cycles() -> None:
    assert list(nx.simple_cycles(import_graph())) == []


def test_pure_rooms_reach_no_model() -> None:
    graph = import_graph()
    known = MODULES
    for room in PURE:
        for name in {room} | nx.descendants(graph, room):
            foreign = {one.split(".")[0] for one in imports(known[name], top_level_only=False)}
            assert not foreign & {"torch", "transformer_lens", "transformers"}, f"{room} reaches {name}"


def test_the_walker_sees_an_import() -> None:
    """The tests above could pass by seeing nothing."""
    graph = import_graph()
    assert graph.has_edge("circuits.attribution.transport", "circuits.attribution.sources")
    assert graph.has_edge("circuits.attribution.sources", "replacement")
    assert "torch" in imports(MODULES["circuits.attribution.transport"], top_level_only=True)


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
def test_help_waits_for_no_model(package: str) -> None:
    script = f"import sys, {package}.cli; assert not {{'torch', 'transformer_lens'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
