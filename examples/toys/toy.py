"""What the toys share: crosscoders trained on synthetic activations, without a language model. N rows, D width, F features.

A toy is a dictionary of activations at sites; nothing in a crosscoder asks where they came from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from replacement import Crosscoder
from replacement.crosscoder.activation import Activation
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.wiring import Wiring
from replacement.training import TrainingConfig, train
from replacement.training.losses import Loss

sys.path.append(str(Path(__file__).parent.parent))  # for `plot_style`, which all examples share

Activations = Mapping[Site, Tensor]
"""Synthetic activations `[N, D]` at sites."""


class Fit(NamedTuple):
    """How well a crosscoder reconstructs, and how many features that takes."""

    unexplained: float
    """Fraction of variance unexplained, mean over written sites."""
    l0: float
    """Active features per row."""
    alive: int
    """Features that fire on at least one row in a thousand."""


def shape(width: int, *, n_layers: int = 1) -> ModelShape:
    """Sizes of a model that exists only as activations of this width."""
    return ModelShape(n_layers, width, 1, width)


def random_batches(data: Activations, n_steps: int, batch_rows: int, seed: int) -> Iterator[dict[Site, Tensor]]:
    """Rows drawn at random with replacement, the same rows at every site."""
    generator = torch.Generator().manual_seed(seed)
    n_rows = len(next(iter(data.values())))
    for _ in range(n_steps):
        rows = torch.randint(n_rows, (batch_rows,), generator=generator)
        yield {site: x_ND[rows] for site, x_ND in data.items()}


def fit(
    wiring: Wiring,
    data: Activations,
    *,
    n_features: int,
    activation: Activation,
    losses: Sequence[Loss] = (),
    skip: bool = False,
    n_steps: int = 1000,
    batch_rows: int = 256,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Crosscoder:
    """Train a crosscoder on synthetic activations; `seed` decides initial weights and order of the data."""
    crosscoder = Crosscoder(wiring, n_features=n_features, activation=activation, skip=skip, seed=seed)
    config = TrainingConfig(
        n_tokens=n_steps * batch_rows,
        batch_tokens=batch_rows,
        losses=list(losses),
        learning_rate=learning_rate,
        sparsity_warmup=0.2,
        dead_after_tokens=50 * batch_rows,
        seed=seed,
    )
    return train(crosscoder, random_batches(data, n_steps, batch_rows, seed), config)


@torch.no_grad()
def measure(crosscoder: Crosscoder, data: Activations) -> Fit:
    """Reconstruction and use of features on these rows."""
    outputs, features = crosscoder(data)
    fractions = [
        float((data[site] - y_ND).square().sum() / (data[site] - data[site].mean(dim=0)).square().sum())
        for site, y_ND in outputs.items()
    ]
    rates_F = firing_rates(crosscoder, data)
    return Fit(sum(fractions) / len(fractions), len(features) / features.n_rows, int((rates_F >= 1e-3).sum()))


@torch.no_grad()
def firing_rates(crosscoder: Crosscoder, data: Activations) -> Tensor:
    """Share of the rows on which each feature of a one-group crosscoder fires, `[F]`."""
    features = crosscoder.encode(data)
    counts_F = torch.bincount(features.index[features.activation > 0], minlength=crosscoder.n_features)
    return counts_F / features.n_rows


def orthonormal(n: int, width: int, generator: torch.Generator) -> Tensor:
    """`n` random orthonormal vectors `[n, width]`."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:n]
