"""Hand-built circuits, and a hypothesis strategy for random ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind, NodeTable
from circuits.graph.edges import Edges

T, P, E, F, L = NodeKind

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def assemble(
    rows: list[dict[str, Any]],
    edges: list[tuple[int, int, float]],
    *,
    extra_inflow: dict[int, float] | None = None,
    **facts: Any,
) -> CircuitGraph:
    """A graph from node rows and (target, source, weight) triples; inflow, value and bias are made to fit."""
    n_nodes = len(rows)
    columns = {name: np.array([row.get(name, default) for row in rows]) for name, default in _DEFAULTS.items()}
    matrix = np.zeros((n_nodes, n_nodes), dtype=np.float32)
    for target, source, weight in edges:
        matrix[target, source] = weight
    inflow = np.abs(matrix.astype(np.float64)).sum(axis=1)
    for row, amount in (extra_inflow or {}).items():
        inflow[row] += amount
    bias = np.where(columns["expanded"], 0.25, 0.0)
    table = NodeTable.build(
        **columns,
        inflow=inflow,
        bias=bias,
        value=np.where(columns["expanded"], matrix.sum(axis=1) + bias, 0.0),
        label=[row.get("label", "") for row in rows],
    )
    target, source = np.nonzero(matrix)
    n_tokens = int(columns["position"].max()) + 1
    tokens = [row.get("label") or "tok" for row in rows if row["kind"] == T] or ["tok"] * n_tokens
    tokens += ["tok"] * (n_tokens - len(tokens))
    metadata = {"prompt": "".join(tokens), "tokens": tokens, "n_layers": 3, "identity_error": 1e-6, **facts}
    return CircuitGraph(table, Edges.from_coo(target, source, matrix[target, source], n_nodes=n_nodes), metadata)


_DEFAULTS: dict[str, Any] = {
    "kind": 0,
    "part": 0,
    "layer": -1,
    "position": 0,
    "index": -1,
    "activation": 0.0,
    "probability": 0.0,
    "output_weight": 0.0,
    "expanded": False,
}


def dense(graph: CircuitGraph) -> np.ndarray:
    """float64[N, N], A[target, source] of a graph, built edge by edge."""
    matrix = np.zeros((len(graph.nodes), len(graph.nodes)))
    for target in range(len(graph.nodes)):
        for number in range(graph.edges.indptr[target], graph.edges.indptr[target + 1]):
            matrix[target, graph.edges.source[number]] = graph.edges.weight[number]
    return matrix


def dense_shares(graph: CircuitGraph) -> np.ndarray:
    """float64[N, N], |A| divided by each row's full inflow."""
    size = np.abs(dense(graph))
    inflow = np.maximum(graph.nodes.inflow, size.sum(axis=1))[:, None]
    return np.divide(size, inflow, out=np.zeros_like(size), where=inflow > 0)


@pytest.fixture
def small() -> CircuitGraph:
    """Two tokens, a learned position, an error, an unexpanded and an expanded feature and two logits; every number
    is known.

    0 "a"   1 "b"   2 position 1   3 error (0, 1)   4 feature 0/7 (unexpanded)   5 feature 1/3   6 " x" p=0.6   7 "
    y" p=0.2
    """
    rows = [
        {"kind": T, "index": 11, "position": 0, "label": "a"},
        {"kind": T, "index": 12, "position": 1, "label": "b"},
        {"kind": P, "position": 1},
        {"kind": E, "layer": 0, "position": 1},
        {"kind": F, "layer": 0, "position": 0, "index": 7, "activation": 2.0, "label": "first"},
        {"kind": F, "layer": 1, "position": 1, "index": 3, "activation": 1.0, "label": "second", "expanded": True},
        {
            "kind": L, "layer": 3, "position": 1, "index": 5, "label": " x",
            "probability": 0.6, "output_weight": 0.75, "expanded": True,
        },
        {
            "kind": L, "layer": 3, "position": 1, "index": 6, "label": " y",
            "probability": 0.2, "output_weight": 0.25, "expanded": True,
        },
    ]  # fmt: skip
    edges = [(5, 0, 1.0), (5, 4, 2.0), (5, 3, -1.0), (6, 5, 3.0), (6, 1, -1.0), (7, 5, -1.0), (7, 2, 0.5), (7, 3, 0.5)]
    facts = {
        "token_ids": [11, 12],
        "model": "toy",
        "targets": [{"token": " x", "probability": 0.6}, {"token": " y", "probability": 0.2}],
        "coverage": 0.99,
        "stopped_by": "coverage",
        "unexpanded_share": 0.0,
        "seconds": 0.1,
    }
    return assemble(rows, edges, **facts)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[tuple[int, int, float]], dict[str, Any]]:
    """What `assemble` needs for a random layered circuit.

    Drawn are every kind of node, lost mass, unexpanded features, rows without edges and feature targets.
    """
    n_tokens, n_layers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    seed = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.1, 0.5, 1.0]))
    rows: list[dict[str, Any]] = [{"kind": T, "position": i, "index": int(seed.integers(50))} for i in range(n_tokens)]
    if draw(st.booleans()):
        rows += [{"kind": P, "position": i} for i in range(n_tokens)]
    places = [(layer, position) for layer in range(n_layers) for position in range(n_tokens)]
    rows += [{"kind": E, "layer": layer, "position": i} for layer, i in places if seed.random() < 0.7]
    for layer, i in places:
        for index in sorted(seed.choice(9, size=seed.integers(0, 4), replace=False).tolist()):
            expanded = bool(seed.random() < 0.8)
            rows.append(
                {"kind": F, "layer": layer, "position": i, "index": index, "activation": 1.0, "expanded": expanded}
            )
    n_logits = draw(st.integers(1, 3))
    rows += [
        {"kind": L, "layer": n_layers, "position": n_tokens - 1, "index": index, "probability": 0.3, "expanded": True}
        for index in range(n_logits)
    ]
    targets = [i for i, row in enumerate(rows) if row["kind"] == L or (row["kind"] == F and seed.random() < 0.05)]
    for row, weight in zip(targets, seed.dirichlet(np.ones(len(targets))), strict=True):
        rows[row]["output_weight"] = float(weight)
    edges = [
        (t, s, float(seed.normal()))
        for t, target in enumerate(rows)
        for s, source in enumerate(rows)
        if target.get("expanded")
        and source.get("layer", -1) < target["layer"]
        and source["position"] <= target["position"]
        and seed.random() < density
    ]
    lost = {t: float(seed.exponential()) for t, row in enumerate(rows) if row.get("expanded") and seed.random() < 0.3}
    return rows, edges, {"extra_inflow": lost, "n_layers": n_layers}


@pytest.fixture(scope="session")
def draw_circuit() -> Callable[[st.DataObject], CircuitGraph]:
    """Draws a random circuit from `st.data()`.

    It is built outside of the strategy, which must not see type checkers.
    """

    def draw(data: st.DataObject) -> CircuitGraph:
        rows, edges, facts = data.draw(recipes())
        return assemble(rows, edges, **facts)

    return draw


@pytest.fixture(scope="session")
def build_graph() -> Callable[..., CircuitGraph]:
    """`assemble`."""
    return assemble


@pytest.fixture(scope="session")
def to_dense() -> Callable[[CircuitGraph], np.ndarray]:
    """`dense`."""
    return dense


@pytest.fixture(scope="session")
def to_shares() -> Callable[[CircuitGraph], np.ndarray]:
    """`dense_shares`."""
    return dense_shares
