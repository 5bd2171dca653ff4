"""Compressed rows against a dense matrix."""

import numpy as np
import pytest

from circuits.graph.edges import Edges


def test_rows_hold_what_flows_into_a_target() -> None:
    edges = Edges.from_coo(np.array([2, 1, 2]), np.array([1, 0, 0]), np.array([3.0, -1.0, 2.0]), n_nodes=3)
    assert edges.indptr.tolist() == [0, 0, 1, 3]
    assert edges.source.tolist() == [0, 0, 1]
    assert edges.weight.tolist() == [-1.0, 2.0, 3.0]
    assert edges.target.tolist() == [1, 2, 2]
    assert len(edges) == 3
    assert edges.n_nodes == 3
    assert edges.into(np.array([2, 0, 1])).tolist() == [1, 2, 0]
    assert edges.row_sums(edges.weight).tolist() == [0.0, -1.0, 5.0]


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
