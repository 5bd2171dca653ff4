"""Heads of edges as a table: what is listed, what is summed, and what graphs and files make of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from circuits import CircuitGraph
from circuits.graph import edge_heads
from circuits.graph.edge_heads import COLUMNS, LISTED, MOST_LISTED, EdgeHeads


def example() -> EdgeHeads:
    """Three edges and two layers of three heads: one head, none, and several of either sign."""
    heads_ELH = np.zeros((3, 2, 3))
    heads_ELH[0, 1, 2] = 2.0
    heads_ELH[2] = [[0.5, -4.0, 0.001], [3.0, 0.0, -0.5]]
    return EdgeHeads.from_dense(np.array([1.0, -0.25, 0.0]), heads_ELH)


def random_dense(seed: int, *, n_edges: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Direct parts and heads `[E, 3, 4]` of very different sizes, some of them zero."""
    rng = np.random.default_rng(seed)
    heads_ELH = rng.normal(size=(n_edges, 3, 4)) * 10.0 ** rng.integers(-4, 3, size=(n_edges, 3, 4))
    return rng.normal(size=n_edges), np.where(rng.random(heads_ELH.shape) < 0.3, 0.0, heads_ELH)


def test_the_strongest_are_listed_and_the_rest_is_summed() -> None:
    heads = example()
    assert len(heads) == 3
    assert heads.of(0) == [(1, 2, 2.0)]
    assert heads.of(1) == []
    assert heads.of(2) == [(0, 1, -4.0), (1, 0, 3.0), (0, 0, 0.5), (1, 2, -0.5)]  # equal sizes by number
    np.testing.assert_allclose(heads.rest, [0, 0, 0.001], rtol=1e-6)
    assert heads.direct.tolist() == [1.0, -0.25, 0.0]
    np.testing.assert_allclose(heads.totals(), [3.0, -0.25, -0.999], rtol=1e-6)


def test_models_of_many_heads_list_the_strongest_and_sum_the_others() -> None:
    heads_ELH = np.random.default_rng(0).normal(size=(5, 30, 9))
    heads = EdgeHeads.from_dense(np.ones(5), heads_ELH)
    for edge, flat in enumerate(heads_ELH.reshape(5, -1)):
        strongest = flat[np.argsort(-np.abs(flat))[:MOST_LISTED]]
        assert [weight for *_, weight in heads.of(edge)] == pytest.approx(strongest.tolist(), rel=1e-6)
        assert heads.rest[edge] == pytest.approx(flat.sum() - strongest.sum(), rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(heads.totals(), 1 + heads_ELH.sum((1, 2)), rtol=1e-5, atol=1e-5)


def test_blocks_of_edges_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    direct_E, heads_ELH = random_dense(0, n_edges=7)
    at_once = EdgeHeads.from_dense(direct_E, heads_ELH)
    monkeypatch.setattr(edge_heads, "_EDGES_AT_ONCE", 3)
    assert EdgeHeads.from_dense(direct_E, heads_ELH) == at_once
    assert len(EdgeHeads.from_dense(direct_E[:0], heads_ELH[:0])) == 0


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.9, LISTED, 1.0]))
def test_listed_heads_are_the_fewest_that_hold_the_share(seed: int, listed: float) -> None:
    direct_E, heads_ELH = random_dense(seed)
    heads = EdgeHeads.from_dense(direct_E, heads_ELH, listed=listed)
    np.testing.assert_allclose(
        heads.totals(), direct_E + heads_ELH.sum((1, 2)), rtol=0, atol=1e-6 * (1 + np.abs(heads_ELH).sum())
    )
    for edge in range(len(heads)):
        rows = heads.of(edge)
        sizes = [abs(weight) for _, _, weight in rows]
        assert sizes == sorted(sizes, reverse=True)
        for layer, head, weight in rows:
            assert weight == np.float32(heads_ELH[edge, layer, head]) != 0
        assert len({(layer, head) for layer, head, _ in rows}) == len(rows)
        total = np.abs(heads_ELH[edge]).sum()
        assert sum(sizes) >= listed * total * (1 - 1e-6)
        assert not sizes or sum(sizes[:-1]) <= listed * total * (1 + 1e-6)
        left = heads_ELH[edge].sum() - sum(heads_ELH[edge, layer, head] for layer, head, _ in rows)
        assert heads.rest[edge] == pytest.approx(left, abs=1e-6 * total + 1e-12)


@pytest.mark.parametrize(("listed", "count"), [(0.0, 0), (0.5, 1), (0.75, 1), (0.76, 2), (1.0, 2)])
def test_a_share_that_is_met_needs_no_further_head(listed: float, count: int) -> None:
    heads = EdgeHeads.from_dense(np.zeros(1), np.array([[[1.0, -3.0, 0.0]]]), listed=listed)
    assert heads.of(0) == [(0, 1, -3.0), (0, 0, 1.0)][:count]
    assert heads.rest.tolist() == [[-2.0], [1.0], [0.0]][count]


def test_no_edges() -> None:
    heads = EdgeHeads.from_dense(np.zeros(0), np.zeros((0, 2, 3)))
    assert len(heads) == 0
    assert heads.indptr.tolist() == [0]
    assert heads.totals().shape == (0,)


@given(st.integers(0, 10**6))
def test_select_keeps_each_edges_own_heads(seed: int) -> None:
    direct_E, heads_ELH = random_dense(seed)
    kept_E = np.random.default_rng(seed).random(len(direct_E)) < 0.5
    assert EdgeHeads.from_dense(direct_E, heads_ELH).select(kept_E) == EdgeHeads.from_dense(
        direct_E[kept_E], heads_ELH[kept_E]
    )


def test_equality() -> None:
    heads = example()
    assert heads == example()
    assert heads != heads.select(np.array([True, True, False]))
    assert heads != dataclasses.replace(heads, rest=heads.rest + 1)
    assert heads != "heads"


@pytest.mark.parametrize(
    ("edge", "options", "text"),
    [
        (0, {}, "L1H2 67 %, direct 33 %"),
        (1, {}, "−direct 100 %"),
        (2, {}, "−L0H1 50 %, L1H0 37 %"),
        (2, {"least": 0.01}, "−L0H1 50 %, L1H0 37 %, L0H0 6 %"),
        (2, {"least": 0.01, "most": 4}, "−L0H1 50 %, L1H0 37 %, L0H0 6 %, −L1H2 6 %"),
        (2, {"most": 1}, "−L0H1 50 %"),
        (2, {"least": 0.6}, ""),
    ],
)
def test_text(edge: int, options: dict[str, Any], text: str) -> None:
    assert example().text(edge, **options) == text


def test_text_of_an_edge_that_nothing_carries() -> None:
    assert EdgeHeads.from_dense(np.zeros(1), np.zeros((1, 2, 3))).text(0) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direct": np.zeros(3)}, "EdgeHeads.direct: expected float32[3], given float64[3]"),
        ({"rest": np.zeros(2, np.float32)}, "EdgeHeads.rest: expected float32[3], given float32[2]"),
        ({"indptr": np.zeros(3, np.int64)}, "EdgeHeads.indptr: expected int64[4], given int64[3]"),
        ({"layer": np.zeros((5, 1), np.int16)}, "EdgeHeads.layer: expected int16[5], given int16[5, 1]"),
        ({"head": np.zeros(4, np.int16)}, "EdgeHeads.head: expected int16[5], given int16[4]"),
        (
            {"weight": np.array([1, 2, np.nan, 4, 5], np.float32)},
            "EdgeHeads.weight: expected finite numbers, given NaN or infinity",
        ),
        (
            {"direct": np.array([1, np.inf, 0], np.float32)},
            "EdgeHeads.direct: expected finite numbers, given NaN or infinity",
        ),
        ({"indptr": np.array([1, 1, 1, 5])}, "EdgeHeads.indptr: expected to rise from 0 to the 5 heads"),
        ({"indptr": np.array([0, 1, 1, 4])}, "EdgeHeads.indptr: expected to rise from 0 to the 5 heads"),
        ({"indptr": np.array([0, 3, 1, 5])}, "EdgeHeads.indptr: expected to rise from 0 to the 5 heads"),
    ],
)
def test_mistakes_are_named(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(example(), **changes)


def carried(graph: CircuitGraph, *, seed: int = 0) -> CircuitGraph:
    """A graph with random heads that sum to its edges."""
    heads_ELH = np.random.default_rng(seed).normal(size=(len(graph.edges), 3, 4))
    direct_E = graph.edges.weight - heads_ELH.sum((1, 2))
    return dataclasses.replace(graph, heads=EdgeHeads.from_dense(direct_E, heads_ELH))


def test_a_graph_is_another_one_with_heads(small: CircuitGraph) -> None:
    graph = carried(small)
    assert graph.heads is not None
    np.testing.assert_allclose(graph.heads.totals(), graph.edges.weight, rtol=0, atol=1e-5)
    assert graph != small
    assert graph != carried(small, seed=1)
    assert graph == carried(small)
    assert dataclasses.replace(graph, heads=None) == small


def test_heads_must_fit_the_edges(small: CircuitGraph) -> None:
    heads = carried(small).heads
    assert heads is not None
    with pytest.raises(ValueError, match=r"CircuitGraph\.heads: expected heads of 8 edges, given 7"):
        dataclasses.replace(small, heads=heads.select(np.arange(8) > 0))
    for column in ("direct", "rest"):
        wrong = getattr(heads, column).copy()
        wrong[3] += 7
        message = f"parts that sum to the edge's {small.edges.weight[3]:.6g}, given {small.edges.weight[3] + 7:.6g} for edge 3"
        with pytest.raises(ValueError, match=re.escape(f"CircuitGraph.heads: expected {message}")):
            dataclasses.replace(small, heads=dataclasses.replace(heads, **{column: wrong}))
    with pytest.raises(
        ValueError, match=r"CircuitGraph\.heads: expected parts that sum to the edge's 1, given .* for edge 0"
    ):
        dataclasses.replace(small, heads=dataclasses.replace(heads, weight=2 * heads.weight))


@given(st.data(), st.floats(0, 1), st.floats(0, 1))
def test_pruned_edges_keep_their_heads(draw_circuit: Any, data: st.DataObject, nodes: float, edges: float) -> None:
    graph = carried(draw_circuit(data))
    assert graph.heads is not None
    pruned = graph.prune(nodes=nodes, edges=edges)
    assert pruned.heads is not None
    assert len(pruned.heads) == len(pruned.edges)
    place = {pair: edge for edge, pair in enumerate(_ends(graph))}
    for edge, pair in enumerate(_ends(pruned)):
        assert pruned.heads.of(edge) == graph.heads.of(place[pair])
        assert pruned.heads.direct[edge] == graph.heads.direct[place[pair]]
        assert pruned.heads.rest[edge] == graph.heads.rest[place[pair]]


def _ends(graph: CircuitGraph) -> list[tuple[str, str]]:
    ids = graph.nodes.ids()
    return [(ids[t], ids[s]) for t, s in zip(graph.edges.target, graph.edges.source, strict=True)]


def test_heads_come_back_from_a_file(small: CircuitGraph, tmp_path: Path) -> None:
    graph = carried(small)
    path = graph.save(tmp_path / "graph.safetensors")
    loaded = CircuitGraph.load(path)
    assert loaded == graph
    assert loaded.heads == graph.heads
    with safe_open(path, framework="numpy") as file:
        assert {f"heads.{name}" for name in COLUMNS} <= set(file.keys())
