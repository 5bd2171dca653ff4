"""Compressed rows against a dense matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.graph.edges import Edges, RowBlock


def test_rows_hold_what_flows_into_a_target() -> None:
    edges = Edges.from_coo(np.array([2, 1, 2]), np.array([1, 0, 0]), np.array([3.0, -1.0, 2.0]), n_nodes=3)
    assert edges.indptr.tolist() == [0, 0, 1, 3]
    assert edges.source.tolist() == [0, 0, 1]
    assert edges.weight.tolist() == [-1.0, 2.0, 3.0]
    assert edges.target.tolist() == [1, 2, 2]
    assert len(edges) == 3
    assert edges.n_nodes == 3
    assert edges.into(np.array([2, 0, 1])).tolist() == [1, 2, 0]
    assert edges.row_sums(lambda block: block.weight).tolist() == [0.0, -1.0, 5.0]


def test_select_renumbers() -> None:
    edges = Edges.from_coo(np.array([2, 1, 2]), np.array([1, 0, 0]), np.array([3.0, -1.0, 2.0]), n_nodes=3)
    kept = edges.select(np.array([True, False, True]), np.ones(3, dtype=bool))
    assert (kept.target.tolist(), kept.source.tolist(), kept.weight.tolist()) == ([1], [0], [2.0])
    assert edges.select(np.ones(3, dtype=bool), np.array([True, False, True])).source.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("target", "source", "weight", "message"),
    [
        ([0, 0], [1, 1], [1.0, 2.0], "given an edge twice or out of order"),
        ([0], [5], [1.0], r"expected nodes in 0..1, given 5"),
        ([5], [0], [1.0], r"expected targets in 0..1, given 5"),
        ([0], [1], [np.inf], "expected finite numbers, given NaN or infinity"),
        ([0], [1, 0], [1.0], r"expected three 1-D arrays of one length, given \(1,\), \(2,\) and \(1,\)"),
    ],
)
def test_mistakes_are_named(target, source, weight, message) -> None:
    with pytest.raises(ValueError, match=message):
        Edges.from_coo(np.array(target), np.array(source), np.array(weight), n_nodes=2)


def test_raw_columns_are_checked() -> None:
    source, weight = np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.float32)
    with pytest.raises(ValueError, match=r"Edges.indptr: expected to rise from 0 to the 1 edges"):
        Edges(np.array([0, 0]), source, weight)
    with pytest.raises(ValueError, match=r"Edges.source: expected a 1-D array of int32, given int64\(1,\)"):
        Edges(np.array([0, 1]), source.astype(np.int64), weight)
    with pytest.raises(ValueError, match=r"Edges.weight: expected 1 weights like the sources, given 2"):
        Edges(np.array([0, 1]), source, np.ones(2, dtype=np.float32))


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([np.float32, np.float64]))
def test_blocks_equal_coordinates(seed, n_nodes, dtype) -> None:
    """Rows in any order, over nodes some of which are dropped and the others renumbered."""
    random = np.random.default_rng(seed)
    kept = random.random(n_nodes) < 0.7
    dense = random.normal(size=(n_nodes, n_nodes)).astype(dtype) * (random.random((n_nodes, n_nodes)) < 0.5)
    dense *= kept[:, None] & kept
    rows = random.permutation(np.flatnonzero(kept))
    blocks = []
    for nodes in np.split(rows, np.sort(random.integers(0, len(rows) + 1, size=2))):
        row, source = np.nonzero(dense[nodes])
        counts = np.bincount(row, minlength=len(nodes))
        blocks.append(RowBlock(nodes, counts, source.astype(np.int32), dense[nodes][row, source]))
    number = np.cumsum(kept) - 1
    target, source = np.nonzero(dense)
    expected = Edges.from_coo(number[target], number[source], dense[target, source], n_nodes=int(kept.sum()))
    assert Edges.from_blocks(blocks, n_nodes=int(kept.sum()), number=number) == expected
    assert blocks == [], "a block is given up once it is copied"


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([[0, 0]], "expected at most one row for each node, given node 0 twice"),
        ([[1], [0, 1]], "expected at most one row for each node, given node 1 twice"),
        ([[0, 2]], "expected rows of nodes in 0..1, given 2"),
        ([[-1]], "expected rows of nodes in 0..1, given -1"),
    ],
)
def test_blocks_hold_one_row_of_a_node(nodes, message) -> None:
    empty = np.zeros(0, dtype=np.int32)
    blocks = [RowBlock(np.array(block), np.zeros(len(block), dtype=int), empty, empty.astype("f4")) for block in nodes]
    with pytest.raises(ValueError, match=message):
        Edges.from_blocks(blocks, n_nodes=2)
