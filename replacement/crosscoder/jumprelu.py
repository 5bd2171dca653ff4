"""Conversion of a trained crosscoder to JumpReLU, whose features do not depend on other features or rows.

A TopK feature is active only relative to its competitors, and a BatchTopK threshold is a running mean that may keep another
number of features than training did. A threshold fixed per group after training is neither (Rajamanoharan et al. 2024,
"Jumping Ahead"; Bussmann et al. 2024, "BatchTopK").

B rows, D site width, F features per group, G groups, N rows of all batches, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from replacement.crosscoder.activation import BatchTopK, JumpReLU, TopK
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site

# A batch may hold this many times its share of the features kept before the calibration would be inexact.
_SLACK = 4


def to_jumprelu(
    crosscoder: Crosscoder,
    batches: Iterable[Mapping[Site, Tensor]] | None = None,
    *,
    target_l0: int | float | Sequence[int | float] | None = None,
) -> Crosscoder:
    """A crosscoder with the same weights and one fixed threshold per group; the one given is left alone.

    Without batches a BatchTopK crosscoder keeps its running threshold, and computes exactly what it did. With batches the
    threshold of each group is the quantile of its pre-activations that leaves `target_l0` features per row on average.

    Args:
        batches: activations `{site: [B, D]}` of every read site, in the model's own scale.
        target_l0: features per row, for every group or one number each; by default the k of a TopK or BatchTopK.

    Raises:
        ValueError: nothing to take a threshold or a target from, a target outside 0 to F, no rows, or batches so unlike
            each other that the quantile is not known.
    """
    if batches is None:
        threshold_G = _recorded_threshold(crosscoder, target_l0)
    else:
        threshold_G = _quantiles(crosscoder, batches, _targets(crosscoder, target_l0))
    converted = Crosscoder.like(crosscoder, activation=JumpReLU())
    tensors = dict(crosscoder.state_dict())
    tensors["threshold"] = threshold_G[:, None].expand(-1, crosscoder.n_features)
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
def _quantiles(crosscoder: Crosscoder, batches: Iterable[Mapping[Site, Tensor]], targets: Sequence[float]) -> Tensor:
    """Threshold of each group, `[G]`: midway between the last value kept and the first one left out."""
    candidates: list[list[Tensor]] = [[] for _ in targets]
    discarded = [0.0] * len(targets)
    n_rows = 0
    for batch in batches:
        inputs = {s: x_BD.to(crosscoder.device, crosscoder.dtype) for s, x_BD in batch.items()}
        for group, target in enumerate(targets):
            pre_X = torch.relu(crosscoder.pre_activations(inputs, group)).flatten()
            n_batch = len(pre_X) // crosscoder.n_features
            largest_K = pre_X.topk(min(len(pre_X), int(_SLACK * target * n_batch) + 2)).values
            if len(largest_K) < len(pre_X):
                discarded[group] = max(discarded[group], float(largest_K[-1]))
            candidates[group].append(largest_K)
        n_rows += n_batch
    if not n_rows:
        raise ValueError("no rows to measure a threshold on: the batches are empty")
    thresholds = []
    for group, target in enumerate(targets):
        n_kept = max(1, round(target * n_rows))
        sorted_K = torch.cat(candidates[group]).sort(descending=True).values
        # With every feature of every row kept nothing is left out: the threshold is 0.
        left_out = float(sorted_K[n_kept]) if n_kept < len(sorted_K) else 0.0
        if left_out < discarded[group]:
            raise ValueError(
                f"one batch alone has over {_SLACK} times the features of the average batch in group {group}: "
                "give larger or better shuffled batches"
            )
        thresholds.append((float(sorted_K[n_kept - 1]) + left_out) / 2)
    return torch.tensor(thresholds, device=crosscoder.device, dtype=crosscoder.dtype)
