"""Fidelity metrics against numpy and torch.distributions in fp64."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from replacement.crosscoder.features import Features
from replacement.validation.fidelity_metrics import (
    Mean,
    VarianceUnexplained,
    fraction_of_variance_unexplained,
    kl_divergence,
    l0,
    next_token_loss,
    top1_agreement,
)


def random_pair(n_rows: int, width: int, seed: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target_BD = torch.randn(n_rows, width, dtype=torch.float64, generator=generator) + offset
    return target_BD, target_BD + 0.3 * torch.randn(n_rows, width, dtype=torch.float64, generator=generator)


@given(st.integers(2, 20), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 1e4]))
def test_variance_unexplained_equals_numpy(n_rows: int, width: int, seed: int, offset: float) -> None:
    target_BD, reconstruction_BD = random_pair(n_rows, width, seed, offset)
    y, y_hat = target_BD.numpy(), reconstruction_BD.numpy()
    expected = ((y - y_hat) ** 2).sum() / (n_rows * y.var(axis=0)).sum()
    assert fraction_of_variance_unexplained(target_BD, reconstruction_BD) == pytest.approx(expected, rel=1e-9)


@given(st.integers(2, 20), st.integers(1, 19), st.integers(0, 99))
def test_batches_add_up_to_the_whole(n_rows: int, cut: int, seed: int) -> None:
    target_BD, reconstruction_BD = random_pair(n_rows, 3, seed)
    stream = VarianceUnexplained()
    for part in (slice(0, cut), slice(cut, None)):
        stream.update(target_BD[part], reconstruction_BD[part])
    assert stream.value() == pytest.approx(fraction_of_variance_unexplained(target_BD, reconstruction_BD), rel=1e-9)


def test_the_mean_leaves_all_variance_unexplained() -> None:
    target_BD, _ = random_pair(10, 4, seed=0, offset=3.0)
    mean_BD = target_BD.mean(dim=0).expand_as(target_BD)
    assert fraction_of_variance_unexplained(target_BD, mean_BD) == pytest.approx(1, rel=1e-12)
    assert fraction_of_variance_unexplained(target_BD, target_BD) == 0


@given(st.integers(1, 8), st.integers(2, 9), st.integers(0, 99))
def test_kl_equals_torch_distributions(n_rows: int, n_tokens: int, seed: int) -> None:
    p_BV, q_BV = random_pair(n_rows, n_tokens, seed)
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (p_BV, q_BV))
    expected_B = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(kl_divergence(p_BV, q_BV), expected_B, rtol=1e-9, atol=1e-12)
    assert bool((kl_divergence(p_BV, p_BV + 5) < 1e-12).all())  # logits are defined up to a constant


def test_next_token_loss_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator)
    tokens_BT = torch.randint(7, (3, 5), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:], reduction="none")
    torch.testing.assert_close(next_token_loss(logits_BTV, tokens_BT), expected)
    assert next_token_loss(logits_BTV[:, :1], tokens_BT[:, :1]).shape == (3, 0)


def test_kl_ignores_tokens_the_original_excludes() -> None:
    p_V, q_V = torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([0.0, 0.0, 0.0])
    assert float(kl_divergence(p_V, q_V)) == pytest.approx(np.log(1.5), rel=1e-6)


def test_agreement_counts_confident_tokens_only() -> None:
    logits_p = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.2, 0.1, 0.0]])
    logits_q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert top1_agreement(logits_p, logits_q) == (1, 2)
    assert top1_agreement(logits_p, logits_q).rate == 0.5
    assert top1_agreement(logits_p, logits_q, min_probability=0.0) == (1, 3)
    assert np.isnan(top1_agreement(logits_p[2:], logits_q[2:]).rate)


def test_l0_counts_active_features_per_row_and_group() -> None:
    acts_GBF = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]]])
    assert l0(Features.from_dense(acts_GBF)).tolist() == [1.0, 0.5]


def test_mean_over_batches() -> None:
    assert Mean().update(torch.tensor([1.0, 2.0])).update(torch.tensor([[6.0]])).value() == 3.0


ONES = torch.ones(3, 2)
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: fraction_of_variance_unexplained(ONES, torch.ones(3, 4)), "one shape, got [3, 2] and [3, 4]"),
    (lambda: kl_divergence(ONES, torch.ones(2, 2)), "one shape, got [3, 2] and [2, 2]"),
    (lambda: top1_agreement(ONES, torch.ones(2, 2)), "one shape, got [3, 2] and [2, 2]"),
    (lambda: top1_agreement(ONES, ONES, min_probability=1.5), "min_probability must lie between 0 and 1, got 1.5"),
    (
        lambda: next_token_loss(torch.ones(2, 3, 4), torch.ones(2, 2, dtype=torch.int64)),
        "expected logits of [2, 2] tokens, got [2, 3]",
    ),
    (lambda: fraction_of_variance_unexplained(ONES, ONES), "the target does not vary over the rows"),
    (lambda: VarianceUnexplained().value(), "needs at least one row, got none"),
    (
        lambda: VarianceUnexplained().update(ONES, ONES).update(torch.ones(3, 4), torch.ones(3, 4)),
        "expected width 2 as before, got 4",
    ),
    (lambda: Mean().value(), "the mean needs at least one value, got none"),
    (lambda: l0(Features.empty(n_rows=0, n_groups=1, n_features=1)), "l0 needs at least one row"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mistake()
