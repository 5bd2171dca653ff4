"""Features that begin at tokens of the data: what they detect and write before any training."""

from __future__ import annotations

import pytest
import torch

from replacement import Crosscoder, TopK
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.wiring import Wiring
from replacement.training import CrosscoderConfig, TrainingConfig
from replacement.training.sample_start import THRESHOLD, start_at_samples
from replacement.training.scaling import Batch, measure, scaled
from replacement.training.trainer import Trainer

D, KINDS = 32, 6
SHAPE = ModelShape(n_layers=1, d_model=D, n_heads=2, d_head=D // 2)
WIRING = Wiring.transcoder(SHAPE, layer=0)


def batches(n_tokens: int = 600) -> list[Batch]:
    """Tokens of a few well separated kinds; inputs and outputs of one kind differ a little."""
    generator = torch.Generator().manual_seed(0)
    kind_B = torch.arange(n_tokens) % KINDS
    result = {}
    for site in (*WIRING.read_sites, *WIRING.write_sites):
        centre_KD = torch.randn(KINDS, D, generator=generator)
        result[site] = centre_KD[kind_B] + 0.01 * torch.randn(n_tokens, D, generator=generator)
    return [result]


def started(n_features: int, n_tokens: int = 600) -> tuple[Crosscoder, Batch]:
    crosscoder = Crosscoder(WIRING, n_features=n_features, activation=TopK(3))
    rows = batches(n_tokens)
    statistics = measure(crosscoder, rows)
    Trainer(crosscoder, TrainingConfig(n_tokens=64, batch_tokens=64), statistics)
    start_at_samples(crosscoder, statistics, rows, seed=0)
    return crosscoder.eval(), scaled(crosscoder, rows[0], statistics)


def test_far_kinds_are_chosen_first_and_reconstructed() -> None:
    crosscoder, rows = started(KINDS)
    features = crosscoder.encode({site: rows[site] for site in WIRING.read_sites})
    kinds = [set((features.row[features.index == feature] % KINDS).tolist()) for feature in range(KINDS)]
    assert sorted(map(len, kinds)) == [1] * KINDS  # every feature fires for one kind alone
    assert len(set.union(*kinds)) == KINDS
    (site,) = WIRING.write_sites
    written = crosscoder.decode(features)[site].detach()
    assert float((written - rows[site]).square().sum() / (rows[site] - rows[site].mean(0)).square().sum()) < 0.01


def test_activation_on_the_sampled_token_is_known() -> None:
    crosscoder, rows = started(KINDS)
    features = crosscoder.encode({site: rows[site] for site in WIRING.read_sites})
    assert float(features.activation.detach().max()) == pytest.approx((1 - THRESHOLD) * D**0.5, rel=0.1)


def test_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="needs as many tokens as features: expected 64, got 50"):
        started(64, n_tokens=50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "zeros"}, "start must be one of random, samples, heads, or the folder of a crosscoder, got 'zeros'"),
        ({"start": "samples", "tied": True}, "start='samples' needs decoders of each group's own, got tied=true"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrosscoderConfig(**settings)  # type: ignore[arg-type]
