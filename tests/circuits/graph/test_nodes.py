"""The node table keeps its promises about order, types and ids."""

import numpy as np
import pytest

from circuits import NodeKind, NodeTable

T, P, E, F, L = NodeKind


def table(**changes) -> NodeTable:
    columns = {
        "kind": [T, T, P, E, F, F, L],
        "layer": [-1, -1, -1, 0, 0, 1, 2],
        "position": [0, 1, 0, 1, 0, 1, 1],
        "index": [9, 4, -1, -1, 3, 3, 8],
        "expanded": [0, 0, 0, 0, 0, 1, 1],
        "output_weight": [0, 0, 0, 0, 0, 0, 1],
    }
    return NodeTable.build(**{**columns, **changes})


def test_ids_follow_the_published_formats() -> None:
    assert table().ids() == ("E_9_0", "E_4_1", "P_0", "0_-1_1", "0_3_0", "1_3_1", "3_8_1")


def with_attention(**changes) -> NodeTable:
    """Errors and features of both parts, where layers of attention begin anew behind those of the MLPs."""
    columns = {
        "kind": [T, E, E, F, F, F, L],
        "part": [0, 0, 1, 0, 1, 1, 0],
        "layer": [-1, 1, 0, 1, 0, 1, 2],
        "position": [0, 0, 0, 0, 0, 0, 0],
        "index": [9, -1, -1, 3, 5, 3, 8],
    }
    return NodeTable.build(**{**columns, **changes})


def test_nodes_of_attention_come_behind_those_of_mlps() -> None:
    nodes = with_attention()
    assert nodes.part.dtype == np.int8
    assert nodes.of_attention.tolist() == [False, False, True, False, True, True, False]
    assert nodes.ids() == ("E_9_0", "1_-1_0", "A0_-1_0", "1_3_0", "A0_5_0", "A1_3_0", "3_8_0")
    assert not table().of_attention.any()
    # The same layer, position and index may stand once in each part.
    assert len(set(with_attention(layer=[-1, 0, 0, 1, 0, 1, 2]).ids())) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": [0, 1, 0, 0, 1, 1, 0]}, "given row 2 after row 1"),
        ({"part": [0, 0, 1, 1, 0, 1, 0]}, "given row 4 after row 3"),
        ({"layer": [-1, 1, 0, 1, 1, 0, 2]}, "given row 5 after row 4"),
        ({"layer": [-1, 1, 0, 1, 1, 1, 2]}, "given row 5 after row 4"),
        ({"part": [1, 0, 1, 0, 1, 1, 0]}, "expected only errors and features to be of attention, given 1 in row 0"),
        ({"part": [0, 0, 1, 0, 1, 1, 1]}, "expected only errors and features to be of attention, given 1 in row 6"),
    ],
)
def test_misplaced_nodes_of_attention_are_named(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        with_attention(**changes)


def test_differences_get_ids_of_their_own() -> None:
    nodes = NodeTable.build(
        kind=[E, L, L, L, L], layer=[0, 2, 2, 2, 2], position=[1, 1, 1, 0, 1], index=[-1, -1, -1, -1, 7]
    )
    assert nodes.ids() == ("0_-1_1", "3_-1_1", "3_-2_1", "3_-1_0", "3_7_1")


def test_build_fills_defaults_and_repeats_single_numbers() -> None:
    nodes = NodeTable.build(kind=T, position=[0, 1, 2], index=[5, 5, 5])
    assert nodes.kind.dtype == np.int8
    assert nodes.kind.tolist() == [0, 0, 0]
    assert nodes.layer.tolist() == [-1, -1, -1]
    assert nodes.label == ("", "", "")
    assert not nodes.expanded.any()
    assert nodes.expanded.dtype == np.bool_


def test_select_keeps_rows_and_order() -> None:
    nodes = table(label=list("abcdefg"))
    mask = np.array([True, False, False, True, False, True, True])
    kept = nodes.select(mask)
    assert kept.label == ("a", "d", "f", "g")
    assert kept.ids() == tuple(name for name, keep in zip(nodes.ids(), mask, strict=True) if keep)
    assert kept != nodes
    assert kept == nodes.select(mask)


def test_columns_cannot_be_written() -> None:
    nodes = table()
    with pytest.raises(ValueError, match="read-only"):
        nodes.layer[0] = 5


def test_callers_arrays_stay_writable() -> None:
    column = np.zeros(1)
    NodeTable.build(kind=[T], position=[0], value=column)
    column[0] = 1.0


def test_groups() -> None:
    nodes = table()
    assert np.flatnonzero(nodes.unexpanded).tolist() == [4]
    assert np.flatnonzero(nodes.is_target).tolist() == [6]
    assert np.flatnonzero(nodes.mask(NodeKind.TOKEN, NodeKind.ERROR)).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": [-1, -1, -1, 0, 1, 0, 2]}, r"given row 5 after row 4"),
        ({"kind": [T, P, T, E, F, F, L]}, r"given row 2 after row 1"),
        ({"position": [0, 0, 0, 1, 0, 1, 1]}, r"given row 1 after row 0"),
        ({"layer": [-1, -1, -1, 0, 1, 1, 2], "position": [0, 1, 0, 1, 1, 1, 1]}, r"given row 5 after row 4"),
        ({"kind": [T, T, P, E, F, F, 9]}, r"expected values 0 to 4, given 9 in row 6"),
        (
            {"value": [0, 0, 0, 0, 0, np.nan, 0]},
            r"NodeTable.value: expected finite numbers, given NaN or infinity in row 5",
        ),
        ({"inflow": [0, 0, 0, 0, 0, -1, 0]}, r"NodeTable.inflow: expected values >= 0, given -1.0 in row 5"),
        ({"expanded": [0, 0, 0, 1, 0, 1, 1]}, r"expected only features and logits to be expanded, given True in row 3"),
        ({"bias": [0.0, 0.0]}, r"NodeTable.bias: expected shape \(7,\) like the labels, given \(2,\)"),
        ({"colour": 1}, r"expected columns among kind, .*, given colour"),
    ],
)
def test_mistakes_are_named(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        table(**changes)


def test_a_logit_target_may_be_named_once() -> None:
    with pytest.raises(ValueError, match="expected each logit target once"):
        NodeTable.build(kind=[L, L], layer=2, position=1, index=[5, 5])


def test_wrong_dtype_is_named() -> None:
    columns = {name: getattr(table(), name) for name in table().__dataclass_fields__}
    with pytest.raises(ValueError, match=r"NodeTable.layer: expected an array of int32, given int64"):
        NodeTable(**{**columns, "layer": columns["layer"].astype(np.int64)})


def test_wrong_mask_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a bool mask of length 7, given int64\(7,\)"):
        table().select(np.ones(7, dtype=np.int64))
