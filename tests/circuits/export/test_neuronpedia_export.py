"""The Neuronpedia JSON against its published schema, written out by hand."""

import dataclasses
import json

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import NodeKind
from circuits.export.neuronpedia import cumulative_influence
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import Edges
from circuits.graph.neuronpedia_schema import cantor_pair, cantor_unpair
from circuits.graph.text import slug

T, P, E, F, L = NodeKind
FEATURE_TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
# The published schema: what it requires, and the types it gives for what we write. Other keys are allowed everywhere.
TYPES = {
    "graph": {"metadata": dict, "qParams": dict, "nodes": list, "links": list},
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "node": {
        "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str, "clerp": str,
        "token_prob": float, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int,
    },
    "link": {"source": str, "target": str, "weight": float},
}  # fmt: skip


def check_types(kind: str, value: dict) -> None:
    for name, expected in TYPES[kind].items():
        assert type(value[name]) is expected, f"{name} of a {kind}"


def check(data: dict) -> None:
    """The schema's required keys and their types, and that every link joins two nodes."""
    check_types("graph", data)
    check_types("metadata", data["metadata"])
    check_types("qParams", data["qParams"])
    assert all(type(token) is str for token in data["metadata"]["prompt_tokens"])
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids)
    for node in data["nodes"]:
        check_types("node", node)
        assert node["feature_type"] in FEATURE_TYPES
        assert node["influence"] is None or 0 <= node["influence"] <= 1
        assert node["activation"] is None or type(node["activation"]) is float
    for link in data["links"]:
        check_types("link", link)
        assert link["source"] in ids
        assert link["target"] in ids
    json.dumps(data, allow_nan=False)


@given(st.data())
def test_every_graph_fits_the_schema(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    check(graph.to_neuronpedia())
    check(graph.prune(nodes=0.5).to_neuronpedia())


@given(st.data())
def test_positions_are_merged_into_tokens(draw_circuit, to_dense, data) -> None:
    graph = draw_circuit(data)
    links = {(link["source"], link["target"]): link["weight"] for link in graph.to_neuronpedia()["links"]}
    matrix, nodes = to_dense(graph), graph.nodes
    token_of = {int(nodes.position[row]): row for row in np.flatnonzero(nodes.kind == T)}
    for row in np.flatnonzero(nodes.kind == P):
        matrix[:, token_of[int(nodes.position[row])]] += matrix[:, row]
        matrix[:, row] = 0
    ids = nodes.ids()
    expected = {(ids[s], ids[t]): matrix[t, s] for t, s in zip(*np.nonzero(matrix), strict=True)}
    assert links == pytest.approx(expected)


def test_nodes_of_the_small_graph(small) -> None:
    data = small.to_neuronpedia()
    nodes = {node["node_id"]: node for node in data["nodes"]}
    assert list(nodes) == ["E_11_0", "E_12_1", "0_-1_1", "0_7_0", "1_3_1", "4_5_1", "4_6_1"]
    feature = nodes["1_3_1"]
    assert (feature["feature"], feature["layer"], feature["ctx_idx"]) == (cantor_pair(1, 3), "1", 1)
    assert (feature["activation"], feature["clerp"], feature["jsNodeId"]) == (1.0, "second", "1_3-0")
    assert (nodes["0_-1_1"]["feature"], nodes["0_-1_1"]["feature_type"]) == (-1, "mlp reconstruction error")
    assert (nodes["E_12_1"]["layer"], nodes["E_12_1"]["clerp"], nodes["E_12_1"]["jsNodeId"]) == ("E", "b", "E_12-1")
    logit = nodes["4_5_1"]
    assert (logit["clerp"], logit["layer"], logit["feature"]) == ('Output " x" (p=0.600)', "4", 5)
    assert (logit["is_target_logit"], logit["influence"]) == (True, None)
    assert logit["token_prob"] == pytest.approx(0.6)
    assert data["metadata"]["scan"] == "toy"
    assert "node_threshold" not in data["metadata"]


def test_heads_are_written_on_links(small) -> None:
    """Those listed for each link, the strongest first; a position's are added to its token's."""
    share = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    parts = small.edges.weight[:, None].astype(np.float64) * share
    graph = dataclasses.replace(small, heads=EdgeHeads.from_dense(np.zeros(len(parts)), parts[:, None], listed=1.0))
    links = {(link["source"], link["target"]): link for link in graph.to_neuronpedia()["links"]}
    assert len(links) == len(small.edges)
    link = links["1_3_1", "4_5_1"]
    assert link["heads"] == [[0, head, pytest.approx(3 * share[head])] for head in range(5)]
    assert link["direct"] == 0.0

    token_and_position = [(6, 1, -1.0), (6, 2, 0.5)]
    columns = (np.array(column) for column in zip(*token_and_position, strict=True))
    edges = Edges.from_coo(*columns, n_nodes=len(small.nodes))
    heads = np.zeros((2, 1, 6))
    heads[0, 0, :5] = -share
    heads[1, 0, [4, 5]] = 0.35, 0.15  # what is weak in one edge is strong in the other
    both = dataclasses.replace(small, edges=edges, heads=EdgeHeads.from_dense(np.zeros(2), heads, listed=1.0))
    (link,) = both.to_neuronpedia()["links"]
    assert (link["source"], link["target"], link["weight"]) == ("E_12_1", "4_5_1", -0.5)
    assert [head for _, head, _ in link["heads"]] == [0, 4, 1, 2, 5, 3]
    assert [weight for *_, weight in link["heads"]] == pytest.approx([-0.4, 0.3, -0.25, -0.2, 0.15, -0.1])


def test_qk_results_are_written_on_nodes(small) -> None:
    result = {
        "pair_wise_contributors": [["E_11_0", "0_7_0", 0.5]],
        "top_q_marginal_contributors": [["E_11_0", 0.75]],
        "top_k_marginal_contributors": [["constants", -0.25]],
    }
    graph = small.with_qk_results({"1/3@1": result})
    check(graph.to_neuronpedia())
    nodes = {node["node_id"]: node for node in graph.to_neuronpedia()["nodes"]}
    assert [name for name, node in nodes.items() if "qk_tracing_results" in node] == ["1_3_1"]
    assert nodes["1_3_1"]["qk_tracing_results"] == result
    assert graph.with_qk_results({"0/7@0": result}).metadata["qk_tracing_results"].keys() == {"1_3_1", "0_7_0"}
    with pytest.raises(ValueError, match="node: the graph has no feature 1/4@1"):
        small.with_qk_results({"1/4@1": result})
    for wrong in (
        {},
        {**result, "top_k_marginal_contributors": [["constants"]]},
        {**result, "pair_wise_contributors": 3},
    ):
        with pytest.raises(
            ValueError, match="expected qk_tracing_results to be an object of objects with the lists pair"
        ):
            small.with_qk_results({"1/3@1": wrong})


def test_pruning_is_written(small) -> None:
    metadata = small.prune(nodes=0.75, edges=0.9).to_neuronpedia()["metadata"]
    assert metadata["node_threshold"] == 0.75
    assert metadata["pruning_settings"] == {"node_threshold": 0.75, "edge_threshold": 0.9}


def test_feature_targets_are_marked(build_graph) -> None:
    rows = [
        {"kind": T, "index": 1, "label": "a"},
        {"kind": F, "layer": 1, "index": 2, "activation": 3.0, "expanded": True, "output_weight": 1.0},
    ]
    data = build_graph(rows, [(1, 0, 2.0)]).to_neuronpedia()
    check(data)
    assert [node["is_target_logit"] for node in data["nodes"]] == [False, True]


def test_differences_have_ids_of_their_own(build_graph) -> None:
    rows = [{"kind": T, "index": 1}]
    rows += [{"kind": L, "layer": 2, "expanded": True, "output_weight": 0.5, "label": f"a - {i}"} for i in range(2)]
    data = build_graph(rows, [(1, 0, 2.0), (2, 0, 1.0)]).to_neuronpedia()
    check(data)
    assert [node["node_id"] for node in data["nodes"]] == ["E_1_0", "3_-1_0", "3_-2_0"]


def test_networkx_reads_the_json(small) -> None:
    data = small.to_neuronpedia()
    network = nx.node_link_graph(data, directed=True, multigraph=False, name="node_id", edges="links")
    assert network.number_of_nodes() == 7
    assert network.edges["0_7_0", "1_3_1"]["weight"] == 2.0


def test_cantor_pair_is_one_to_one() -> None:
    pairs = {cantor_pair(layer, index) for layer in range(30) for index in range(300)}
    assert len(pairs) == 30 * 300
    assert cantor_pair(2, 3) == 18
    assert [cantor_pair(*cantor_unpair(number)) for number in range(2000)] == list(range(2000))
    assert cantor_unpair(cantor_pair(35, 10**12)) == (35, 10**12)  # beyond what a float holds


def test_cumulative_influence_ranks() -> None:
    np.testing.assert_allclose(cumulative_influence(np.array([1.0, 6.0, 0.0, 3.0])), [1.0, 0.6, 1.0, 0.9])
    np.testing.assert_array_equal(cumulative_influence(np.zeros(2)), [1.0, 1.0])


def test_slug() -> None:
    assert slug("The capital of Texas is!") == "the-capital-of-texas-is"
    assert slug("\u4e2d\u6587 ..") == "circuit"
    assert len(slug("word " * 40)) <= 48


def test_groups_are_supernodes_of_pinned_nodes(small) -> None:
    groups = [{"name": "both", "members": ["0_7_0", "1_3_1"]}, {"name": "a", "members": ["E_12_1", "P_1"]}]
    view = dataclasses.replace(small, metadata={**small.metadata, "groups": groups}).to_neuronpedia()["qParams"]
    assert view["supernodes"] == [["both", "0_7_0", "1_3_1"]]
    assert view["pinnedIds"] == ["0_7_0", "1_3_1"]
    assert small.to_neuronpedia()["qParams"]["supernodes"] == []
