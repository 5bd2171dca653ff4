"""Scale, mean and variance of every site, measured before training, and thresholds measured after it.

Sites are scaled to mean norm sqrt(D) while training, so that settings carry over between layers and models; the scale is
folded into the weights at the end, and the result reads and writes the model's own activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.jumprelu import quantile_thresholds
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import BatchTopK
from replacement.training.parallel import SINGLE, Parallel

Batch = Mapping[Site, Tensor]
"""Activations `[B, D]` at sites, one row per token."""


class Statistics(NamedTuple):
    """Measured on the first batches; means and variances are those of the scaled activations."""

    scales: dict[Site, float]
    """`sqrt(D) / mean_b ||x||` per site."""
    means: dict[Site, Tensor]
    """`[D]` per site."""
    variances: dict[Site, Tensor]
    """`mean_b ||x - mean||^2` per site, a scalar."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; scales in float64."""
        tensors = {
            f"scale.{site}": torch.tensor(scale, dtype=torch.float64, device=self.means[site].device)
            for site, scale in self.scales.items()
        }
        tensors |= {f"mean.{site}": mean_D for site, mean_D in self.means.items()}
        return tensors | {f"variance.{site}": variance for site, variance in self.variances.items()}

    def toward(self, new: Statistics, share: float) -> Statistics:
        """A running mean of statistics: norm, mean and variance of the model's own activations move by a share to new ones."""
        scales, means, variances = {}, {}, {}
        for site, old in self.scales.items():
            now = new.scales[site]
            scale = scales[site] = 1 / (1 / old + share * (1 / now - 1 / old))
            means[site] = scale * torch.lerp(self.means[site] / old, new.means[site] / now, share)
            variances[site] = scale**2 * torch.lerp(self.variances[site] / old**2, new.variances[site] / now**2, share)
        return Statistics(scales, means, variances)

    @classmethod
    def blank(cls, crosscoder: Crosscoder) -> Statistics:
        """Of the right shapes, to be overwritten."""
        widths = {site: crosscoder.wiring.width(site) for site in sites_of(crosscoder)}
        means = {site: crosscoder.b_dec[0].detach().new_zeros(width) for site, width in widths.items()}
        return cls(dict.fromkeys(widths, 1.0), means, {site: mean_D.new_ones(()) for site, mean_D in means.items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], sites: Iterable[Site]) -> Statistics:
        """Read what `to_tensors` wrote."""
        chosen = list(sites)
        scales = {site: float(tensors[f"scale.{site}"]) for site in chosen}
        means, variances = ({site: tensors[f"{name}.{site}"] for site in chosen} for name in ("mean", "variance"))
        return cls(scales, means, variances)


def sites_of(crosscoder: Crosscoder) -> tuple[Site, ...]:
    """Every site a crosscoder reads or writes, once."""
    return tuple(dict.fromkeys((*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites)))


def measure(crosscoder: Crosscoder, batches: Iterable[Batch], *, parallel: Parallel = SINGLE) -> Statistics:
    """Measure every site of a crosscoder over some batches.

    Raises:
        ValueError: no batches, a batch without a site, or activations that are all zero or not finite.
    """
    sums: dict[Site, list[Tensor]] = {}
    for batch in batches:
        check_sites(crosscoder, batch)
        for site in sites_of(crosscoder):
            x_BD = batch[site].to(crosscoder.device, torch.float64)
            new = [x_BD.new_tensor(len(x_BD)), x_BD.norm(dim=1).sum(), x_BD.sum(dim=0), x_BD.square().sum()]
            sums[site] = [a + b for a, b in zip(sums[site], new, strict=True)] if site in sums else new
    if not sums:
        raise ValueError("no batches to train on: the iterator is empty")
    scales, means, variances = {}, {}, {}
    for site, parts in sums.items():
        count, norms, sum_D, squares = (parallel.sum_over_data(part) for part in parts)
        norm = float(norms / count)
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"the activations at {site} have mean norm {norm}: expected a finite value above 0")
        scales[site] = math.sqrt(len(sum_D)) / norm
        mean_D = sum_D / count
        variance = (squares / count - mean_D.square().sum()) * scales[site] ** 2
        means[site] = (mean_D * scales[site]).to(crosscoder.dtype)
        # A site that never varies would divide by 0; any positive number serves, for its error is 0 from the start.
        tiny = 1e-12 * len(sum_D)
        variances[site] = torch.where(variance > tiny, variance, torch.ones_like(variance)).to(crosscoder.dtype)
    return Statistics(scales, means, variances)


def scaled(crosscoder: Crosscoder, batch: Batch, statistics: Statistics) -> dict[Site, Tensor]:
    """A batch in the units of training, on the crosscoder's device.

    Raises:
        ValueError: a site is missing.
    """
    check_sites(crosscoder, batch)
    reads, writes = crosscoder.wiring.read_sites, crosscoder.wiring.write_sites
    only_written = [site for site in writes if site not in reads]
    return scale_sites(crosscoder, batch, statistics, reads) | scale_sites(crosscoder, batch, statistics, only_written)


def scale_sites(
    crosscoder: Crosscoder, batch: Batch, statistics: Statistics, sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """Some sites of a batch, scaled, in one piece of memory: large pieces go back to the system when they are dropped,
    many small ones leave gaps."""
    shapes = [batch[site].shape for site in sites]
    piece = torch.empty(sum(map(math.prod, shapes)), dtype=crosscoder.dtype, device=crosscoder.device)
    parts = piece.split([math.prod(shape) for shape in shapes])
    return {
        site: torch.mul(batch[site].to(piece), statistics.scales[site], out=part.view(shape))
        for site, part, shape in zip(sites, parts, shapes, strict=True)
    }


def check_sites(crosscoder: Crosscoder, batch: Batch) -> None:
    """Check that a batch holds every site, in the width of the wiring.

    Raises:
        ValueError: a site is missing or has another width.
    """
    for site in sites_of(crosscoder):
        if site not in batch:
            raise ValueError(f"the batches hold {', '.join(map(str, batch))}, but the crosscoder needs {site}")
        width, shape = crosscoder.wiring.width(site), list(batch[site].shape)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"the activations at {site} must have shape [rows, {width}], got {shape}")


@torch.no_grad()
def start(crosscoder: Crosscoder, statistics: Statistics) -> None:
    """Bring a crosscoder to scaled activations: a trained one exactly, a fresh one by setting its biases.

    A fresh one (decoder zero) starts at the mean of its targets, and every feature at pre-activation 0 on the mean input.
    """
    if any(bool(weight.any()) for weight in crosscoder.W_dec):
        fold(crosscoder, {site: 1 / scale for site, scale in statistics.scales.items()})
        return
    for site, bias_D in zip(crosscoder.wiring.write_sites, crosscoder.b_dec, strict=True):
        bias_D.copy_(statistics.means[site])
    for group, bias_F in enumerate(crosscoder.b_enc):
        means = {site: statistics.means[site][None] for site in crosscoder.wiring.reads[group]}
        bias_F.sub_(crosscoder.pre_activations(means, group)[0])


@torch.no_grad()
def calibrate(crosscoder: Crosscoder, statistics: Statistics, batches: Iterable[Batch], *, n_rows: int) -> None:
    """Set the thresholds of a BatchTopK crosscoder to those that keep k features per row of the batches; others are left alone.

    While training the threshold is a running mean over many steps. Encoders grow as they learn, so it lags behind: after a
    few dozen steps it let through several times k features.

    Args:
        batches: unscaled activations of every read site.
        n_rows: rows of all batches together.
    """
    if not isinstance(crosscoder.activation, BatchTopK) or crosscoder.threshold is None:
        return
    sites = crosscoder.wiring.read_sites
    scaled_batches = (scale_sites(crosscoder, batch, statistics, sites) for batch in batches)
    crosscoder.threshold.copy_(quantile_thresholds(crosscoder, scaled_batches, n_rows=n_rows)[:, None])


def fold(crosscoder: Crosscoder, scales: Mapping[Site, float]) -> None:
    """Fold scales into the weights: the result maps unscaled reads to unscaled writes."""
    reads, writes = crosscoder.wiring.read_sites, crosscoder.wiring.write_sites
    crosscoder.fold_input_scale({site: scales[site] for site in reads}, {site: scales[site] for site in writes})
