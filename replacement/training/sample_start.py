"""Start a crosscoder's features at tokens of the data instead of at random directions.

Every feature begins as a detector of one sampled token's input and writes that token's output at the first site that it writes.
Tokens far from those chosen before are more likely to be chosen, as in k-means++ (Arthur and Vassilvitskii 2007), so that
rare kinds of tokens get features too. Features that begin at random directions become parts that many kinds of tokens share,
and training takes long to tell those kinds apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.training.scaling import Batch, Statistics, scaled

THRESHOLD = 0.7
"""A feature begins to fire where an input, projected on that of its token, is longer than this share of it; from the mean."""


@torch.no_grad()
def start_at_samples(crosscoder: Crosscoder, statistics: Statistics, batches: Iterable[Batch], *, seed: int) -> None:
    """Set encoders and decoders of a fresh crosscoder that lives in scaled activations.

    With x the sampled token's input and y its output, both from the mean, feature f has pre-activation
    `sqrt(D) (x . input / |x|^2 - THRESHOLD)` and the decoder vector that gives y back on that very token.

    Args:
        batches: unscaled activations; as many tokens as features at least.
        seed: chooses the tokens.

    Raises:
        ValueError: fewer tokens than features, or groups that share decoders.
    """
    if crosscoder.tied:
        raise ValueError("start='samples' needs decoders of each group's own, got a tied crosscoder")
    parts = [scaled(crosscoder, batch, statistics) for batch in batches]
    rows = {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
    generator = torch.Generator().manual_seed(seed)
    for group, (reads, writes) in enumerate(zip(crosscoder.wiring.reads, crosscoder.wiring.writes, strict=True)):
        inputs_BX = torch.cat([_from_mean(rows, statistics, site) for site in reads], dim=1)
        chosen_F = _spread_rows(inputs_BX, crosscoder.n_features, generator)
        x_FX = inputs_BX[chosen_F]
        scale = x_FX.shape[1] ** 0.5
        weights_FX = scale * x_FX / x_FX.square().sum(dim=1, keepdim=True).clamp(min=1e-6)
        widths = [crosscoder.wiring.width(site) for site in reads]
        for encoder_FD, weight_FD in zip(crosscoder.encoders(group), weights_FX.split(widths, dim=1), strict=True):
            encoder_FD.copy_(weight_FD)
        mean_X = torch.cat([statistics.means[site] for site in reads])
        crosscoder.b_enc[group].copy_(-THRESHOLD * scale - weights_FX @ mean_X)
        y_FD = _from_mean(rows, statistics, writes[0])[chosen_F]
        crosscoder.decoder(group, writes[0]).copy_(y_FD / ((1 - THRESHOLD) * scale))


def _from_mean(rows: dict[Site, Tensor], statistics: Statistics, site: Site) -> Tensor:
    return rows[site] - statistics.means[site]


def _spread_rows(x_BX: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` row numbers, each drawn with a probability proportional to the squared distance from the nearest one before."""
    if len(x_BX) < n:
        raise ValueError(f"start='samples' needs as many tokens as features: expected {n:,}, got {len(x_BX):,}")
    size_B = x_BX.square().sum(dim=1)
    distance_B, chosen = size_B.clone(), []
    for _ in range(n):
        weight_B = distance_B.clamp(min=1e-9).double().cpu()
        row = int(torch.multinomial(weight_B, 1, generator=generator))
        chosen.append(row)
        distance_B = torch.minimum(distance_B, (size_B + size_B[row] - 2 * x_BX @ x_BX[row]).clamp(min=0))
        distance_B[row] = 0
    return torch.tensor(chosen, device=x_BX.device)
