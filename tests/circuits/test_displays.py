"""What a notebook shows of graphs' tables and of what heads and interventions do: HTML tables, safe from any name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from html_reader import HOSTILE, read

import circuits
import replacement
from circuits import CircuitGraph, NodeKind
from circuits.heads.removal_check import check_heads
from circuits.validation.validate import validate

T, P, E, F, L = NodeKind
PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture
def hostile(build_graph: Any) -> CircuitGraph:
    """Thirty features of one output, every name hostile."""
    rows: list[dict[str, Any]] = [{"kind": T, "index": 1, "label": HOSTILE}]
    rows += [{"kind": F, "layer": 0, "index": i, "label": HOSTILE, "activation": 1.0} for i in range(30)]
    rows += [{"kind": L, "layer": 1, "index": 3, "label": HOSTILE, "expanded": True, "output_weight": 1.0}]
    return build_graph(rows, [(31, i, 1.0 + i) for i in range(31)])


def test_tables_of_nodes_and_edges_begin_and_count(hostile: CircuitGraph) -> None:
    nodes, edges = read(hostile.nodes._repr_html_()), read(hostile.edges._repr_html_())
    assert nodes.cells[:4] == ["node", "kind", "label", "activation"]
    assert nodes.cells[9:12][0] == "E_1_0"
    assert nodes.text.endswith("... and 12 more")
    assert len(nodes.cells) == 9 * 21
    assert edges.cells[3:6] == ["0", "31", "+1"]
    assert edges.text.endswith("... and 11 more")
    assert len(edges.cells) == 3 * 21
    assert max(len(repr(hostile.nodes)), len(repr(hostile.edges))) < 60


def test_edges_name_their_ends(small: CircuitGraph) -> None:
    cells = read(small.edges._repr_html_()).cells[3:]
    ends = zip(cells[::3], cells[1::3], strict=True)
    assert list(ends) == [(str(s), str(t)) for s, t in zip(small.edges.source, small.edges.target, strict=True)]


def test_hostile_names_stay_text(hostile: CircuitGraph) -> None:
    for value in (hostile.nodes, hostile.top_nodes(), hostile.features(), hostile.top_edges(), hostile.node(3)):
        assert "<img src=x" in read(value._repr_html_()).text
    row = hostile.top_edges(1)[0]
    assert read(row._repr_html_()).text.count("<img src=x") == 2


def test_scores_are_a_table(small: CircuitGraph) -> None:
    scores = small.scores()
    cells = read(scores._repr_html_()).cells
    assert cells[3:5] == ["replacement", f"{scores.replacement:.4f}"]
    assert cells[6:8] == ["completeness", f"{scores.completeness:.4f}"]


def test_what_heads_do_is_a_table() -> None:
    model = replacement.load("demo")
    local = model.localize(PROMPT)
    strongest = int(np.argmax(local.features.activation.numpy() * (local.features.row > 0).numpy()))
    layer, index, position = (
        int(column[strongest]) for column in (local.features.group, local.features.index, local.features.row)
    )
    view = circuits.head_view(model, PROMPT, f"{layer}/{index}@{position}")
    assert len(repr(view)) < 100
    cells = read(view._repr_html_()).cells
    contributions = [float(cell) for cell in cells[5::4] if cell]  # heads, direct; the bias has a short row of its own
    largest = max(view.players, key=lambda player: abs(view.heads_LH[player]))
    assert cells[4] == f"L{largest[0]}H{largest[1]}"
    assert float(cells[5]) == pytest.approx(view.heads_LH[largest], abs=1e-4)
    assert sum(contributions) == pytest.approx(view.pre_activation, abs=1e-3)

    attribution = circuits.attribute_score(model, PROMPT, layer=2, head=0, contrast="mean")
    assert len(repr(attribution)) < 100
    pairs = read(attribution._repr_html_())
    assert pairs.cells[5] == f"{attribution.top(1)[0][2]:+.4f}"
    assert "above the mean of the other visible keys" in pairs.text

    check = check_heads(model, [PROMPT], n_features=1)
    assert len(repr(check)) < 100
    rules = read(check._repr_html_()).cells
    assert rules[rules.index("ablation") + 2] == "0.000"  # the direct rung is exact by construction


def test_a_validated_graph_is_a_page() -> None:
    model = replacement.load("demo")
    graph = circuits.trace(model, PROMPT)
    report = validate(model, graph, n_features=3)
    assert len(repr(report)) < 400
    shown = read(report._repr_html_())
    assert PROMPT in shown.text
    assert f"{report['influence_among_features'][0]['spearman']:.3f}" in shown.cells
