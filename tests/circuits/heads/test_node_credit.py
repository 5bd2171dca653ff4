"""Credit of the nodes that feed a feature: what each rule's parts sum to, and the activation they divide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from circuits import NodeKind, trace
from circuits.heads.node_credit import source_credit
from replacement import JointTopK, JumpReLU, ReLU, ReplacementModel, TopK

ACTIVATIONS = {
    "relu": ReLU(),
    "jumprelu": JumpReLU(threshold=0.2),
    "topk": TopK(5),
    "any sign": TopK(20, relu=False),
    "joint": JointTopK(15),
}


@pytest.fixture(params=ACTIVATIONS)
def traced(request: Any, language_model: Any) -> tuple[ReplacementModel, Any]:
    lm = language_model("llama", torch.float64)
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, n_features=24, activation=ACTIVATIONS[request.param]))
    return model, trace(model, tiny.random_tokens(7), coverage=1.0)


def test_parts_sum_to_what_the_rule_keeps(traced: tuple[ReplacementModel, Any]) -> None:
    model, graph = traced
    nodes = graph.nodes
    chosen = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & nodes.expanded)[::9]
    assert len(chosen) > 3
    for node in chosen.tolist():
        path = source_credit(model, graph, node, rule="path")
        h, b, theta = float(nodes.value[node]), float(nodes.bias[node]), path.threshold
        assert h > theta, "an active feature"
        assert nodes.activation[node] == pytest.approx(h, rel=1e-6)
        baseline = b if b > theta else 0.0
        assert path.contributions.sum() + b == pytest.approx(h, rel=1e-9)
        assert path.contributions[-1] == pytest.approx(0.0, abs=1e-6 * nodes.inflow[node])
        assert path.credit.credit_J.sum() == pytest.approx(h - baseline, rel=1e-6)
        gate = source_credit(model, graph, graph.nodes.ids()[node], rule="gate")
        name = f"{nodes.layer[node]}/{nodes.index[node]}@{nodes.position[node] - 7}"
        by_name = source_credit(model, graph, name)
        assert (by_name.node, by_name.credit.rule) == (node, "ablation")
        np.testing.assert_allclose(gate.credit.credit_J, gate.contributions)
        assert list(path.sources) == list(graph.edges.source[graph.edges.into(np.array([node]))])


def test_removed_edges_are_one_more_player(traced: tuple[ReplacementModel, Any]) -> None:
    model, graph = traced
    pruned = graph.prune(nodes=0.9, edges=0.9)
    nodes = pruned.nodes
    chosen = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & nodes.expanded & (np.diff(pruned.edges.indptr) > 0))
    found = source_credit(model, pruned, int(chosen[0]), rule="ablation")
    assert len(found.contributions) == len(found.sources) + 1
    assert abs(found.contributions[-1]) > 0
    assert found.contributions.sum() + nodes.bias[chosen[0]] == pytest.approx(nodes.value[chosen[0]], rel=1e-9)


def test_mistakes(traced: tuple[ReplacementModel, Any]) -> None:
    model, graph = traced
    with pytest.raises(ValueError, match="the graph has no node 'Z_1'"):
        source_credit(model, graph, "Z_1")
    with pytest.raises(ValueError, match=r"node: expected a number in 0\.\.\d+, given 100000"):
        source_credit(model, graph, 100000)
    for node, message in (
        (-1, r"node: expected a number in 0\.\.\d+, given -1"),
        ("2/3/4", "expected the name of a feature such as 2/345@7"),
        ("9/9@6", "the graph has no feature 9/9@6"),
        ("1/9@7", "the graph has no feature 1/9@7"),
        ("x" * 9999, "the graph has no node 'xxx.{0,70}…'$"),
    ):
        with pytest.raises(ValueError, match=message):
            source_credit(model, graph, node)
    with pytest.raises(ValueError, match="expected an expanded feature, given E_"):
        source_credit(model, graph, 0)
    feature = int(np.flatnonzero(graph.nodes.mask(NodeKind.FEATURE) & graph.nodes.expanded)[0])
    with pytest.raises(ValueError, match="rule"):
        source_credit(model, graph, feature, rule="magic")
