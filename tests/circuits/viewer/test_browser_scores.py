"""The scores that the page computes are Python's, of the graph and of any part that is pinned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from random_circuit import random_circuit
from viewer_page import ViewerPage

from circuits import CircuitGraph, NodeKind

SCORES = """(ids) => {
  crosstrace.store.load({version: 1, pinned: ids});
  return ["pinned", "graph"].map((name) => {
    const {replacement, completeness} = document.getElementById(`scores-${name}`).dataset;
    return [Number(replacement), Number(completeness)];
  });
}"""


def part(graph: CircuitGraph, pinned: np.ndarray) -> CircuitGraph:
    """The pinned nodes, all tokens and targets, and the edges among them."""
    nodes = pinned | graph.nodes.mask(NodeKind.TOKEN, NodeKind.LOGIT) | graph.nodes.is_target
    return graph.select(nodes, nodes[graph.edges.source] & nodes[graph.edges.target])


def check(viewer: ViewerPage, graph: CircuitGraph, pinned: np.ndarray) -> None:
    ids = np.array(graph.nodes.ids(), dtype=object)[pinned].tolist()
    of_part, of_graph = viewer.page.evaluate(SCORES, ids)
    for shown, scored in ((of_part, part(graph, pinned)), (of_graph, graph)):
        expected = scored.scores()
        assert shown == pytest.approx([expected.replacement, expected.completeness], rel=0, abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "pruned", "thinned"])
def test_scores_of_pinned_parts_of_random_graphs(show: Callable[..., ViewerPage], kind: str) -> None:
    graph = random_circuit(300, 4000, n_tokens=12)
    graph = {"full": graph, "pruned": graph.prune(nodes=0.9), "thinned": graph.drop_edges(below=0.01)}[kind]
    viewer, random = show(graph), np.random.default_rng(0)
    for share in (0.0, 0.02, 0.2, 0.6, 1.0):
        check(viewer, graph, random.random(len(graph.nodes)) < share)


def test_scores_of_every_kind_of_node(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """Each node alone, and all but each."""
    viewer, count = show(capital), len(capital.nodes)
    for node in range(count):
        check(viewer, capital, np.arange(count) == node)
        check(viewer, capital, np.arange(count) != node)


def test_scores_change_while_pins_do(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    scores = viewer.page.locator("#scores-pinned")
    before = scores.inner_text()
    for node in ("0_11_3", "1_5_3", "A2_3_4", "3_21_4"):
        viewer.click(node, control=True)
    assert scores.inner_text() != before
    mask = np.isin(np.array(capital.nodes.ids()), ("0_11_3", "1_5_3", "A2_3_4", "3_21_4"))
    expected = part(capital, mask).scores()
    assert f"{expected.replacement:.3f} replacement" in scores.inner_text()
    assert f"{expected.completeness:.3f} completeness" in scores.inner_text()
    while viewer.state["can"]["undo"]:
        viewer.press("u")
    assert scores.inner_text() == before
