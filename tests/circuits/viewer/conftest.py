"""Small circuits with known answers as pages in a browser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from graph_index import write_index
from viewer_page import VIEW, ViewerPage

from circuits import CircuitGraph, NodeKind
from circuits.graph.edge_heads import EdgeHeads
from circuits.viewer.page import to_html
from replacement import FeatureIndex

if TYPE_CHECKING:
    from playwright.sync_api import Page

T, P, E, F, L = NodeKind
TOKENS = (" the", " capital", " of", " Dallas", " is")
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "\"quotes\" 'single' `ticks` ${1+1} \\",
    "</script><script>alert(2)</script>",
    "שלום עולם \u202eevil\u202c",
    "👩‍👩‍👧 🇫🇷 emoji",
    "line\u2028separator\u2029",
    "<!--<script>{{ payload }}&lt;b&gt;",
    "__proto__",
)
"""Names that a careless page would run, lose or turn around."""


@pytest.fixture(scope="session")
def capital(build_graph: Callable[..., CircuitGraph]) -> CircuitGraph:
    """The capital of a state in 18 nodes: every kind of node, both parts, heads on every edge and one attention score's pairs.

    The way of `Dallas` is E_13_3, 0_11_3, 1_5_3, A2_3_4, 3_21_4, 5_1_4.
    """
    rows: list[dict[str, Any]] = [
        {"kind": T, "index": 10 + place, "position": place, "label": token} for place, token in enumerate(TOKENS)
    ]
    rows += [
        {"kind": P, "position": 4},
        {"kind": E, "layer": 0, "position": 3},
        {"kind": E, "layer": 2, "position": 4},
        {"kind": E, "part": 1, "layer": 2, "position": 4},
        _feature(0, 7, 1, "capital", 2.0),
        _feature(0, 11, 3, "Dallas", 3.5),
        _feature(1, 5, 3, "Texas", 2.5),
        _feature(1, 6, 3, "", 0.5, expanded=False),
        _feature(2, 9, 4, "say a capital", 1.7),
        _feature(3, 21, 4, "say Austin", 2.8),
        _feature(2, 3, 4, "moves the state", 1.5, part=1),
        _logit(1, " Austin", 0.7, 0.75),
        _logit(2, " Houston", 0.2, 0.25),
    ]
    edges = [
        (9, 1, 2.0), (10, 3, 3.0), (10, 6, 0.5), (11, 10, 2.0), (11, 3, 0.5), (11, 6, -0.4), (13, 9, 1.2), (13, 8, 0.2),
        (13, 5, 0.1), (13, 4, 0.3), (14, 15, 2.0), (14, 13, 1.0), (14, 7, -0.3), (15, 11, 1.5), (15, 12, 0.5),
        (15, 4, -0.25), (16, 14, 3.0), (16, 13, 0.7), (16, 7, 0.2), (17, 14, -1.0), (17, 11, 0.8), (17, 15, 0.5),
    ]  # fmt: skip
    graph = build_graph(rows, edges, n_layers=4, extra_inflow={14: 0.3}, crosscoder_fingerprint="2:toy")
    heads = np.zeros((len(graph.edges), 4, 3))
    heads[:, 1, 2], heads[:, 0, 1] = 0.4 * graph.edges.weight, -0.2 * graph.edges.weight
    graph = dataclasses.replace(graph, heads=EdgeHeads.from_dense(0.8 * graph.edges.weight, heads))
    pairs = {
        "pair_wise_contributors": [["E_14_4", "1_5_3", 0.6], ["0_7_1", "1_5_3", -0.2]],
        "top_q_marginal_contributors": [["E_14_4", 0.5]],
        "top_k_marginal_contributors": [["1_5_3", 0.4]],
    }
    return graph.with_qk_results({"A2_3_4": pairs})


def _feature(layer: int, index: int, position: int, label: str, activation: float, **facts: Any) -> dict[str, Any]:
    place = {"kind": F, "layer": layer, "index": index, "position": position, "label": label}
    return {**place, "activation": activation, "expanded": True, **facts}


def _logit(index: int, label: str, probability: float, weight: float) -> dict[str, Any]:
    facts = {"kind": L, "layer": 4, "position": 4, "index": index, "label": label, "expanded": True}
    return {**facts, "probability": probability, "output_weight": weight}


@pytest.fixture(scope="session")
def hostile(build_graph: Callable[..., CircuitGraph]) -> CircuitGraph:
    """A chain token, feature, output at every one of the names in `HOSTILE`, all into the last outputs."""
    count = len(HOSTILE)
    rows: list[dict[str, Any]] = [
        {"kind": T, "index": place, "position": place, "label": text} for place, text in enumerate(HOSTILE)
    ]
    rows += [_feature(0, place, place, text, 1.0) for place, text in enumerate(HOSTILE)]
    rows += [
        {**_logit(place, text, 1 / count, 1 / count), "layer": 1, "position": count - 1}
        for place, text in enumerate(HOSTILE)
    ]
    edges = [(count + place, place, 1.0) for place in range(count)]
    edges += [(2 * count + to, count + place, 1.0 + place - 2 * to) for place in range(count) for to in range(count)]
    edges = [edge for edge in edges if edge[2]]
    labels = {
        f"0/{place}": {"source": "rule", "f1": 0.9, "precision": 0.9, "recall": 0.9, "text": text}
        for place, text in enumerate(HOSTILE)
    }
    return build_graph(rows, edges, n_layers=1, model=HOSTILE[0], feature_labels=labels, crosscoder_fingerprint="2:toy")


@pytest.fixture(scope="session")
def names() -> tuple[str, ...]:
    """`HOSTILE`."""
    return HOSTILE


@pytest.fixture(scope="session")
def index_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FeatureIndex]:
    """`index_of(graph, vocabulary)`: an open index of all its MLP features."""

    def make(graph: CircuitGraph, vocabulary: tuple[str, ...] = (*TOKENS, " Austin", " Houston", "\n")) -> FeatureIndex:
        return FeatureIndex.open(write_index(tmp_path_factory.mktemp("index") / "features.sqlite", graph, vocabulary))

    return make


@pytest.fixture
def show(visit: Callable[..., Page], tmp_path: Path) -> Callable[..., ViewerPage]:
    """`show(graph, index=..., hash=...)`: the graph's page in the browser; `index=()` for none."""

    def show(graph: CircuitGraph, *, index: Any = (), hash: str = "", **options: Any) -> ViewerPage:
        path = tmp_path / "circuit.html"
        path.write_text(to_html(graph, index=index), encoding="utf-8")
        return ViewerPage(visit(path.as_uri() + hash, viewport=VIEW, **options))

    return show
