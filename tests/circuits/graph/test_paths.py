"""The strongest path against networkx's shortest path on logarithms."""

import itertools
import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import NodeKind
from circuits.graph.paths import average_path_length, describe_path, strongest_path, strongest_paths


def strongest_by_dijkstra(graph, shares) -> list[float]:
    """Largest product of shares from each token to the target with the largest output weight, the largest first."""
    network = nx.DiGraph()
    network.add_nodes_from(range(len(graph.nodes)))
    for target, source in zip(*np.nonzero(shares), strict=True):
        network.add_edge(int(source), int(target), length=-math.log(shares[target, source]))
    end = int(np.argmax(graph.nodes.output_weight))
    lengths = nx.single_source_dijkstra_path_length(network.reverse(), end, weight="length")
    tokens = np.flatnonzero(graph.nodes.mask(NodeKind.TOKEN)).tolist()
    return sorted((math.exp(-lengths[token]) for token in tokens if token in lengths), reverse=True)


@given(st.data())
def test_equals_dijkstra_on_logarithms(draw_circuit, to_shares, data) -> None:
    graph = draw_circuit(data)
    shares = to_shares(graph)
    best = strongest_by_dijkstra(graph, shares)
    paths = strongest_paths(graph, most=3)
    end = int(np.argmax(graph.nodes.output_weight))
    assert [path.share for path in paths] == pytest.approx(
        [graph.nodes.output_weight[end] * x for x in best[:3]], rel=1e-9
    )
    for path, product in zip(paths, best, strict=False):
        steps = itertools.pairwise(path.nodes)
        assert math.prod(shares[target, source] for source, target in steps) == pytest.approx(product, rel=1e-9)
        assert graph.nodes.kind[path.nodes[0]] == NodeKind.TOKEN
        assert path.nodes[-1] == end
    assert len({path.nodes[0] for path in paths}) == len(paths), "each from a token of its own"
    assert strongest_path(graph) == (paths[0].nodes if paths else ())
    if not paths:
        assert describe_path(graph, ()) == "no path from a token to the output"


@given(st.data())
def test_average_path_length_is_the_expected_number_of_steps(draw_circuit, to_shares, data) -> None:
    """A walk from the output that follows the shares: the mass still walking, summed over its steps."""
    graph = draw_circuit(data)
    shares, walking, steps = to_shares(graph), graph.nodes.output_weight, 0.0
    for _ in range(len(graph.nodes)):
        walking = walking @ shares
        steps += walking.sum()
    assert average_path_length(graph) == pytest.approx(steps, rel=1e-6, abs=1e-12)


def test_small_graph_in_words(small) -> None:
    path = strongest_path(small)
    assert small.nodes.ids()[path[0]] == "E_12_1"  # b -> x is 1/4; a -> second -> x is 1/4 * 3/4
    assert describe_path(small, path) == 'token "b" at 1 —(−)→ output "␣x" (p=0.600)'
    assert describe_path(small, (0, 5, 6)) == (
        'token "a" at 0 —(+)→ feature 1/3 at 1 (second) —(+)→ output "␣x" (p=0.600)'
    )


def test_path_without_an_edge(small) -> None:
    with pytest.raises(ValueError, match="expected a path along edges, given none from node 0 to node 6"):
        describe_path(small, (0, 6))
