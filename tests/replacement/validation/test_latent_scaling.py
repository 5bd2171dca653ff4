"""Latent scaling against brute-force least squares, and on features known to be shared, shrunk or new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from replacement.crosscoder.activation import ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring
from replacement.validation.latent_scaling import latent_scaling, relative_decoder_norms

SHAPE = ModelShape(n_layers=3, d_model=8, n_heads=2, d_head=5)
WIRING = Wiring.model_diffing(SHAPE, layer=1)
FIRST, SECOND = WIRING.write_sites


def least_squares(f_N: Tensor, d_D: Tensor, y_ND: Tensor) -> float:
    """Scale b that minimises `||y - b f d||`, from a general solver."""
    column = torch.outer(f_N, d_D).reshape(-1, 1)
    return float(torch.linalg.lstsq(column, y_ND.reshape(-1, 1)).solution)


@pytest.mark.parametrize("undecomposed", [0, 2])
def test_scales_equal_brute_force_least_squares(
    random_crosscoder: Callable[..., Crosscoder], random_inputs: Callable[..., Any], undecomposed: int
) -> None:
    crosscoder = random_crosscoder(WIRING, activation=TopK(5), undecomposed_positions=undecomposed)
    parts = [random_inputs(WIRING, n_rows=n, seed=n) for n in (11, 6)]
    found = latent_scaling(crosscoder.train(), parts)
    assert crosscoder.training
    crosscoder.eval()
    whole = {site: torch.cat([part[site] for part in parts]) for site in (FIRST, SECOND)}
    features = crosscoder.encode(whole, positions=torch.full((17,), undecomposed))
    f_NF = torch.zeros(17, 16, dtype=torch.float64)
    f_NF[features.row, features.index] = features.activation.detach()
    d_FD = crosscoder.decoder(0, SECOND).detach()
    for model, site in enumerate((FIRST, SECOND)):
        own_FD = crosscoder.decoder(0, site).detach()
        for j in torch.nonzero(f_NF.any(dim=0))[:, 0].tolist():
            others_F = torch.arange(16) != j
            rest_ND = whole[site] - crosscoder.decoder_bias(site).detach() - f_NF[:, others_F] @ own_FD[others_F]
            assert float(found.beta_error[model][j]) == pytest.approx(least_squares(f_NF[:, j], d_FD[j], rest_ND))
            scale = least_squares(f_NF[:, j], d_FD[j], f_NF @ own_FD)
            assert float(found.beta_reconstruction[model][j]) == pytest.approx(scale)
    assert torch.equal(found.fired, (f_NF > 0).sum(dim=0).double())
    silent_F = ~f_NF.any(dim=0)
    assert bool(found.nu_error[silent_F].isnan().all())
    assert not bool(found.is_exclusive()[silent_F].any())


def known_case() -> tuple[Crosscoder, dict[Site, Tensor]]:
    """Four independent features that fire at random, and what the crosscoder makes of each in the first model.

    0 is in both models and written to both; 1 is in both but shrunk to nothing in the first model; 2 is in both but written
    to the first model by its twin 3, which fires with it; 4 is in the second model alone.
    """
    generator = torch.Generator().manual_seed(0)
    f_NF = torch.rand(400, 5, generator=generator, dtype=torch.float64)
    f_NF *= torch.rand(400, 5, generator=generator, dtype=torch.float64) < 0.3
    f_NF[:, 3] = f_NF[:, 2]
    directions_FD = torch.eye(5, 8, dtype=torch.float64)
    directions_FD[3] = directions_FD[2]
    crosscoder = Crosscoder(WIRING, n_features=5, activation=ReLU(), dtype=torch.float64, seed=0)
    written = {FIRST: [1.0, 0, 0, 1.0, 0], SECOND: [1.0, 1.0, 1.0, 0, 1.0]}
    present = {FIRST: [1.0, 1.0, 1.0, 0, 0], SECOND: [1.0, 1.0, 1.0, 0, 1.0]}
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.zero_()
        for site, scales in written.items():
            crosscoder.decoder(0, site).copy_(directions_FD * torch.tensor(scales, dtype=torch.float64)[:, None])
        crosscoder.encoder(0, SECOND).copy_(directions_FD)
        inputs = {site: (f_NF * torch.tensor(scales)) @ directions_FD for site, scales in present.items()}
    return crosscoder, inputs


def test_known_features_are_told_apart() -> None:
    crosscoder, inputs = known_case()
    norms = relative_decoder_norms(crosscoder)
    assert norms[[1, 2, 4]].tolist() == [1.0, 1.0, 1.0]
    assert norms[[0, 3]].tolist() == [0.5, 0.0]
    found = latent_scaling(crosscoder, [inputs])
    assert found.nu_error[[0, 1, 4]].tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert found.nu_reconstruction[[0, 1, 2, 4]].tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])
    assert found.is_exclusive().tolist() == [False, False, False, False, True]
    assert found.is_exclusive(max_nu_error=2.0).tolist() == [False, True, False, False, True]


def test_other_wirings_and_no_tokens_are_refused(random_crosscoder: Callable[..., Crosscoder]) -> None:
    acausal = random_crosscoder(Wiring.acausal(SHAPE))
    for call in (relative_decoder_norms, lambda crosscoder: latent_scaling(crosscoder, [])):
        with pytest.raises(ValueError, match="expected a model-diffing crosscoder, got one of wiring acausal"):
            call(acausal)
    with pytest.raises(ValueError, match="at least one token"):
        latent_scaling(random_crosscoder(WIRING), [])
    with pytest.raises(ValueError, match="reads"):
        latent_scaling(random_crosscoder(WIRING), [{FIRST: torch.zeros(2, 8, dtype=torch.float64)}])


def test_any_two_of_many_models_of_one_width_are_compared(
    random_crosscoder: Callable[..., Crosscoder], random_inputs: Callable[..., Any]
) -> None:
    """A crosscoder that reads as before, and writes to a wider model besides, has the same scales."""
    wide = ModelShape(n_layers=3, d_model=12, n_heads=2, d_head=6)
    three = Wiring.model_diffing([SHAPE, wide, SHAPE], layer=1)
    crosscoder, inputs = random_crosscoder(three, activation=TopK(5)), random_inputs(three)
    two = random_crosscoder(WIRING, activation=TopK(5))
    first, middle, last = three.writes[0]
    with torch.no_grad():
        crosscoder.encoder(0, middle).zero_()
        for mine, old in ((first, FIRST), (last, SECOND)):
            two.encoder(0, old).copy_(crosscoder.encoder(0, mine))
            two.decoder(0, old).copy_(crosscoder.decoder(0, mine))
            two.decoder_bias(old).copy_(crosscoder.decoder_bias(mine))
        two.b_enc[0].copy_(crosscoder.b_enc[0])
    found = latent_scaling(crosscoder, [inputs], models=(0, 2))
    expected = latent_scaling(two, [{FIRST: inputs[first], SECOND: inputs[last]}])
    torch.testing.assert_close(found, expected, equal_nan=True)
    swapped = latent_scaling(crosscoder, [inputs], models=(2, 0))
    assert not torch.equal(swapped.nu_error, found.nu_error)
    norms = relative_decoder_norms(crosscoder, models=(0, 2))
    torch.testing.assert_close(norms, relative_decoder_norms(two))
    with pytest.raises(ValueError, match=r"models of one width, got resid_post\.1 8 and resid_post\.1@1 12"):
        latent_scaling(crosscoder, [inputs], models=(0, 1))
    with pytest.raises(ValueError, match="the crosscoder has no model 3: it has 0, 1, 2"):
        relative_decoder_norms(crosscoder, models=(0, 3))
