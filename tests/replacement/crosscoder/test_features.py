"""The sparse table against dense activations."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from replacement.crosscoder.features import Features

SIZES = st.tuples(st.integers(1, 3), st.integers(0, 5), st.integers(1, 6))


def sparse_acts(sizes: tuple[int, int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sizes, generator=generator) * (torch.rand(sizes, generator=generator) < 0.4)


@given(SIZES, st.integers(0, 99))
def test_dense_inverts_from_dense(sizes: tuple[int, int, int], seed: int) -> None:
    acts_GBF = sparse_acts(sizes, seed)
    features = Features.from_dense(acts_GBF)
    assert len(features) == int((acts_GBF != 0).sum())
    for group, acts_BF in enumerate(acts_GBF):
        assert torch.equal(features.dense(group), acts_BF)


@given(SIZES, st.integers(0, 99))
def test_from_unsorted_sorts_any_order(sizes: tuple[int, int, int], seed: int) -> None:
    features = Features.from_dense(sparse_acts(sizes, seed))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    columns = [getattr(features, name)[order] for name in ("group", "row", "index", "activation")]
    again = Features.from_unsorted(*columns, n_rows=sizes[1], n_groups=sizes[0], n_features=sizes[2])
    for name in ("group", "row", "index", "activation"):
        assert torch.equal(getattr(again, name), getattr(features, name))


@given(SIZES, st.integers(0, 99))
def test_features_of_a_group_are_sorted_by_row_then_index(sizes: tuple[int, int, int], seed: int) -> None:
    acts_GBF = sparse_acts(sizes, seed)
    features = Features.from_dense(acts_GBF)
    for group, acts_BF in enumerate(acts_GBF):
        part = features.of(group)
        assert [part.row.tolist(), part.index.tolist()] == acts_BF.nonzero().T.tolist()


@given(SIZES, st.integers(0, 99))
def test_groups_concatenate_to_the_whole(sizes: tuple[int, int, int], seed: int) -> None:
    features = Features.from_dense(sparse_acts(sizes, seed))
    again = Features.concatenate([features.of(group) for group in range(sizes[0])])
    assert torch.equal(again.activation, features.activation)
    assert torch.equal(again.group, features.group)


def test_select_and_replace_keep_everything_else() -> None:
    features = Features.from_dense(sparse_acts((2, 4, 5), seed=0))
    strong = features.select(features.activation > 0.5)
    assert 0 < len(strong) < len(features)
    assert torch.equal(strong.dense(1), features.dense(1) * (features.dense(1) > 0.5))
    doubled = features.replace_activations(2 * features.activation)
    assert torch.equal(doubled.dense(0), 2 * features.dense(0))
    assert features.to(dtype=torch.float64).activation.dtype == torch.float64


def test_dense_is_differentiable() -> None:
    features = Features.from_dense(sparse_acts((2, 4, 5), seed=0))
    leaf_S = features.activation.clone().requires_grad_()
    weight_BF = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    (features.replace_activations(leaf_S).dense(1) * weight_BF).sum().backward()
    part = features.of(1)
    expected_S = torch.cat([torch.zeros(len(features.of(0))), weight_BF[part.row, part.index]])
    assert leaf_S.grad is not None
    assert torch.equal(leaf_S.grad, expected_S)


def test_no_features_at_all() -> None:
    features = Features.empty(n_rows=3, n_groups=2, n_features=4)
    assert len(features) == 0
    assert torch.equal(features.dense(0), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("group", "row", "index", "message"),
    [
        ([2, 0], [0, 0], [0, 1], "group must lie in 0 to 1, got 0 to 2"),
        ([0, 0], [0, 3], [0, 1], "row must lie in 0 to 2, got 0 to 3"),
        ([0, 0], [0, 0], [-1, 1], "index must lie in 0 to 3, got -1 to 1"),
        ([1, 1], [2, 2], [3, 3], "the same (group, row, index) is given twice"),
    ],
)
def test_bad_columns_are_refused(group: list[int], row: list[int], index: list[int], message: str) -> None:
    columns = (torch.tensor(column) for column in (group, row, index))
    with pytest.raises(ValueError, match=re.escape(message)):
        Features.from_unsorted(*columns, torch.ones(2), n_rows=3, n_groups=2, n_features=4)


def test_bad_concatenations_are_refused() -> None:
    features = Features.from_dense(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="nothing to concatenate"):
        Features.concatenate([])
    with pytest.raises(ValueError, match="the same n_rows, n_groups and n_features"):
        Features.concatenate([features.of(0), replace(features.of(1), n_rows=3)])
    for order in ([1, 0], [0, 0]):
        with pytest.raises(ValueError, match="distinct groups in ascending order"):
            Features.concatenate([features.of(group) for group in order])
