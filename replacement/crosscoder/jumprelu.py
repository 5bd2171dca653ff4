"""Conversion of a trained crosscoder to JumpReLU, whose features do not depend on other features or rows.

A TopK feature is active only relative to its competitors, and a BatchTopK threshold is a running mean that may keep another
number of features than training did. A threshold fixed per group after training is neither (Rajamanoharan et al. 2024,
"Jumping Ahead"; Bussmann et al. 2024, "BatchTopK").

B rows, D site width, F features per group, G groups, N rows of all batches, K pre-activations kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from replacement.crosscoder.activation import JumpReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.number_checks import LARGEST

_ROWS_AT_ONCE = 512
"""Rows whose dense pre-activations of one group exist at a time."""


def to_jumprelu(
    crosscoder: Crosscoder,
    batches: Iterable[Mapping[Site, Tensor]] | None = None,
    *,
    target_l0: int | float | Sequence[int | float] | None = None,
) -> Crosscoder:
    """A crosscoder with the same weights and one fixed threshold per group (of scores, where features are chosen by these);
    the one given is left alone.

    Without batches a BatchTopK crosscoder keeps its running threshold, and computes exactly what it did. With batches the
    threshold of each group is the quantile of its pre-activations that leaves `target_l0` features per row on average.

    Args:
        batches: activations `{site: [B, D]}` of every read site, in the model's own scale.
        target_l0: features per row, for every group or one number each; by default the k of a TopK or BatchTopK.

    Raises:
        ValueError: nothing to take a threshold or a target from, a target outside 0 to F, or no rows.
    """
    if batches is None:
        threshold_G = _recorded_threshold(crosscoder, target_l0)
    else:
        given = list(batches)
        n_rows = sum(len(batch[crosscoder.wiring.read_sites[0]]) for batch in given)
        threshold_G = quantile_thresholds(crosscoder, given, n_rows=n_rows, target_l0=target_l0)
    converted = Crosscoder.like(crosscoder, activation=JumpReLU(affine=crosscoder.activation.affine))
    tensors = dict(crosscoder.state_dict())
    threshold_GF = threshold_G[:, None].expand(-1, crosscoder.n_features)
    if (factor_GF := tensors.pop("score_factor", None)) is not None:
        threshold_GF = (threshold_GF / factor_GF).nan_to_num(0.0).clamp(max=LARGEST)  # a factor of 0: never chosen
    tensors["threshold"] = threshold_GF
    converted.load_state_dict(tensors)
    return converted.eval()


def _recorded_threshold(crosscoder: Crosscoder, target_l0: int | float | Sequence[int | float] | None) -> Tensor:
    if target_l0 is not None:
        raise ValueError("target_l0 needs batches of activations to count features on")
    if not isinstance(crosscoder.activation, BatchTopK) or crosscoder.threshold is None:
        raise ValueError(
            f"a {crosscoder.activation.name} crosscoder records no threshold: give batches to measure it on"
        )
    threshold_G = crosscoder.threshold[:, 0]
    if not bool((threshold_G > 0).all()):
        group = int((threshold_G <= 0).nonzero()[0])
        raise ValueError(f"the batchtopk threshold of group {group} was never recorded: train it, or give batches")
    return threshold_G


def _targets(crosscoder: Crosscoder, target_l0: int | float | Sequence[int | float] | None) -> list[float]:
    """Features per row of each group."""
    activation, n_groups = crosscoder.activation, crosscoder.n_groups
    if target_l0 is None:
        if not isinstance(activation, TopK | BatchTopK):
            raise ValueError(f"a {activation.name} crosscoder fixes no number of features: give target_l0")
        target_l0 = activation.k
    given = list(target_l0) if isinstance(target_l0, Sequence) else [target_l0] * n_groups
    if len(given) != n_groups:
        raise ValueError(f"target_l0 has {len(given)} numbers, the crosscoder has {n_groups} groups")
    for target in given:
        if not 0 < target <= crosscoder.n_features:
            raise ValueError(f"target_l0 must lie above 0 and at most at {crosscoder.n_features}, got {target}")
    return [float(target) for target in given]


@torch.no_grad()
def quantile_thresholds(
    crosscoder: Crosscoder,
    batches: Iterable[Mapping[Site, Tensor]],
    *,
    n_rows: int,
    target_l0: int | float | Sequence[int | float] | None = None,
) -> Tensor:
    """Threshold of each group, `[G]`, that leaves `target_l0` features per row on average: midway between the smallest
    pre-activation (or score) above it and the largest one below; 0 where no more than these are positive.

    Args:
        batches, target_l0: as for `to_jumprelu`, in the scale in which the crosscoder reads.
        n_rows: rows of all batches together.

    Raises:
        ValueError: no rows, a crosscoder whose rows are whole prompts, or a target that is missing or outside 0 to F.
    """
    sites = crosscoder.wiring.read_sites
    if crosscoder.reads_prompts:
        raise ValueError(
            f"cannot measure thresholds of a {crosscoder.wiring.name} crosscoder: its rows are whole prompts"
        )
    if not n_rows:
        raise ValueError("no rows to measure a threshold on: the batches are empty")
    n_kept = [max(1, round(target * n_rows)) for target in _targets(crosscoder, target_l0)]
    largest = [torch.zeros(0, device=crosscoder.device, dtype=crosscoder.dtype) for _ in n_kept]
    for batch in batches:
        for first in range(0, len(batch[sites[0]]), _ROWS_AT_ONCE):
            inputs = {s: batch[s][first : first + _ROWS_AT_ONCE].to(largest[0]) for s in sites}
            for group, n in enumerate(n_kept):
                pre_BF = crosscoder.scores(crosscoder.pre_activations(inputs, group), group)
                known_K = largest[group]
                floor = known_K[-1] if len(known_K) > n else 0.0
                largest_K = torch.cat([known_K, pre_BF[pre_BF > floor]])
                largest[group] = largest_K.topk(min(n + 1, len(largest_K))).values
    padded = [functional.pad(v_K, (0, n + 1 - len(v_K))) for v_K, n in zip(largest, n_kept, strict=True)]
    return torch.stack([v_K[-2:].mean() for v_K in padded])
