"""Lifetimes by brute force, correlations and linear fits by general solvers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.wiring import Wiring
from replacement.validation.across_models import (
    activation_correlations,
    decoder_cosines,
    decoder_norms_by_model,
    lifetimes,
    readability,
    spread,
)

SHAPE, WIDE = (ModelShape(n_layers=2, d_model=d, n_heads=1, d_head=d) for d in (6, 8))


@given(
    arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
    )
)
def test_lifetimes_equal_a_walk_from_the_peak(norms: np.ndarray) -> None:
    found = lifetimes(torch.from_numpy(norms))
    for feature, row in enumerate(norms):
        born = died = int(row.argmax())
        while born > 0 and row[born - 1] >= 0.5 * row.max():
            born -= 1
        while died < len(row) and row[died] >= 0.5 * row.max():
            died += 1
        if not row.any():
            born = len(row)
        assert (int(found.born_F[feature]), int(found.died_F[feature])) == (born, died)


def test_norms_are_in_units_of_each_model_and_cosines_of_its_neighbours(
    random_crosscoder: Callable[..., Crosscoder],
) -> None:
    wiring = Wiring.model_diffing([SHAPE] * 3, layer=[1, 0, 1])
    crosscoder, (a, b, c) = random_crosscoder(wiring), wiring.writes[0]
    norms_FM = decoder_norms_by_model(crosscoder, {a: 1.0, b: 2.0, c: 4.0})
    for place, (site, size) in enumerate(((a, 1.0), (b, 2.0), (c, 4.0))):
        torch.testing.assert_close(norms_FM[:, place], crosscoder.decoder(0, site).detach().norm(dim=1) / size)
    with torch.no_grad():
        crosscoder.decoder(0, b).copy_(-3 * crosscoder.decoder(0, a))
    cosines_FM = decoder_cosines(crosscoder)
    assert cosines_FM.shape == (16, 2)
    torch.testing.assert_close(cosines_FM[:, 0], torch.full((16,), -1.0, dtype=torch.float64))


def test_spread_is_the_distance_from_the_mean() -> None:
    assert spread(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]) + 7) == pytest.approx(5.0)


def test_correlations_equal_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, n, generator=generator).relu().double() for n in (3, 4))
    first[:, 1] = 0
    found = activation_correlations(first, second)
    expected = np.corrcoef(torch.cat([first[:, [0, 2]], second], dim=1).T)[:2, 2:]
    torch.testing.assert_close(found[[0, 2]], torch.from_numpy(expected))
    assert not found[1].any()


def test_readability_equals_least_squares_and_knows_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(400, 5, generator=generator, dtype=torch.float64) + 3
    noise_N = torch.randn(400, generator=generator, dtype=torch.float64)
    acts_NF = torch.stack(
        [x_ND @ torch.arange(5.0).double() + 1, noise_N, x_ND[:, 0] + noise_N, torch.zeros(400)], dim=1
    )
    found = readability(x_ND, acts_NF, ridge=0.0)
    design_NX = torch.cat([x_ND, torch.ones(400, 1)], dim=1)
    weights = torch.linalg.lstsq(design_NX[:200], acts_NF[:200]).solution
    error_F = (acts_NF[200:] - design_NX[200:] @ weights).square().sum(dim=0)
    total_F = (acts_NF[200:] - acts_NF[200:].mean(dim=0)).square().sum(dim=0)
    torch.testing.assert_close(found[:3], (1 - error_F / total_F)[:3])
    assert float(found[0]) == pytest.approx(1.0)
    assert float(found[1]) < 0.1 < 0.3 < float(found[2]) < 0.7
    assert bool(found[3].isnan())


def test_snapshots_of_different_shapes_and_other_wirings_are_refused(
    random_crosscoder: Callable[..., Crosscoder],
) -> None:
    crosscoder = random_crosscoder(Wiring.model_diffing([SHAPE, WIDE], layer=0))
    message = r"snapshots of one shape, got widths resid_post\.0 6, resid_post\.0@1 8"
    with pytest.raises(ValueError, match=message):
        decoder_cosines(crosscoder)
    with pytest.raises(ValueError, match="expected a model-diffing crosscoder, got one of wiring acausal"):
        decoder_norms_by_model(random_crosscoder(Wiring.acausal(SHAPE)), {})
