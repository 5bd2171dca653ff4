"""Conversion to JumpReLU: the same function where a threshold was recorded, the wanted L0 where one is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from replacement import BatchTopK, Crosscoder, JumpReLU, ReLU, Site, TopK, Wiring, checkpoint
from replacement.crosscoder.activation import Activation
from replacement.crosscoder.jumprelu import quantile_thresholds, to_jumprelu
from replacement.crosscoder.sites import ModelShape

SHAPE = ModelShape(n_layers=3, d_model=8, n_heads=2, d_head=5)


def l0_by_group(crosscoder: Crosscoder, batches: Sequence[dict[Site, Tensor]]) -> list[float]:
    """Mean number of active features per row, counted from dense pre-activations and the threshold itself."""
    counts = []
    for group in range(crosscoder.n_groups):
        pre = torch.cat([crosscoder.pre_activations(batch, group) for batch in batches])
        counts.append(float((pre > crosscoder.threshold[group]).sum(1).double().mean()))
    return counts


def test_a_recorded_threshold_is_kept_and_the_function_with_it(random_crosscoder: Any, random_inputs: Any) -> None:
    wiring = Wiring.strictly_causal(SHAPE)
    crosscoder = random_crosscoder(wiring, activation=BatchTopK(3), skip=True, undecomposed_positions=1, n_features=32)
    converted = to_jumprelu(crosscoder)
    assert isinstance(converted.activation, JumpReLU)
    assert not converted.training
    torch.testing.assert_close(converted.threshold.detach(), crosscoder.threshold.expand(3, 32), rtol=0, atol=0)
    inputs = random_inputs(wiring, n_rows=50)
    ours, theirs = converted(inputs), crosscoder(inputs)
    assert 0 < len(theirs.features) < 50 * 3 * 32
    for site, y_BD in theirs.reconstructions.items():
        torch.testing.assert_close(ours.reconstructions[site], y_BD, rtol=0, atol=0)
    assert isinstance(crosscoder.activation, BatchTopK)  # the original is left alone
    with torch.no_grad():
        converted.W_enc[0].zero_()
    assert bool(crosscoder.W_enc[0].any())


@pytest.mark.parametrize(
    ("activation", "target", "expected"),
    [
        (BatchTopK(3), None, [3, 3, 3]),
        (TopK(4), None, [4, 4, 4]),
        (TopK((1, 2, 5)), None, [1, 2, 5]),
        (TopK(4), 2.5, [2.5, 2.5, 2.5]),
        (ReLU(), [0.5, 1.0, 8.0], [0.5, 1, 8]),
        (JumpReLU(), 3, [3, 3, 3]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_measured_thresholds_give_every_group_its_l0(
    random_crosscoder: Any, random_inputs: Any, activation: Activation, target: Any, expected: list[float], dtype: Any
) -> None:
    wiring = Wiring.strictly_causal(SHAPE)
    crosscoder = random_crosscoder(wiring, activation=activation, n_features=64).to(dtype)
    batches = [random_inputs(wiring, n_rows=n, seed=n) for n in (100, 60, 240)]
    batches = [{site: x.to(dtype) * (1 + site.layer) for site, x in batch.items()} for batch in batches]
    converted = to_jumprelu(crosscoder, iter(batches), target_l0=target)
    assert l0_by_group(converted, batches) == pytest.approx(expected, rel=0.01)
    thresholds = converted.threshold.detach()
    assert bool((thresholds == thresholds[:, :1]).all())  # one per group, in units of the raw pre-activation
    assert len(thresholds[:, 0].unique()) == 3


def test_choice_by_scores_becomes_one_threshold_per_feature(random_crosscoder: Any, random_inputs: Any) -> None:
    wiring = Wiring.strictly_causal(SHAPE)
    crosscoder = random_crosscoder(wiring, activation=TopK(4, scored=True, affine=True), n_features=64)
    crosscoder.score_factor[1, 7] = 0
    batch = random_inputs(wiring, n_rows=300)
    converted = to_jumprelu(crosscoder, [batch])
    assert l0_by_group(converted, [batch]) == pytest.approx([4, 4, 4], rel=0.01)
    score_GF = (converted.threshold * crosscoder.score_factor).detach()
    score_GF[1, 7] = score_GF[1, 0]
    torch.testing.assert_close(score_GF, score_GF[:, :1].expand_as(score_GF))
    features = converted.encode(batch)
    index_S = features.of(2).index
    pre_S = converted.pre_activations(batch, 2)[features.of(2).row, index_S]
    expected_S = pre_S * crosscoder.post_scale[2][index_S] + crosscoder.post_offset[2][index_S]
    torch.testing.assert_close(features.of(2).activation, expected_S)
    assert not bool((features.of(1).index == 7).any())


def test_keeping_everything_and_saving(random_crosscoder: Any, random_inputs: Any, tmp_path: Path) -> None:
    wiring = Wiring.strictly_causal(SHAPE)
    crosscoder = random_crosscoder(wiring, activation=TopK(2), tied=True, undecomposed_positions=1, dtype=torch.float32)
    batch = {site: x.float() for site, x in random_inputs(wiring, n_rows=200).items()}
    assert (
        float(to_jumprelu(crosscoder, [batch], target_l0=16).threshold.detach().max()) == 0
    )  # no more than the positive ones
    converted = to_jumprelu(crosscoder, [batch])
    checkpoint.save(converted, tmp_path / "crosscoder")
    loaded = checkpoint.load(tmp_path / "crosscoder")
    for site, y_BD in converted(batch).reconstructions.items():
        torch.testing.assert_close(loaded(batch).reconstructions[site], y_BD, rtol=0, atol=0)
    assert (loaded.tied, loaded.undecomposed_positions) == (True, 1)


@pytest.mark.parametrize(
    ("activation", "batches", "target", "message"),
    [
        (TopK(2), False, None, "a topk crosscoder records no threshold: give batches"),
        (BatchTopK(2), False, 2.0, "target_l0 needs batches"),
        (ReLU(), True, None, "a relu crosscoder fixes no number of features: give target_l0"),
        (TopK(2), True, [1.0, 2.0], "target_l0 has 2 numbers, the crosscoder has 3 groups"),
        (TopK(2), True, 0.0, "target_l0 must lie above 0 and at most at 16, got 0"),
        (TopK(2), True, 17, "target_l0 must lie above 0 and at most at 16, got 17"),
    ],
)
def test_conversions_that_cannot_be(
    random_crosscoder: Any, random_inputs: Any, activation: Activation, batches: bool, target: Any, message: str
) -> None:
    wiring = Wiring.strictly_causal(SHAPE)
    crosscoder = random_crosscoder(wiring, activation=activation)
    with pytest.raises(ValueError, match=message):
        to_jumprelu(crosscoder, [random_inputs(wiring)] if batches else None, target_l0=target)


def test_data_without_a_threshold(random_crosscoder: Any, random_inputs: Any) -> None:
    wiring = Wiring.strictly_causal(SHAPE)
    fresh = Crosscoder(wiring, n_features=16, activation=BatchTopK(2))
    with pytest.raises(ValueError, match="the batchtopk threshold of group 0 was never recorded"):
        to_jumprelu(fresh)
    crosscoder = random_crosscoder(wiring, activation=TopK(1), n_features=64)
    with pytest.raises(ValueError, match="no rows to measure a threshold on"):
        to_jumprelu(crosscoder, [])


def test_thresholds_of_batches_unlike_each_other(random_crosscoder: Any, random_inputs: Any) -> None:
    """All that is kept may come from one small batch; the oracle sorts every pre-activation."""
    wiring = Wiring.strictly_causal(SHAPE)
    crosscoder = random_crosscoder(wiring, activation=TopK(1), n_features=64)
    quiet, loud = random_inputs(wiring, n_rows=900), random_inputs(wiring, n_rows=100)
    batches = [{s: x * 1e-3 for s, x in quiet.items()}, {s: x * 1e3 for s, x in loud.items()}]
    for group, threshold in enumerate(quantile_thresholds(crosscoder, iter(batches), n_rows=1000)):
        every = torch.cat([crosscoder.pre_activations(batch, group).detach().flatten() for batch in batches])
        largest = every.sort(descending=True).values
        assert float(threshold) == pytest.approx(float(largest[999] + largest[1000]) / 2)
