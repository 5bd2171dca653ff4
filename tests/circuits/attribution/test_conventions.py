"""`circuits.trace(conventions=)`: what is left out, what stays the same, and where the rest goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny

from circuits import CircuitGraph, FeatureTarget, NodeKind, trace
from circuits.cli import main
from replacement import ReplacementModel, Wiring


@pytest.fixture(scope="module")
def model(language_model: Any) -> ReplacementModel:
    """Learned positions, skip connections, and features at every position, the first included."""
    lm = language_model("gpt2")
    return ReplacementModel(lm, tiny.crosscoder_for(lm, wiring=Wiring.strictly_causal(lm), skip=True))


def edge_weights(graph: CircuitGraph) -> dict[tuple[str, str], float]:
    """Weight by target and source."""
    names = graph.nodes.ids()
    ends = zip(graph.edges.target.tolist(), graph.edges.source.tolist(), graph.edges.weight.tolist(), strict=True)
    return {(names[target], names[source]): weight for target, source, weight in ends}


def left_out(graph: CircuitGraph) -> np.ndarray:
    """bool[N], the nodes of an exact graph that circuit-tracer's have not."""
    nodes = graph.nodes
    first = nodes.mask(NodeKind.ERROR, NodeKind.FEATURE) & (nodes.position == 0)
    return (first | nodes.mask(NodeKind.POSITION) | nodes.unexpanded) & ~nodes.is_target


@pytest.mark.parametrize("limits", [{"coverage": 1.0}, {"coverage": 1.0, "max_nodes": 20}], ids=["all", "20 features"])
def test_edges_are_those_of_the_exact_graph_without_the_nodes_left_out(
    model: ReplacementModel, to_shares: Any, limits: dict[str, Any]
) -> None:
    exact = trace(model, tiny.random_tokens(), **limits)
    graph = trace(model, tiny.random_tokens(), conventions="circuit-tracer", **limits)
    out, names = left_out(exact), np.array(exact.nodes.ids())
    gone = set(names[out])
    assert gone.isdisjoint(graph.nodes.ids())
    expected = {ends: weight for ends, weight in edge_weights(exact).items() if gone.isdisjoint(ends)}
    assert edge_weights(graph) == expected
    assert graph.metadata["conventions"] == "circuit-tracer"
    assert graph.identity_error == exact.identity_error, "the sums are checked before anything is left out"
    # What reaches the nodes left out, from a dense matrix in which they have no causes.
    shares = np.where(out[:, None], 0, to_shares(exact))
    influence = exact.nodes.output_weight @ (np.linalg.inv(np.eye(len(shares)) - shares) - np.eye(len(shares)))
    assert graph.metadata["left_out_share"] == pytest.approx(influence[out].sum(), rel=1e-5)
    assert 0.01 < graph.metadata["left_out_share"] < 0.99


def test_the_bias_takes_what_is_left_out_and_rows_are_divided_by_the_rest(model: ReplacementModel) -> None:
    graph = trace(model, tiny.random_tokens(), coverage=1.0, conventions="circuit-tracer")
    nodes, edges = graph.nodes, graph.edges
    sums = np.bincount(edges.target, weights=edges.weight, minlength=len(nodes)) + nodes.bias
    scale = nodes.inflow + np.abs(nodes.bias)
    assert (np.abs(sums - nodes.value) <= 1e-4 * scale).all()
    np.testing.assert_allclose(nodes.inflow, edges.magnitudes, rtol=1e-6)
    assert not nodes.mask(NodeKind.POSITION).any()
    assert nodes.position[nodes.mask(NodeKind.FEATURE, NodeKind.ERROR)].min() > 0


def test_edges_that_were_dropped_stay_lost(model: ReplacementModel) -> None:
    """What fell below `drop_below` is no source that was left out: it counts as error, as in an exact graph."""
    options = {"coverage": 1.0, "conventions": "circuit-tracer"}
    full = trace(model, tiny.random_tokens(), **options)
    dropped = trace(model, tiny.random_tokens(), drop_below=0.01, **options)
    assert len(dropped.edges) < len(full.edges)
    assert dropped.scores().replacement < full.scores().replacement


def test_a_target_at_the_first_position_stays(model: ReplacementModel) -> None:
    features = model.localize(tiny.random_tokens()).features
    at_first = np.flatnonzero((features.row == 0).numpy() & (features.group == 2).numpy())[0]
    target = FeatureTarget(2, int(features.index[at_first]), 0)
    graph = trace(model, tiny.random_tokens(), targets=target, coverage=1.0, conventions="circuit-tracer")
    assert graph.counts() | {"edges": 0} == {
        "total": 11, "features": 1, "errors": 0, "tokens": 10, "positions": 0, "logits": 0, "edges": 0,
    }  # fmt: skip


def test_exact_is_the_default_and_says_nothing(model: ReplacementModel) -> None:
    graph = trace(model, tiny.random_tokens(), max_nodes=5)
    named = trace(model, tiny.random_tokens(), max_nodes=5, conventions="exact")
    assert not {"conventions", "left_out_share"} & set(graph.metadata)
    assert (graph.nodes, graph.edges) == (named.nodes, named.edges)


@pytest.mark.parametrize("name", ["circuit_tracer", ""])
def test_unknown_conventions_are_refused(model: ReplacementModel, name: str) -> None:
    with pytest.raises(ValueError, match=r"^conventions: expected exact or circuit-tracer, given "):
        trace(model, tiny.random_tokens(), conventions=name)


def test_the_command_refuses_unknown_conventions(capsys: Any) -> None:
    assert main(["trace", "a prompt", "--conventions", "neuronpedia"]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: conventions: expected exact or circuit-tracer, given 'neuronpedia'"
    )
