"""Aligned positions and shared nodes, against definitions written out with Python's own strings, sets and tuples."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from circuits.graph.alignment import Alignment, aligned_positions, node_keys, prompt_tokens, same_nodes
from circuits.graph.nodes import NodeKind, NodeTable

PROMPTS = st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=8), min_size=1, max_size=5)


def can_be_aligned(prompts: list[list[str]]) -> bool:
    ends = len({tokens[0] for tokens in prompts}) == 1 or len({tokens[-1] for tokens in prompts}) == 1
    return ends or len({len(tokens) for tokens in prompts}) == 1


def test_names_of_different_length() -> None:
    new_york, texas = (["<bos>", "the", "capital", "of", *name, "is"] for name in (["New", "York"], ["Texas"]))
    assert aligned_positions(new_york, texas).tolist() == [0, 1, 2, 3, -1, 4, 5]
    assert aligned_positions(texas, new_york).tolist() == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("tokens", "other", "expected"),
    [
        ("abc", "xyz", [0, 1, 2]),  # of one length: place by place
        ("aaa", "aa", [-1, 0, 1]),  # the ends meet
        ("ab", "aab", [1, 2]),
        ("ab", "abc", [0, 2]),  # the last position always has a counterpart
        ("xbc", "bc", [-1, 0, 1]),
        ("a", "ab", [1]),
        ("abXYcd", "abZcd", [0, 1, -1, 2, 3, 4]),
    ],
)
def test_pairs_by_hand(tokens: str, other: str, expected: list[int]) -> None:
    assert aligned_positions(tokens, other).tolist() == expected


@given(PROMPTS)
def test_shared_beginning_and_end_meet_and_order_of_prompts_means_nothing(prompts) -> None:
    assume(can_be_aligned(prompts))
    alignment = Alignment.of(prompts)
    assert Alignment.of(reversed(prompts)) == alignment
    assert alignment.length == max(map(len, prompts))
    shared_end = 1
    while all(tokens[-shared_end - 1 :] == prompts[0][-shared_end - 1 :] for tokens in prompts) and shared_end < min(
        map(len, prompts)
    ):
        shared_end += 1
    for tokens in prompts:
        positions = alignment.positions(len(tokens)).tolist()
        assert all(before < after for before, after in pairwise(positions))
        assert positions[: alignment.prefix] == list(range(alignment.prefix))
        assert positions[-shared_end:] == list(range(alignment.length - shared_end, alignment.length))
        assert tokens[: alignment.prefix] == prompts[0][: alignment.prefix]


@given(PROMPTS)
def test_alignment_of_two_is_mutual(prompts) -> None:
    tokens, other = prompts[0], prompts[-1]
    assume(can_be_aligned([tokens, other]))
    there, back = aligned_positions(tokens, other), aligned_positions(other, tokens)
    pairs = {(place, int(to)) for place, to in enumerate(there) if to >= 0}
    assert pairs == {(int(to), place) for place, to in enumerate(back) if to >= 0}
    assert len(pairs) == min(len(tokens), len(other))


def test_prompts_that_cannot_be_aligned() -> None:
    with pytest.raises(ValueError, match="given prompts of 2 to 3 tokens that share neither"):
        Alignment.of(["abc", "xy"])
    with pytest.raises(ValueError, match="at least one token, given none"):
        Alignment.of([])
    with pytest.raises(ValueError, match="at least one token, given an empty one"):
        Alignment.of(["a", ""])
    with pytest.raises(ValueError, match="expected a prompt of 2 to 3 tokens, given 1"):
        Alignment.of(["abc", "ac"]).positions(1)


@given(st.data())
def test_keys_tell_the_nodes_of_a_graph_apart_and_rise(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    keys = node_keys(graph.nodes, np.arange(len(graph.metadata["tokens"])))
    assert len(np.unique(keys)) == len(graph.nodes)
    before_outputs = keys[~graph.nodes.mask(NodeKind.LOGIT)]
    assert (np.diff(before_outputs) > 0).all()


@given(st.data())
def test_shared_nodes_are_those_of_equal_part_layer_position_and_index(draw_circuit, data) -> None:
    graph, other = draw_circuit(data), draw_circuit(data)
    tokens, other_tokens = (one.metadata["tokens"] for one in (graph, other))
    rows, other_rows = same_nodes(graph, other)
    place = aligned_positions(tokens, other_tokens)

    def identity(nodes: NodeTable, row: int, position: int) -> tuple[int, ...]:
        index = 0 if nodes.kind[row] == NodeKind.TOKEN else int(nodes.index[row])
        return int(nodes.kind[row]), int(nodes.part[row]), int(nodes.layer[row]), position, index

    known = {identity(other.nodes, row, int(other.nodes.position[row])): row for row in range(len(other.nodes))}
    expected = {}
    for row in range(len(graph.nodes)):
        matching = known.get(identity(graph.nodes, row, int(place[graph.nodes.position[row]])))
        if matching is not None:
            expected[row] = matching
    assert dict(zip(rows.tolist(), other_rows.tolist(), strict=True)) == expected


def test_differences_are_numbered_at_their_position() -> None:
    nodes = NodeTable.build(
        kind=np.full(4, NodeKind.LOGIT), position=[1, 1, 0, 1], index=[-1, 7, -1, -1], layer=3, output_weight=0.25
    )
    keys = node_keys(nodes, np.array([0, 1]))
    assert len(set(keys.tolist())) == 4
    alone = node_keys(nodes.select(np.array([True, False, False, False])), np.array([0, 1]))
    assert alone[0] == keys[0]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("layer", 2**11, "layer: expected numbers below 2,047, given 2,048"),
        ("index", 2**28, "index: expected numbers below 268,434,432, given 268,435,456"),
    ],
)
def test_numbers_too_large_for_a_key(column: str, value: int, message: str) -> None:
    nodes = NodeTable.build(kind=np.array([NodeKind.FEATURE]), position=[0], **{"layer": 0, "index": 0, column: value})
    with pytest.raises(ValueError, match=message):
        node_keys(nodes, np.array([0]))


def test_tokens_are_compared_by_id_where_there_are_ids(small) -> None:
    assert prompt_tokens(small.metadata) == [11, 12]
    assert prompt_tokens({"tokens": ["a", "b"]}) == ["a", "b"]
