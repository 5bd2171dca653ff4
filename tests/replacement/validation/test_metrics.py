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

from replacement.validation.metrics import RELATIVE_ERROR, LogHistogram, Mean, ReconstructionError, kl_divergence


def random_pair(n_rows: int, width: int, seed: int, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target_BD = torch.randn(n_rows, width, dtype=torch.float64, generator=generator) + offset
    return target_BD, target_BD + 0.3 * torch.randn(n_rows, width, dtype=torch.float64, generator=generator)


@given(st.integers(2, 20), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 1e4]))
def test_variance_unexplained_equals_numpy(n_rows: int, width: int, seed: int, offset: float) -> None:
    target_BD, reconstruction_BD = random_pair(n_rows, width, seed, offset)
    y, y_hat = target_BD.numpy(), reconstruction_BD.numpy()
    expected = ((y - y_hat) ** 2).sum() / (n_rows * y.var(axis=0)).sum()
    assert ReconstructionError().update(target_BD, reconstruction_BD).unexplained == pytest.approx(expected, rel=1e-9)


@given(st.integers(2, 20), st.integers(1, 19), st.integers(0, 99))
def test_batches_add_up_to_the_whole(n_rows: int, cut: int, seed: int) -> None:
    target_BD, reconstruction_BD = random_pair(n_rows, 3, seed)
    stream, whole = ReconstructionError(), ReconstructionError().update(target_BD, reconstruction_BD)
    for part in (slice(0, cut), slice(cut, None)):
        stream.update(target_BD[part], reconstruction_BD[part])
    assert stream.unexplained == pytest.approx(whole.unexplained, rel=1e-9)
    torch.testing.assert_close(stream.mean, target_BD.mean(dim=0))
    cosine_B = torch.nn.functional.cosine_similarity(target_BD, reconstruction_BD)
    assert stream.cosine.value() == pytest.approx(float(cosine_B.mean()), rel=1e-9)


def test_the_mean_leaves_all_variance_unexplained() -> None:
    target_BD, _ = random_pair(10, 4, seed=0, offset=3.0)
    mean_BD = target_BD.mean(dim=0).expand_as(target_BD)
    assert ReconstructionError().update(target_BD, mean_BD).unexplained == pytest.approx(1, rel=1e-12)
    assert ReconstructionError().update(target_BD, target_BD).unexplained == 0


def test_without_variation_or_values_there_is_no_figure() -> None:
    ones_BD = torch.ones(3, 2)
    assert ReconstructionError().unexplained is None
    assert ReconstructionError().update(ones_BD, 2 * ones_BD).unexplained is None
    assert Mean().value() is None


@given(st.integers(1, 8), st.integers(2, 9), st.integers(0, 99))
def test_kl_equals_torch_distributions(n_rows: int, n_tokens: int, seed: int) -> None:
    p_BV, q_BV = random_pair(n_rows, n_tokens, seed)
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (p_BV, q_BV))
    expected_B = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(kl_divergence(p_BV, q_BV), expected_B, rtol=1e-9, atol=1e-12)
    assert bool((kl_divergence(p_BV, p_BV + 5) < 1e-12).all())  # logits are defined up to a constant


def test_kl_of_single_precision_logits_is_computed_in_double() -> None:
    p_BV, q_BV = (logits.float() for logits in random_pair(20, 50, seed=0))
    expected_B = kl_divergence(p_BV.double(), q_BV.double())
    assert kl_divergence(p_BV, q_BV).dtype == torch.float64
    assert torch.equal(kl_divergence(p_BV, q_BV), expected_B)
    torch.testing.assert_close(kl_divergence(p_BV, q_BV, dtype=torch.float32), expected_B.float(), rtol=1e-3, atol=1e-5)


def test_the_gradient_of_kl_is_the_difference_of_probabilities() -> None:
    p_BV, q_BV = random_pair(4, 6, seed=1)
    p_BV[:, 2] = q_BV[:, 2] = -torch.inf
    q_BV.requires_grad_()
    (gradient_BV,) = torch.autograd.grad(kl_divergence(p_BV, q_BV).sum(), q_BV)
    torch.testing.assert_close(gradient_BV, q_BV.softmax(-1) - p_BV.softmax(-1))


def test_one_distribution_against_many() -> None:
    p_BV, q_BV = random_pair(5, 7, seed=2)
    expected_B = torch.stack([kl_divergence(p_BV[0], q_V) for q_V in q_BV])
    torch.testing.assert_close(kl_divergence(p_BV[0], q_BV), expected_B, rtol=1e-12, atol=1e-15)


def test_tokens_that_are_ruled_out() -> None:
    """Logits of -inf cost nothing where p rules the token out too, and an infinite KL elsewhere, however unlikely it is."""
    p_V = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    assert float(kl_divergence(p_V, torch.tensor([0.0, 0.0, 0.0, -torch.inf]))) == pytest.approx(np.log(1.5), rel=1e-6)
    assert float(kl_divergence(torch.tensor([0.0, -700.0]), torch.tensor([0.0, -torch.inf]))) == np.inf


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.95, 0.99, 1.0])
def test_quantiles_equal_numpy_to_a_bin(share: float) -> None:
    values = np.random.default_rng(0).lognormal(-6, 3, 5000)
    histogram = LogHistogram()
    for some in np.array_split(values, 7):
        histogram.update(torch.from_numpy(some))
    expected = np.quantile(values, share, method="inverted_cdf")
    assert histogram.quantile(share) == pytest.approx(expected, rel=RELATIVE_ERROR)
    assert histogram.mean == pytest.approx(values.mean())
    assert histogram.maximum == values.max()


def test_mean_over_batches() -> None:
    assert Mean().update(torch.tensor([1.0, 2.0])).update(torch.tensor([[6.0]])).value() == 3.0


ONES = torch.ones(3, 2)
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: kl_divergence(ONES, torch.ones(2, 2)), "one shape, got [3, 2] and [2, 2]"),
    (lambda: LogHistogram().update(torch.tensor([0.1, torch.nan])), "logits that are not finite on this data"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mistake()
