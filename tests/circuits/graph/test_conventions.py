"""Pruning and scores under circuit-tracer's conventions, against dense matrices and the published description alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind

T, P, E, F, L = NodeKind
CONVENTIONS = {"conventions": "circuit-tracer"}


def random_graph(build_graph: Any, seed: int) -> CircuitGraph:
    """A graph as circuit-tracer has them: every feature has causes, nothing is lost, and there are no learned positions."""
    random = np.random.default_rng(seed)
    n_tokens, n_layers, density = random.integers(1, 5), random.integers(1, 5), random.choice([0.2, 0.6, 1.0])
    places = [(layer, position) for layer in range(n_layers) for position in range(n_tokens)]
    rows: list[dict[str, Any]] = [{"kind": T, "position": position, "index": 7} for position in range(n_tokens)]
    rows += [{"kind": E, "layer": layer, "position": position} for layer, position in places]
    for layer, position in places:
        for index in range(random.integers(0, 4)):
            row = {"kind": F, "layer": layer, "position": position, "index": index, "activation": 1.0, "expanded": True}
            rows.append(row)
    shares = random.dirichlet(np.ones(random.integers(1, 4)))
    rows += [
        {"kind": L, "layer": n_layers, "position": n_tokens - 1, "index": i, "expanded": True, "output_weight": share}
        for i, share in enumerate(shares.tolist())
    ]
    edges = [
        (t, s, float(random.normal()))
        for t, target in enumerate(rows)
        for s, source in enumerate(rows)
        if target.get("expanded")
        and source.get("layer", -1) < target["layer"]
        and source["position"] <= target["position"]
        and (s == target["position"] or random.random() < density)  # a node's own token always causes it
    ]
    return build_graph(rows, edges, n_layers=int(n_layers), **CONVENTIONS)


def normalised(size: np.ndarray) -> np.ndarray:
    """Magnitudes divided by the sum of their row."""
    total = size.sum(1, keepdims=True)
    return np.divide(size, total, out=np.zeros_like(size), where=total > 0)


def influence_of(share: np.ndarray, output: np.ndarray) -> np.ndarray:
    """`output (M + M^2 + ...)`."""
    return output @ (np.linalg.inv(np.eye(len(share)) - share) - np.eye(len(share)))


def largest(values: np.ndarray, share: float) -> np.ndarray:
    """Mask of the largest values up to the one at which their running sum reaches a share of the total."""
    order = np.argsort(-values, kind="stable")
    running = np.cumsum(values[order])
    mask = np.zeros(len(values), dtype=bool)
    mask[order[: np.searchsorted(running, share * running[-1]) + 1]] = True
    return mask


def pruned(graph: CircuitGraph, weight: np.ndarray, nodes: float, edges: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of nodes [N] and edges [N, N]: all nodes ranked, tokens and logits kept, rows divided by what is left of them."""
    kind, output = graph.nodes.kind, graph.nodes.output_weight
    always, size = np.isin(kind, (T, L)), np.abs(weight)
    kept = largest(influence_of(normalised(size), output), nodes) | always
    share = normalised(size * np.outer(kept, kept))
    score = share * (influence_of(share, output) + output)[:, None]
    chosen = largest(score.ravel(), edges).reshape(score.shape) & (score > 0)
    while True:
        chosen &= np.outer(kept, kept)
        left = kept & (always | chosen.any(0)) & ((kind != F) | chosen.any(1))
        if (left == kept).all():
            return kept, chosen
        kept = left


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_pruning_follows_the_published_description(build_graph, to_dense, seed, nodes, edges) -> None:
    graph = random_graph(build_graph, seed)
    weight = to_dense(graph)
    kept_nodes, kept_edges = pruned(graph, weight, nodes, edges)
    circuit = graph.prune(nodes=nodes, edges=edges)
    ids = np.array(graph.nodes.ids())
    assert circuit.nodes.ids() == tuple(ids[kept_nodes])
    target, source = np.nonzero(kept_edges)
    names = circuit.nodes.ids()
    found = {(names[t], names[s]) for t, s in zip(circuit.edges.target, circuit.edges.source, strict=True)}
    assert found == set(zip(ids[target], ids[source], strict=True))


@given(st.integers(0, 2**32 - 1))
def test_scores_follow_the_published_description(build_graph, to_dense, seed) -> None:
    graph = random_graph(build_graph, seed)
    share, output, kind = normalised(np.abs(to_dense(graph))), graph.nodes.output_weight, graph.nodes.kind
    influence = influence_of(share, output)
    tokens, errors = influence[kind == T].sum(), influence[kind == E].sum()
    through = influence + output
    scores = graph.scores()
    assert scores.replacement == pytest.approx(tokens / (tokens + errors), abs=1e-9)
    complete = ((1 - share[:, kind == E].sum(1)) * through).sum() / through.sum()
    assert scores.completeness == pytest.approx(complete, abs=1e-9)


def test_tokens_count_towards_the_share_that_is_kept(build_graph, tmp_path) -> None:
    rows = [
        {"kind": T, "index": 1},
        {"kind": F, "layer": 0, "index": 1, "expanded": True},
        {"kind": F, "layer": 0, "index": 2, "expanded": True},
        {"kind": L, "layer": 2, "index": 1, "expanded": True, "output_weight": 1.0},
    ]
    edges = [(1, 0, 1.0), (2, 0, 1.0), (3, 1, 7.0), (3, 2, 3.0)]
    exact = build_graph(rows, edges)
    # The token holds 1, the features 0.7 and 0.3: 80 % of 2 is reached by the first two, 80 % of 1 by both features.
    assert exact.prune(nodes=0.8).counts()["features"] == 2
    graph = build_graph(rows, edges, **CONVENTIONS)
    assert graph.prune(nodes=0.8).counts()["features"] == 1
    loaded = CircuitGraph.load(graph.save(tmp_path / "graph.safetensors"))
    assert loaded.prune(nodes=0.8) == graph.prune(nodes=0.8), "the conventions travel with the file"
    assert loaded.prune(nodes=0.8).metadata["conventions"] == "circuit-tracer"


@pytest.mark.parametrize("given_name", ["neuronpedia", 3])
def test_unknown_conventions_are_refused(build_graph, given_name) -> None:
    graph = build_graph([{"kind": L, "layer": 1, "index": 1, "expanded": True, "output_weight": 1.0}], [])
    with pytest.raises(ValueError, match="expected conventions to be exact or circuit-tracer, given"):
        dataclasses.replace(graph, metadata={**graph.metadata, "conventions": given_name})
