"""Activation functions against their dense definitions and, for thresholds, against numerical derivatives."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.activation_kinds import activation_from_dict
from replacement.crosscoder.topk import BatchTopK, TopK

ALL = [ReLU(), JumpReLU(), TopK(3), TopK(3, relu=False), BatchTopK(3)]


def dense(
    activation: Activation, pre_BF: Tensor, threshold_F: Tensor | None = None, *, training: bool = False
) -> Tensor:
    """What the sparse path amounts to, as a dense matrix."""
    rows, indices = activation.select(pre_BF, threshold_F, training=training)
    threshold_S = None if threshold_F is None else threshold_F.expand(pre_BF.shape[1])[indices]
    return torch.zeros_like(pre_BF).index_put((rows, indices), activation.values(pre_BF[rows, indices], threshold_S))


def random_pre(n_rows: int, n_features: int, seed: int) -> Tensor:
    return torch.randn(n_rows, n_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 6), st.integers(1, 12), st.integers(0, 99))
def test_relu(n_rows: int, n_features: int, seed: int) -> None:
    pre_BF = random_pre(n_rows, n_features, seed)
    assert torch.equal(dense(ReLU(), pre_BF), pre_BF.clamp(min=0))


@given(st.integers(0, 6), st.integers(1, 12), st.integers(0, 99))
def test_jumprelu(n_rows: int, n_features: int, seed: int) -> None:
    pre_BF = random_pre(n_rows, n_features, seed)
    threshold_F = random_pre(1, n_features, seed + 1)[0]  # of either sign
    expected_BF = pre_BF * (pre_BF > threshold_F)
    for training in (False, True):
        assert torch.equal(dense(JumpReLU(), pre_BF, threshold_F, training=training), expected_BF)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 99), st.data())
def test_topk_keeps_the_k_largest_where_positive(n_rows: int, n_features: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n_features))
    pre_BF = random_pre(n_rows, n_features, seed)
    rank_BF = pre_BF.argsort(dim=1, descending=True).argsort(dim=1)
    assert torch.equal(dense(TopK(k), pre_BF), pre_BF.clamp(min=0) * (rank_BF < k))


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 99), st.data())
def test_topk_without_relu_keeps_exactly_k(n_rows: int, n_features: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n_features))
    pre_BF = random_pre(n_rows, n_features, seed) - 1
    rank_BF = pre_BF.argsort(dim=1, descending=True).argsort(dim=1)
    assert torch.equal(dense(TopK(k, relu=False), pre_BF), pre_BF * (rank_BF < k))
    assert torch.bincount(TopK(k, relu=False).select(pre_BF, None).rows, minlength=n_rows).tolist() == [k] * n_rows


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_topk_of_all_features_is_relu(n_rows: int, n_features: int, seed: int) -> None:
    pre_BF = random_pre(n_rows, n_features, seed)
    assert torch.equal(dense(TopK(n_features), pre_BF), dense(ReLU(), pre_BF))


@given(st.integers(1, 6), st.integers(4, 12), st.integers(0, 99))
def test_batchtopk_keeps_the_largest_of_the_batch(n_rows: int, n_features: int, seed: int) -> None:
    pre_BF = random_pre(n_rows, n_features, seed)
    rank = pre_BF.flatten().argsort(descending=True).argsort().view_as(pre_BF)
    expected_BF = pre_BF.clamp(min=0) * (rank < 2 * n_rows)
    assert torch.equal(dense(BatchTopK(2), pre_BF, torch.zeros(1), training=True), expected_BF)


def test_batchtopk_uses_its_threshold_at_inference() -> None:
    pre_BF = torch.tensor([[0.1, 0.6, -1.0], [0.9, 0.8, 0.7]])
    assert torch.equal(dense(BatchTopK(1), pre_BF, torch.tensor([0.5])), pre_BF * (pre_BF > 0.5))


def test_batchtopk_threshold_is_a_running_mean_that_starts_at_the_first_batch() -> None:
    function = BatchTopK(1, momentum=0.25)
    threshold = function.next_threshold(torch.zeros(1), torch.tensor([3.0, 2.0]))
    assert threshold.tolist() == [2.0]
    threshold = function.next_threshold(threshold, torch.tensor([6.0]))
    assert threshold.tolist() == [3.0]
    assert function.next_threshold(threshold, torch.empty(0)).tolist() == [3.0]


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_selections_are_sorted_by_row_then_index(activation: Activation) -> None:
    pre_BF = random_pre(9, 11, seed=3)
    threshold_GF = activation.initial_threshold(1, 11)
    threshold_F = None if threshold_GF is None else threshold_GF[0]
    for training in (False, True):
        rows, indices = activation.select(pre_BF, threshold_F, training=training)
        key = rows * 11 + indices
        assert bool((key[1:] > key[:-1]).all())


def test_jumprelu_threshold_gradient_is_that_of_a_smoothed_step() -> None:
    """The rule is the exact expected derivative where pre-activations are uniform around the threshold."""
    function, theta = JumpReLU(bandwidth=0.2), 0.5
    pre_S = torch.linspace(0.1, 0.9, 200_001, dtype=torch.float64)  # density 1 / 0.8
    threshold_S = torch.full_like(pre_S, theta).requires_grad_()
    function.values(pre_S, threshold_S).mean().backward()
    assert threshold_S.grad is not None
    step = 1e-3
    above, below = (float((pre_S * (pre_S > t)).mean()) for t in (theta + step, theta - step))
    torch.testing.assert_close(float(threshold_S.grad.sum()), (above - below) / (2 * step), rtol=1e-2, atol=0)


def test_jumprelu_training_selects_the_window_below_the_threshold() -> None:
    pre_BF = torch.tensor([[0.39, 0.41, 0.49, 0.6]])
    function, threshold_F = JumpReLU(bandwidth=0.2), torch.full((4,), 0.5)
    assert function.select(pre_BF, threshold_F).indices.tolist() == [3]
    assert function.select(pre_BF, threshold_F, training=True).indices.tolist() == [1, 2, 3]


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_activations_survive_json(activation: Activation) -> None:
    assert activation_from_dict(json.loads(json.dumps(activation.to_dict()))) == activation


def test_options_that_came_later_leave_no_trace_at_their_default() -> None:
    """Digests of older checkpoints are those of their configuration."""
    assert TopK(3).to_dict() == {"name": "topk", "k": 3}
    assert JumpReLU().to_dict() == {"name": "jumprelu", "threshold": 0.03, "bandwidth": 0.03}
    assert ReLU().to_dict() == {"name": "relu"}
    assert TopK(3, relu=False).to_dict() == {"name": "topk", "k": 3, "relu": False}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "gelu"}, "unknown activation 'gelu': expected one of relu, jumprelu, topk, batchtopk, jointtopk"),
        ({"name": "topk"}, "activation topk has the parameters ['affine', 'k', 'relu', 'scored'], got []"),
        ({"name": "topk", "k": 3, "relu": "no"}, "relu of topk must be true or false, got 'no'"),
        ({"name": "relu", "k": 3}, "activation relu has the parameters ['affine'], got ['k']"),
        ({"name": "topk", "k": 0}, "k must be 1 or more, got 0"),
        ({"name": "batchtopk", "k": 1, "momentum": 0.0}, "momentum must be above 0, got 0.0"),
        ({"name": "topk", "k": True}, "k must be a whole number, got True"),
        ({"name": "topk", "k": []}, "k must be a whole number, or one for each group; got ()"),
        ({"name": "topk", "k": 10**30}, "k must be below 2^63, got 1000"),
        ({"name": "batchtopk", "k": 1, "momentum": 1.5}, "momentum must be at most 1, got 1.5"),
        ({"name": "jumprelu", "threshold": 1e38}, "threshold must be at most 1e+18, got 1e+38"),
        ({"name": "jumprelu", "threshold": float("nan")}, "threshold must be 0 or more, got nan"),
        ({"name": "jumprelu", "bandwidth": float("inf")}, "bandwidth must be at most 1e+18, got inf"),
        ({"name": ["topk"]}, "unknown activation ['topk']: expected one of"),
        ({"name": "jumprelu", "threshold": -0.1}, "threshold must be 0 or more, got -0.1"),
        ({"name": "jumprelu", "bandwidth": 0.0}, "bandwidth must be above 0, got 0.0"),
    ],
)
def test_bad_activations_are_refused(value: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        activation_from_dict(value)


def test_topk_may_keep_another_number_in_every_group() -> None:
    activation = activation_from_dict({"name": "topk", "k": [3, 1]})
    assert activation == TopK((3, 1))
    pre_BF = torch.tensor([[4.0, 3.0, 2.0, 1.0], [-1.0, 5.0, -2.0, 6.0]])
    assert activation.select(pre_BF, None, group=0).indices.tolist() == [0, 1, 2, 1, 3]
    assert activation.select(pre_BF, None, group=1).indices.tolist() == [0, 3]
    with pytest.raises(ValueError, match="topk has k for 2 groups, the wiring has 3"):
        activation.check_fits(3, 4)
    with pytest.raises(ValueError, match="keeps k=3 features, but a group has only 2"):
        activation.check_fits(2, 2)
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        TopK((3, 0))
