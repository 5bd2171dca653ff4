"""Graph JSON of Neuronpedia and circuit-tracer becomes a graph: ours comes back, others' are read from the published keys."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.cli import main
from circuits.graph.edge_heads import EdgeHeads

COLUMNS = ("kind", "part", "layer", "position", "index", "activation", "probability", "output_weight", "expanded")


def node(
    node_id: str, feature: int | None, layer: Any, ctx_idx: int, feature_type: str, **others: Any
) -> dict[str, Any]:
    facts = {"node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": ctx_idx, "feature_type": feature_type}
    return {**facts, "jsNodeId": node_id, "clerp": "", **others}


def published() -> dict[str, Any]:
    """A graph of a model of three layers, as circuit-tracer 0.5 writes it, errors in its old form included."""
    feature, error = "cross layer transcoder", "mlp reconstruction error"
    return {
        "metadata": {
            "slug": "a-b", "scan": "toy-2b", "transcoder_list": [], "prompt_tokens": ["<s>", " a"], "prompt": "<s> a",
            "node_threshold": 0.8, "schema_version": 1, "info": {"generator": {"name": "circuit-tracer"}},
        },
        "qParams": {
            "pinnedIds": ["0_7_1", "0_1_1"], "supernodes": [["group", "0_1_1", "1_3_1"]], "linkType": "both",
            "clickedId": "0_1_1", "sg_pos": "",
        },
        "nodes": [
            node("1_3_1", 13, "1", 1, feature, activation=1.5, clerp="second", influence=0.4),  # (1 + 3)(1 + 3 + 1)/2 + 3
            node("0_7_1", 35, "0", 1, feature, activation=2.5, influence=0.6),
            node("0_1_1", -1, "1", 1, error, influence=0.7),  # layer 1
            node("2_-1_1", -1, "2", 1, error, influence=0.8),
            node("E_2_0", 0, "E", 0, "embedding"),
            node("E_464_1", 1, "E", 1, "embedding"),
            node("4_9_1", 9, "4", 1, "logit", token_prob=0.6, is_target_logit=True, clerp='Output " x" (p=0.600)'),
            node("4_8_1", 8, "4", 1, "logit", token_prob=0.2, clerp='Output "q"t" (p=0.200)'),
        ],
        "links": [
            {"source": "E_464_1", "target": "0_7_1", "weight": 2.0},
            {"source": "0_7_1", "target": "1_3_1", "weight": -3.0},
            {"source": "E_2_0", "target": "1_3_1", "weight": 1.0},
            {"source": "1_3_1", "target": "4_9_1", "weight": 4.0},
            {"source": "0_1_1", "target": "4_9_1", "weight": -1.0},
            {"source": "2_-1_1", "target": "4_8_1", "weight": 0.5},
        ],
    }  # fmt: skip


@pytest.fixture
def read(tmp_path: Path) -> Callable[[object], CircuitGraph]:
    """Reads a JSON value, or a text, from a file."""

    def load(value: object) -> CircuitGraph:
        path = tmp_path / "graph.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return CircuitGraph.load(path)

    return load


def links_of(graph: CircuitGraph, names: tuple[str, ...] | None = None) -> dict[tuple[str, str], float]:
    """Weights by the ids of source and target."""
    names = names or graph.nodes.ids()
    result: dict[tuple[str, str], float] = {}
    for source, target, weight in zip(graph.edges.source, graph.edges.target, graph.edges.weight, strict=True):
        ends = (names[source], names[target])
        result[ends] = result.get(ends, 0.0) + float(weight)
    return result


# Ours, there and back ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_our_json_gives_the_graph_back(draw_circuit, tmp_path_factory, data) -> None:
    """Every column that the file has, every weight; learned positions are merged into the tokens."""
    graph = draw_circuit(data)
    path = tmp_path_factory.mktemp("graphs") / "graph.json"
    back = CircuitGraph.load(graph.export("neuronpedia", path))
    kept = graph.nodes.kind != NodeKind.POSITION
    assert back.nodes.ids() == graph.nodes.select(kept).ids()
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(back.nodes, name), getattr(graph.nodes, name)[kept], err_msg=name)
    np.testing.assert_array_equal(back.nodes.inflow, graph.nodes.inflow[kept])
    tokens = {int(graph.nodes.position[row]): graph.nodes.ids()[row] for row in np.flatnonzero(graph.nodes.kind == 0)}
    merged = tuple(
        tokens[int(graph.nodes.position[row])] if graph.nodes.kind[row] == NodeKind.POSITION else name
        for row, name in enumerate(graph.nodes.ids())
    )
    assert links_of(back) == pytest.approx(links_of(graph, merged), rel=1e-6, abs=1e-7)
    if kept.all():
        assert back.edges == graph.edges
        assert back.scores() == graph.scores()
        assert CircuitGraph.load(back.export("neuronpedia", path)) == back


def test_facts_and_labels_come_back(small, read) -> None:
    back = read(small.to_neuronpedia())
    assert back.nodes.label == ("a", "b", "", "first", "second", " x", " y")
    facts = back.metadata
    same = ("prompt", "tokens", "token_ids", "model", "n_layers")
    assert {name: facts[name] for name in same} == {name: small.metadata[name] for name in same}
    assert [target["token"] for target in facts["targets"]] == [" x", " y"]
    assert back.identity_error is None
    assert facts["imported"]["unknown"] == ["biases", "identity error"]
    pruned = read(small.prune(nodes=0.75, edges=0.9).to_neuronpedia())
    assert pruned.metadata["pruning"] == {"nodes": 0.75, "edges": 0.9}


def test_attention_differences_and_feature_targets_come_back(build_graph, read) -> None:
    rows = [
        {"kind": 0, "index": 1, "label": "a"},
        {"kind": 2, "layer": 1, "part": 1},
        {"kind": 3, "layer": 1, "part": 0, "index": 4, "activation": 1.0, "expanded": True, "output_weight": 0.5},
        {"kind": 3, "layer": 0, "part": 1, "index": 4, "activation": 2.0, "label": "copies"},
        {"kind": 4, "layer": 3, "label": "a - b", "expanded": True, "output_weight": 0.25},
        {"kind": 4, "layer": 3, "label": "c - d", "expanded": True, "output_weight": 0.25},
    ]
    graph = build_graph(rows, [(2, 3, 1.5), (4, 2, 1.0), (5, 1, -1.0)])
    back = read(graph.to_neuronpedia())
    assert back.nodes.ids() == graph.nodes.ids() == ("E_1_0", "A1_-1_0", "1_4_0", "A0_4_0", "4_-1_0", "4_-2_0")
    assert back.edges == graph.edges
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(back.nodes, name), getattr(graph.nodes, name), err_msg=name)
    assert back.nodes.label[3:] == ("copies", "a - b", "c - d")


def test_heads_and_attention_scores_come_back(small, read) -> None:
    graph = small.select(small.nodes.kind != NodeKind.POSITION, np.ones(len(small.edges), dtype=bool))
    weight = graph.edges.weight.astype(np.float64)
    heads = EdgeHeads.from_dense(weight * 0.625, weight[:, None, None] * np.array([0.5, -0.25, 0.125]), listed=1.0)
    result = {
        "pair_wise_contributors": [["E_11_0", "0_7_0", 0.5]],
        "top_q_marginal_contributors": [["E_11_0", 0.75]],
        "top_k_marginal_contributors": [["constants", -0.25]],
    }
    graph = dataclasses.replace(graph, heads=heads).with_qk_results({"1/3@1": result})
    back = read(graph.to_neuronpedia())
    assert back.heads == graph.heads
    assert back.metadata["qk_tracing_results"] == {"1_3_1": result}


# Those of others -----------------------------------------------------------------------------------------------------


def test_a_published_graph_is_read(read) -> None:
    graph = read(published())
    nodes = graph.nodes
    assert nodes.ids() == ("E_2_0", "E_464_1", "1_-1_1", "2_-1_1", "0_7_1", "1_3_1", "4_9_1", "4_8_1")
    assert nodes.label == ("<s>", "␣a", "", "", "", "second", " x", 'q"t')
    np.testing.assert_allclose(nodes.activation, [0, 0, 0, 0, 2.5, 1.5, 0, 0])
    np.testing.assert_allclose(nodes.probability, [0, 0, 0, 0, 0, 0, 0.6, 0.2])
    np.testing.assert_allclose(nodes.output_weight, [0, 0, 0, 0, 0, 0, 0.75, 0.25], atol=1e-7)
    assert nodes.expanded.tolist() == [False] * 4 + [True] * 4
    np.testing.assert_array_equal(nodes.inflow, [0, 0, 0, 0, 2, 4, 5, 0.5])
    assert links_of(graph) == {
        ("E_464_1", "0_7_1"): 2.0, ("0_7_1", "1_3_1"): -3.0, ("E_2_0", "1_3_1"): 1.0, ("1_3_1", "4_9_1"): 4.0,
        ("1_-1_1", "4_9_1"): -1.0, ("2_-1_1", "4_8_1"): 0.5,
    }  # fmt: skip
    # 0.75 * 4/5 of the output comes from the tokens; all of it ends in tokens or errors.
    assert graph.scores().replacement == pytest.approx(0.6)
    facts = graph.metadata
    assert (facts["prompt"], facts["tokens"], facts["token_ids"]) == ("<s> a", ["<s>", " a"], [2, 464])
    assert (facts["model"], facts["n_layers"], facts["identity_error"]) == ("toy-2b", 3, None)
    assert facts["imported"]["format"] == "Neuronpedia graph JSON"
    assert "edges left out before the file was written" in facts["imported"]["unknown"]


def test_what_the_file_says_beside_the_graph_is_kept(read) -> None:
    """The viewer's state, with our ids; metadata and top-level keys; the names of keys that nothing here reads."""
    data = published()
    data["nodes"][0]["sae_name"] = "lorsa-8x"
    data["links"][0]["sign"] = 1
    data["qk_only_nodes"] = [{"node_id": "0_5_0"}]
    graph = read(data)
    again = graph.to_neuronpedia()
    assert again["qParams"] == {
        "pinnedIds": ["0_7_1", "1_-1_1"], "supernodes": [["group", "1_-1_1", "1_3_1"]], "linkType": "both",
        "clickedId": "1_-1_1", "sg_pos": "",
    }  # fmt: skip
    kept = {key: value for key, value in again["metadata"].items() if key != "unknown"}
    assert kept == data["metadata"]
    assert again["qk_only_nodes"] == data["qk_only_nodes"]
    assert graph.metadata["imported"]["keys_not_read"] == ["sae_name", "link.sign"]
    unknown = read(again).metadata["imported"]["unknown"]  # what is not known is not forgotten on the way
    assert set(unknown) == set(graph.metadata["imported"]["unknown"])
    pruned = graph.prune(nodes=0.1)
    assert pruned.to_neuronpedia()["qParams"]["clickedId"] == ""


def test_other_spellings_of_the_same_facts(read) -> None:
    """Layers as numbers, an index that is not paired, a probability in words only, ids of another form, no activation."""
    data = published()
    for item in data["nodes"]:
        item["layer"] = item["layer"] if item["layer"] == "E" else int(item["layer"])
        for key in ("token_prob", "influence", "activation", "is_target_logit"):
            item.pop(key, None)
    data["nodes"][0]["feature"] = 3
    data["metadata"].pop("schema_version")
    text = json.dumps(data).replace('"0_7_1"', '"0_cro_7_1"').replace('"E_2_0"', '"token-0"')
    graph = read("\ufeff" + text.replace("Output ", "Logit "))
    expected = read(published())
    assert graph.nodes.ids()[1:] == expected.nodes.ids()[1:]
    assert graph.nodes.ids()[0] == "E_-1_0"
    assert "token_ids" not in graph.metadata
    np.testing.assert_allclose(graph.nodes.output_weight, expected.nodes.output_weight, atol=1e-7)
    assert graph.edges == expected.edges
    assert "activations" in graph.metadata["imported"]["unknown"]
    assert "0.000" not in repr(graph.features()[0].cells()[3])


def test_attention_nodes_of_others(read) -> None:
    data = published()
    data["nodes"] += [
        node("1_lor_5_0", 26, 1, 0, "lorsa", activation=1.0, qk_tracing_results={
            "pair_wise_contributors": [["E_2_0", "0_1_1", 1.0]],
            "top_q_marginal_contributors": [["E_2_0", 1.0]],
            "top_k_marginal_contributors": [["0_1_1", 1.0]],
        }),
        node("1_error_attn_0", None, 1, 0, "lorsa error"),
    ]  # fmt: skip
    data["links"].append({"source": "1_lor_5_0", "target": "4_8_1", "weight": 1.0})
    graph = read(data)
    assert {"A1_5_0", "A1_-1_0"} < {*graph.nodes.ids()}
    assert links_of(graph)["A1_5_0", "4_8_1"] == 1.0
    (result,) = graph.metadata["qk_tracing_results"].items()
    assert result[0] == "A1_5_0"
    assert result[1]["pair_wise_contributors"] == [["E_2_0", "1_-1_1", 1.0]]


# Bad input -----------------------------------------------------------------------------------------------------------


def changed(*path: Any, to: Any = None) -> dict[str, Any]:
    """A published graph with another value at a place, or without what is there."""
    data = published()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return data


BAD: dict[str, tuple[object, str]] = {
    "cut": (json.dumps(published())[:700], r"damaged or cut off \(.*line 1"),
    "list": ([published()], "expected the file to be an object, given list"),
    "other": ({"graphs": []}, "to have metadata, qParams, nodes, links, but there is no metadata, .* links among graphs"),
    "no links": (changed("links"), "but there is no links among metadata, qParams, nodes"),
    "no scan": (changed("metadata", "scan"), "expected metadata to have .*, but there is no scan among slug"),
    "scan": (changed("metadata", "scan", to=5), "expected slug, scan and prompt in metadata to be texts"),
    "no ctx_idx": (changed("nodes", 3, "ctx_idx"), "expected node 3 to have .*, but there is no ctx_idx among node_id"),
    "no weight": (changed("links", 2, "weight"), "expected link 2 to have source, target, weight, but there is no weight"),
    "newer": (changed("metadata", "schema_version", to=2), "expected schema version 1, given 2; a newer version of crosstr"),
    "node": (changed("nodes", 3, to=7), "expected node 3 to be an object, given int"),
    "unknown type": (changed("nodes", 0, "feature_type", to="bias"), "expected feature_type of node 1_3_1 to be one of"),
    "layer": (changed("nodes", 0, "layer", to="one"), "expected layer of node 1_3_1 to be a whole number, given 'one'"),
    "token": (changed("nodes", 0, "ctx_idx", to=2), "expected ctx_idx of node 1_3_1 below the 2 tokens, given 2"),
    "feature": (changed("nodes", 0, "feature", to=14), "node 1_3_1: expected its id, its layer 1 and its feature 14 to say"),
    "huge": (changed("nodes", 0, "feature", to=10**30), "expected feature of node 1_3_1 to be a whole number, given 10"),
    "text": (changed("nodes", 0, "activation", to="much"), "expected activation of 1_3_1 to be a finite number, given"),
    "unknown end": (changed("links", 1, "source", to="9_9_9"), "but the source of link 1 is '9_9_9'"),
    "end": (changed("links", 1, "target", to=5), "but the target of link 1 is 5"),
    "into a token": (changed("links", 1, "target", to="E_2_0"), "expected edges into expanded nodes only"),
    "twice": (changed("nodes", 1, "node_id", to="1_3_1"), "node 1_3_1: expected its id, its layer 0"),
    "same id": (changed("nodes", 2, "node_id", to="0_7_1"), "expected each node id once, given 0_7_1 twice .* .pt file tells"),
    "same link": (changed("links", 1, to=published()["links"][2]), "an edge twice"),
    "cycle": (changed("links", 0, to={"source": "1_3_1", "target": "0_7_1", "weight": 1.0}), "expected a graph without cycles"),
    "nan": (changed("links", 0, "weight", to=float("nan")), "expected weight of a link to be a finite number, given nan"),
    "infinite activation": (changed("nodes", 0, "activation", to=float("inf")), "expected activation of 1_3_1 to be a fin"),
    "no probability": (
        changed("nodes", slice(6, 8), to=[{**item, "token_prob": 0.0} for item in published()["nodes"][6:]]),
        "expected probabilities of the logits with a positive sum, given 0",
    ),
    "no nodes": ({**published(), "nodes": [], "links": []}, "expected nodes, given none"),
    "tokens": (changed("metadata", "prompt_tokens", to="ab"), "expected metadata.prompt_tokens to be a list of texts"),
    "view": (changed("qParams", "supernodes", to=[5]), "expected qParams.pinnedIds to be a list of node ids"),
    "heads": (changed("links", 0, "heads", to=[[1, 2]]), r"expected heads of links to be lists of \[layer, head, weight\]"),
    "qk": (changed("nodes", 0, "qk_tracing_results", to={"pair_wise_contributors": 3}), "expected qk_tracing_results to"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(read, tmp_path, capsys, name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        read(value)
    assert str(caught.value).startswith(str(tmp_path / "graph.json"))
    assert main(["show", str(tmp_path / "graph.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_node_link_json_is_named_and_what_to_load_instead(read, tmp_path) -> None:
    read(published()).export("json", tmp_path / "circuit.json")
    with pytest.raises(
        ValueError, match=r"circuit\.json: .*given node-link JSON, .* expected the \.neuronpedia\.json or"
    ):
        CircuitGraph.load(tmp_path / "circuit.json")


@settings(max_examples=200)
@given(st.data())
def test_any_change_is_refused_or_a_graph(tmp_path_factory, data) -> None:
    """A value anywhere in the file replaced by another: one `ValueError` that names the file, or a graph."""
    value: Any = copy.deepcopy(published())
    place = value
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 4)) == 0:
            break
        place = place[key]
    simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    place[key] = data.draw(
        simple | st.lists(simple, max_size=3) | st.dictionaries(st.text(max_size=5), simple, max_size=2)
    )
    path = tmp_path_factory.mktemp("graphs") / "graph.json"
    path.write_text(json.dumps(value))
    try:
        graph = CircuitGraph.load(path)
    except ValueError as error:
        if not str(error).startswith(str(path)):
            raise
    else:
        graph.to_neuronpedia()


# On the command line -------------------------------------------------------------------------------------------------


def test_verbs_take_imported_graphs(tmp_path, capsys) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(published()))
    assert main(["show", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "read from a Neuronpedia graph JSON; not known: biases, identity error, edges left out" in shown
    assert "identity error 0" not in shown
    assert "as read" in shown
    assert main(["prune", str(path), "--out", str(tmp_path / "pruned.safetensors")]) == 0
    assert CircuitGraph.load(tmp_path / "pruned.safetensors").metadata["imported"]["format"] == "Neuronpedia graph JSON"
    for name in ("svg", "dot", "graphml", "json", "neuronpedia", "safetensors"):
        assert main(["export", str(path), "--format", name, "--out", str(tmp_path / f"out.{name}")]) == 0
    assert "identity error not known" in (tmp_path / "out.svg").read_text()
    capsys.readouterr()
    for verb in ("validate", "heads"):
        assert main([verb, str(path)]) == 2
        assert "expected a graph that was traced here: this one was read from a Neuro" in capsys.readouterr().err
