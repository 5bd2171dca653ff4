"""Training of a crosscoder on batches of activations. B rows, D site width, F features per group, G groups.

The loop is: scale the sites, encode, decode, loss, Adam step. Sites are scaled to mean norm sqrt(D) while training and
the scale is folded into the weights at the end, so the result reads and writes the model's own activations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from replacement.crosscoder import Crosscoder
from replacement.features import Features
from replacement.sites import Site
from replacement.training.config import TrainingConfig
from replacement.training.losses import auxiliary_loss, reconstruction_loss

Batch = Mapping[Site, Tensor]

# The auxiliary loss sees one row in four: dead features need some gradient, and it is the costly part.
_AUXILIARY_STRIDE = 4


class Progress(NamedTuple):
    """What a progress callback is told after each step."""

    step: int
    """Steps done."""
    loss: float
    """Loss of this batch, penalties included."""
    unexplained: float
    """Fraction of variance unexplained in this batch, averaged over written sites."""
    l0: float
    """Active features per row, summed over groups."""
    n_dead: int
    """Features that have not fired within `dead_after_tokens`."""


class _Statistics(NamedTuple):
    """Measured on the first batches; means and variances are those of the scaled activations."""

    scales: dict[Site, float]
    means: dict[Site, Tensor]
    variances: dict[Site, Tensor]


def train(
    crosscoder: Crosscoder,
    batches: Iterable[Batch],
    config: TrainingConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Crosscoder:
    """Train a crosscoder in place and return it in evaluation mode.

    A fresh crosscoder (decoder zero) starts at the mean of its targets and inputs; a trained one is continued.
    Equal weights, batches and settings give equal results.

    Arguments:
        batches: shuffled tokens, `{site: [B, D]}` for every read and written site; one is used per step.
        progress: called after each step.

    Raises:
        ValueError: no batches or too few, a batch without a site, or a loss that is not finite.
    """
    stream = iter(batches)
    first = list(itertools.islice(stream, min(config.scale_batches, config.n_steps)))
    if not first:
        raise ValueError("no batches to train on: the iterator is empty")
    statistics = _measure(crosscoder, first)
    _start(crosscoder, statistics)
    crosscoder.train()
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=config.learning_rate, fused=True)
    silent_GF = torch.zeros(crosscoder.n_groups, crosscoder.n_features, dtype=torch.int64, device=crosscoder.device)
    done = 0
    for batch in itertools.islice(itertools.chain(first, stream), config.n_steps):
        for settings in optimizer.param_groups:
            settings["lr"] = config.learning_rate_at(done)
        report = _step(
            crosscoder, optimizer, _scaled(crosscoder, batch, statistics), statistics, config, done, silent_GF
        )
        done += 1
        if progress is not None:
            progress(report)
    if done < config.n_steps:
        raise ValueError(f"the batches ran out after {done} of {config.n_steps} steps")
    _rescale(crosscoder, statistics.scales)
    return crosscoder.eval()


def _step(
    crosscoder: Crosscoder,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    statistics: _Statistics,
    config: TrainingConfig,
    step: int,
    silent_GF: Tensor,
) -> Progress:
    """One optimizer step on a scaled batch; `silent_GF` (tokens since each feature fired) is updated in place."""
    n_rows = len(next(iter(batch.values())))
    # Rows are shuffled tokens, none of them among the first positions of a prompt.
    positions_B = torch.full((n_rows,), crosscoder.undecomposed_positions, device=crosscoder.device)
    reconstructions, features = crosscoder(batch, positions=positions_B)
    reconstruction = reconstruction_loss(batch, reconstructions, statistics.variances)
    loss = reconstruction
    if config.penalty is not None:
        loss = loss + config.penalty_weight_at(step) * config.penalty(crosscoder, features)
    _count_silence(silent_GF, features)
    dead_GF = silent_GF >= config.dead_after_tokens
    n_dead = int(dead_GF.sum())
    if n_dead and config.auxiliary_coefficient:
        some = {site: x_BD[::_AUXILIARY_STRIDE] for site, x_BD in batch.items()}
        errors = {site: some[site] - y_BD[::_AUXILIARY_STRIDE].detach() for site, y_BD in reconstructions.items()}
        loss = loss + config.auxiliary_coefficient * auxiliary_loss(
            crosscoder, some, errors, dead_GF, k=config.auxiliary_k
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} at step {step}: lower the learning rate or check the activations")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), config.gradient_clip)
    optimizer.step()
    l0 = int((features.activation > 0).sum()) / n_rows
    unexplained = float(reconstruction.detach()) / len(reconstructions)
    return Progress(step + 1, value, unexplained, l0, n_dead)


def _count_silence(silent_GF: Tensor, features: Features) -> None:
    silent_GF += features.n_rows
    fired_S = features.activation > 0
    silent_GF[features.group[fired_S], features.index[fired_S]] = 0


def _measure(crosscoder: Crosscoder, batches: Sequence[Batch]) -> _Statistics:
    scales, means, variances = {}, {}, {}
    for site in (*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites):
        if any(site not in batch for batch in batches):
            raise ValueError(f"the batches hold {', '.join(map(str, batches[0]))}, but the crosscoder needs {site}")
        x_BD = torch.cat([batch[site] for batch in batches]).to(crosscoder.device, crosscoder.dtype)
        norm = float(x_BD.norm(dim=1).mean())
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"the activations at {site} have mean norm {norm}: expected a finite value above 0")
        scales[site] = math.sqrt(x_BD.shape[1]) / norm
        means[site] = x_BD.mean(dim=0) * scales[site]
        # A site that never varies would divide by 0; any positive number serves, for its error is 0 from the start.
        variance = (x_BD * scales[site] - means[site]).square().sum(dim=1).mean()
        variances[site] = torch.where(variance > 0, variance, torch.ones_like(variance))
    return _Statistics(scales, means, variances)


@torch.no_grad()
def _start(crosscoder: Crosscoder, statistics: _Statistics) -> None:
    """Bring the crosscoder to the scaled activations: a trained one exactly, a fresh one by setting its biases."""
    if any(bool(weight.any()) for weight in crosscoder.W_dec):
        _rescale(crosscoder, {site: 1 / scale for site, scale in statistics.scales.items()})
        return
    for site, bias_D in zip(crosscoder.wiring.write_sites, crosscoder.b_dec, strict=True):
        bias_D.copy_(statistics.means[site])
    for group, bias_F in enumerate(crosscoder.b_enc):
        means = {site: statistics.means[site][None] for site in crosscoder.wiring.reads[group]}
        bias_F.sub_(crosscoder.pre_activations(means, group)[0])  # the mean input has pre-activation 0


def _rescale(crosscoder: Crosscoder, scales: Mapping[Site, float]) -> None:
    reads, writes = crosscoder.wiring.read_sites, crosscoder.wiring.write_sites
    crosscoder.fold_input_scale({site: scales[site] for site in reads}, {site: scales[site] for site in writes})


def _scaled(crosscoder: Crosscoder, batch: Batch, statistics: _Statistics) -> dict[Site, Tensor]:
    missing = [site for site in statistics.scales if site not in batch]
    if missing:
        raise ValueError(f"a batch holds {', '.join(map(str, batch))}, but the crosscoder needs {missing[0]}")
    return {
        site: batch[site].to(crosscoder.device, crosscoder.dtype) * scale for site, scale in statistics.scales.items()
    }
