"""Survival of circuits: by hand, under itself, under permuted and scaled crosscoders, under other words, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuits
from circuits import CircuitGraph, NodeKind
from circuits.graph.pruning import prune
from circuits.validation.command import prompts_to_compare
from circuits.validation.feature_matching import match_features
from circuits.validation.robustness import robustness, threshold_facts
from circuits.validation.survival import explains_the_answer, places, prompt_survival, survival
from replacement import Crosscoder, ReLU, ReplacementModel, TopK, Wiring

PROMPT = "w5 w6 w7 w8 w9 w33"
T, _, E, F, L = NodeKind


def traced(lm: Any, **options: Any) -> tuple[ReplacementModel, CircuitGraph]:
    """A random replacement model and the graph of a prompt in it, whose circuit is all that has influence."""
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, **options))
    return model, circuits.trace(model, PROMPT, coverage=1.0).prune(nodes=1.0, edges=1.0)


def changed_features(crosscoder: Crosscoder, order: torch.Tensor, scale: torch.Tensor) -> Crosscoder:
    """A crosscoder with the features of every group in another order, each read `scale` times as strongly and written back."""
    result = Crosscoder.like(crosscoder)
    result.load_state_dict(crosscoder.state_dict())
    with torch.no_grad():
        for group in range(result.n_groups):
            for weight_FD, own_FD in zip(result.encoders(group), crosscoder.encoders(group), strict=True):
                weight_FD.copy_((own_FD * scale[:, None])[order])
            result.b_enc[group].copy_((crosscoder.b_enc[group] * scale)[order])
            result.W_dec[group].copy_((crosscoder.W_dec[group] / scale[:, None, None])[order])
    return result


def two_graphs(build_graph: Callable[..., CircuitGraph]) -> tuple[CircuitGraph, CircuitGraph]:
    """Features 1, 2 and 3 at positions 0, 1 and 2 of `a b c`; in `a X c` feature 2 is another one, and 3 does less."""
    rows: list[dict[str, Any]] = [
        {"kind": T, "index": 10 + i, "position": i, "label": text} for i, text in enumerate("abc")
    ]
    rows += [{"kind": F, "layer": 0, "index": 1 + i, "position": i, "expanded": True} for i in range(3)]
    rows += [{"kind": L, "layer": 3, "index": 7, "position": 2, "expanded": True, "output_weight": 1.0}]
    edges = [(3, 0, 1.0), (4, 1, 1.0), (5, 2, 1.0), (6, 3, 2.0), (6, 4, 3.0), (6, 5, 5.0)]
    graph = build_graph(rows, edges)
    rows = [{**row, "label": "X"} if row.get("label") == "b" else dict(row) for row in rows]
    rows[4]["index"], rows[6]["index"] = 9, 8
    return graph, build_graph(rows, [*edges[:3], (6, 3, 2.0), (6, 4, 6.0), (6, 5, 2.0)])


def test_by_hand(build_graph: Callable[..., CircuitGraph]) -> None:
    graph, other = two_graphs(build_graph)
    facts = prompt_survival(graph, other)
    influence = {"graph": [0.2, 0.3, 0.5], "other": [0.2, 0.6, 0.2]}
    assert places(*(one.metadata["tokens"] for one in (graph, other))) == ["before", "at", "after"]
    kept = prune(graph)
    assert kept.nodes[3:6].tolist() == [False, True, True], "0.3 and 0.5 hold 80 % of the influence of features"
    assert prune(other).nodes[3:6].tolist() == [True, True, False], "equal ones: the first"
    assert facts["equal_tokens"] == pytest.approx(2 / 3)
    assert (facts["features"], facts["active"], facts["kept"]) == (2, 0.5, 0.0)
    assert facts["influence_active"] == pytest.approx(influence["graph"][2] / 0.8)
    assert (facts["jaccard"], facts["overlap"]) == (0, 0)
    assert (facts["edges"], facts["edges_kept"]) == (4, 0)
    assert [(row["place"], row["layer"], row["features"], row["active"]) for row in facts["places"]] == [
        ("at", 0, 1, 0),
        ("after", 0, 1, 1),
    ]
    wide = {"pruning": {"nodes": 1.0, "edges": 1.0}}
    whole, whole_other = (CircuitGraph(one.nodes, one.edges, {**one.metadata, **wide}) for one in (graph, other))
    facts = prompt_survival(whole, whole_other)
    assert (facts["features"], facts["kept"], facts["jaccard"]) == (3, pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert facts["influence_kept"] == pytest.approx(0.7)
    assert facts["overlap"] == pytest.approx((0.2 + 0.2) / (0.2 + 0.3 + 0.6 + 0.5))
    assert facts["edges_kept"] == pytest.approx(4 / 6), "into the answer too, though it is another token"
    assert facts["edge_influence_kept"] == pytest.approx(2 * 0.7 / 2)


@given(st.data())
def test_a_circuit_survives_in_itself(draw_circuit: Any, data: Any) -> None:
    graph = draw_circuit(data)
    facts = prompt_survival(graph, graph)
    assert facts["equal_tokens"] == 1
    if facts["features"]:
        assert facts["active"] == facts["kept"] == facts["jaccard"] == 1
        assert facts["influence_kept"] in (1, pytest.approx(1))
    assert facts["edges_kept"] == 1 or math.isnan(facts["edges_kept"])
    assert {row["place"] for row in facts["places"]} <= {"before"}
    nothing = survival(graph, graph, np.full(len(graph.nodes), -1), ["all"] * len(graph.metadata["tokens"]))
    if nothing["features"]:
        assert nothing["active"] == nothing["kept"] == nothing["jaccard"] == 0


@given(st.data())
def test_classes_hold_every_node_and_edge_and_the_circuit_is_none_of_the_noise_alone(
    draw_circuit: Any, data: Any
) -> None:
    graph = draw_circuit(data)
    rows = threshold_facts(graph)["classes"]
    stays = graph.nodes.mask(NodeKind.TOKEN, NodeKind.LOGIT) | graph.nodes.is_target
    assert sum(row["nodes"] for row in rows) == (~stays).sum()
    assert sum(row["edges"] for row in rows) == len(graph.edges)
    assert sum(row["circuit_nodes"] for row in rows) == (prune(graph).nodes & ~stays).sum()
    assert sum(row["circuit_edges"] for row in rows) == prune(graph).edges.sum()
    core = rows[0]
    assert (core["circuit_nodes"], core["circuit_edges"]) == (core["nodes"], core["edges"]), "0.8 and 0.98 are tried"
    for name in ("nodes_influence", "edges_influence"):
        assert sum(row[name] for row in rows) == pytest.approx(1) or math.isnan(rows[0][name])


def test_a_permuted_crosscoder_gives_the_same_circuit(language_model: Any) -> None:
    model, graph = traced(language_model("gpt2"))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    permuted = changed_features(model.crosscoder, order, torch.ones(48))
    facts = robustness(model, graph, other_crosscoder=permuted)["crosscoder"]
    assert facts["features"] > 20
    for name in (
        "likeness",
        "matched",
        "influence_matched",
        "active",
        "kept",
        "influence_kept",
        "edges_kept",
        "jaccard",
    ):
        assert facts[name] == pytest.approx(1, abs=1e-6), name
    assert facts["overlap"] == pytest.approx(1, abs=1e-4)
    assert facts["edge_influence_kept"] == pytest.approx(1, abs=1e-6)


def test_how_a_size_is_divided_means_nothing(language_model: Any) -> None:
    """With ReLU, reading twice as strongly and writing half as strongly is the same feature."""
    model, graph = traced(language_model("gpt2"), activation=ReLU())
    generator = torch.Generator().manual_seed(6)
    order, scale = torch.randperm(48, generator=generator), torch.rand(48, generator=generator) + 0.5
    facts = robustness(model, graph, other_crosscoder=changed_features(model.crosscoder, order, scale))["crosscoder"]
    assert facts["matched"] == 1
    assert facts["influence_kept"] > 0.99
    assert facts["overlap"] > 0.99


@torch.no_grad()
def test_matches_are_mutual_alike_and_of_one_sign(language_model: Any) -> None:
    crosscoder = tiny.crosscoder_for(language_model("gpt2"))
    negated = changed_features(crosscoder, torch.arange(48), torch.where(torch.arange(48) == 3, -1.0, 1.0))
    index, likeness = match_features(crosscoder, negated, 1, np.arange(48))
    assert index.tolist() == [number if number != 3 else -1 for number in range(48)]
    assert likeness[3] < 0.5
    twice = changed_features(crosscoder, torch.where(torch.arange(48) == 4, 5, torch.arange(48)), torch.ones(48))
    index, likeness = match_features(crosscoder, twice, 1, np.array([4, 5, 6]))
    assert index[0] == -1, "its place is taken by a copy of feature 5"
    assert index[1] in (4, 5)
    assert index[2] == 6
    np.testing.assert_allclose(likeness[1:], 1, atol=1e-6)
    expected = []
    other = tiny.crosscoder_for(language_model("gpt2"), n_features=30, activation=TopK(4))
    for mine in range(48):  # the cosine of the maps of rank one, written out
        maps = [
            torch.outer(torch.cat([c.decoder(1, site)[i] for site in c.wiring.writes[1]]), c.encoders(1)[0][i]).ravel()
            for c, i in ((crosscoder, mine), *((other, theirs) for theirs in range(30)))
        ]
        expected.append([torch.cosine_similarity(maps[0], one, dim=0).item() for one in maps[1:]])
    _, likeness = match_features(crosscoder, other, 1, np.arange(48))
    plain = np.array(expected)
    assert (likeness <= plain.max(1) + 1e-6).all(), "less where both cosines are negative"
    assert (np.abs(likeness - plain.max(1)) < 1e-6).mean() > 0.3


def test_features_in_front_of_a_changed_word_stay(language_model: Any) -> None:
    model, graph = traced(language_model("llama"))
    prompt = PROMPT.replace("w8", "w30")
    (facts,) = robustness(model, graph, prompts={"names": [prompt]})["prompts"]
    assert (facts["kind"], facts["prompts"]) == ("names", 1)
    assert facts["equal_tokens"] == pytest.approx(6 / 7)
    by_place = {place: [row for row in facts["places"] if row["place"] == place] for place in ("before", "at", "after")}
    assert sum(row["features"] for row in by_place["before"]) > 5
    assert all(row["active"] == row["features"] for row in by_place["before"]), "no word in front of them differs"
    at = by_place["at"]
    assert sum(row["active"] for row in at) < sum(row["features"] for row in at)
    assert facts["every"][0]["prompt"] == prompt
    json.dumps(facts, allow_nan=False)


def test_prompts_of_the_demo_are_made_by_their_template() -> None:
    facts = {"top_tokens": [{"token": "Austin"}], "targets": [{"token": "Austin"}], "tokens": ["a"]}
    logit = {"kind": [L], "layer": 3, "position": 0, "index": 1, "output_weight": 1.0}
    nodes = circuits.NodeTable.build(**logit)
    edges = circuits.graph.edges.Edges.from_coo(np.zeros(0, int), np.zeros(0, int), np.zeros(0), n_nodes=1)
    dallas = "the capital of the state containing Dallas is"
    graph = CircuitGraph(nodes, edges, {**facts, "prompt": dallas, "n_layers": 3, "identity_error": 0.0})
    assert explains_the_answer(graph)
    made = prompts_to_compare(graph, None, is_demo=True)
    assert set(made) == {"same answer", "other answer"}
    assert dallas not in made["same answer"]
    assert prompts_to_compare(graph, None, is_demo=False) == {}
    assert prompts_to_compare(graph, ["x"], is_demo=True) == {"paraphrase": ("x",)}
    other = CircuitGraph(nodes, edges, {**graph.metadata, "targets": [{"token": "Houston"}]})
    assert prompts_to_compare(other, None, is_demo=True) == {}


def test_mistakes(language_model: Any, build_graph: Callable[..., CircuitGraph], tmp_path: Path) -> None:
    model, graph = traced(language_model("gpt2"))
    with pytest.raises(ValueError, match="this crosscoder was trained on another model"):
        robustness(model, graph, other_crosscoder=tiny.crosscoder_for(language_model("llama")))
    per_layer = tiny.crosscoder_for(model.language_model, wiring=Wiring.per_layer(model.language_model))
    with pytest.raises(ValueError, match="expected another crosscoder with the same reads and writes"):
        robustness(model, graph, other_crosscoder=per_layer)
    aimed = circuits.trace(model, PROMPT, targets="w40")
    for options in ({"prompts": {"names": ["w5"]}}, {"other_crosscoder": model.crosscoder}):
        with pytest.raises(ValueError, match="expected a graph of the model's answer to compare with other prompts or"):
            robustness(model, aimed, **options)
    assert robustness(model, aimed)["prompts"] == []
    long, short = (
        two_graphs(build_graph)[0],
        build_graph(
            [{"kind": T, "index": i, "position": i, "label": "z"} for i in range(2)]
            + [{"kind": L, "layer": 3, "index": 7, "position": 1, "expanded": True, "output_weight": 1.0}],
            [(2, 0, 1.0)],
        ),
    )
    with pytest.raises(ValueError, match="expected prompts that can be aligned"):
        prompt_survival(long, short)
