"""What is a feature in each of several models? Its strength, its lifetime over snapshots, its direction, and other tests of it.

F features, M models, N tokens. A decoder vector says what a crosscoder WRITES to a model. Whether the model has the feature is
asked of its activations: another dictionary's features fire together with it (`activation_correlations`), or its activation can
be read off linearly (`readability`). Neither looks at a decoder, so that models of any widths are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site

ALIVE = 0.5
"""Share of its largest decoder norm from which on a feature counts as alive in a model."""


class Lifetimes(NamedTuple):
    """From which to which of M snapshots every feature is alive."""

    born_F: Int[Tensor, " F"]
    """Number of the first snapshot of the unbroken stretch around its largest norm; M for a feature without any norm."""
    died_F: Int[Tensor, " F"]
    """Number of the first snapshot behind that stretch; M for a feature that lives to the end."""


def spread(x_ND: Float[Tensor, "N D"]) -> float:
    """Root mean square distance of activations from their mean."""
    return float((x_ND - x_ND.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def decoder_norms_by_model(crosscoder: Crosscoder, spreads: Mapping[Site, float]) -> Float[Tensor, "F M"]:
    """`||d_m|| / spread_m`: norm of every decoder vector of a model-diffing crosscoder in units of each model's activations.

    Streams of residuals grow while a model is trained, and differ between models; plain norms would follow them.

    Args:
        spreads: of the activations at every written site, see `spread`.
    """
    sites = _one_site_per_model(crosscoder)
    return torch.stack([crosscoder.decoder(0, site).detach().norm(dim=1) / spreads[site] for site in sites], dim=1)


def lifetimes(norms_FM: Float[Tensor, "F M"], *, alive: float = ALIVE) -> Lifetimes:
    """Birth and death of every feature over snapshots in order: where its norm passes a share of its peak."""
    n_models = norms_FM.shape[1]
    place_M = torch.arange(n_models)
    peak_F1 = norms_FM.argmax(dim=1, keepdim=True)
    is_weak_FM = norms_FM < alive * norms_FM.gather(1, peak_F1)
    born_F = torch.where(is_weak_FM & (place_M < peak_F1), place_M + 1, 0).amax(dim=1)
    died_F = torch.where(is_weak_FM & (place_M > peak_F1), place_M, n_models).amin(dim=1)
    return Lifetimes(torch.where(norms_FM.any(dim=1), born_F, n_models), died_F)


def decoder_cosines(crosscoder: Crosscoder) -> Float[Tensor, "F M_minus_1"]:
    """Cosine of every feature's decoder vectors in each model and the next: below 1 where a feature turns.

    Raises:
        ValueError: not a model-diffing crosscoder, or models of different widths.
    """
    sites = _one_site_per_model(crosscoder)
    widths = {site: crosscoder.wiring.width(site) for site in sites}
    if len(set(widths.values())) > 1:
        given = ", ".join(f"{site} {width}" for site, width in widths.items())
        raise ValueError(f"directions are compared between snapshots of one shape, got widths {given}")
    decoders = torch.stack([crosscoder.decoder(0, site).detach() for site in sites], dim=1)
    return functional.cosine_similarity(decoders[:, 1:], decoders[:, :-1], dim=2)


def activation_correlations(first_NF: Float[Tensor, "N F"], second_NG: Float[Tensor, "N G"]) -> Float[Tensor, "F G"]:
    """Pearson correlation of every feature of one dictionary with every feature of another over the same tokens; 0 for
    features that never fire."""
    parts = []
    for acts in (first_NF, second_NG):
        centred = acts - acts.mean(dim=0)
        parts.append(centred / centred.norm(dim=0).clamp(min=torch.finfo(centred.dtype).tiny))
    return parts[0].T @ parts[1]


def readability(
    x_ND: Float[Tensor, "N D"], acts_NF: Float[Tensor, "N F"], *, ridge: float = 1e-4
) -> Float[Tensor, " F"]:
    """R^2 of every feature's activation read linearly off a model's activations: fitted on the first half of the tokens,
    measured on the second. NaN for features that do not vary there; below 0 where the mean would predict better.

    Args:
        ridge: penalty of the fit, as a share of the mean variance of a coordinate.
    """
    half = len(x_ND) // 2
    x_ND, acts_NF = x_ND.double(), acts_NF.double()
    mean_D, mean_F = x_ND[:half].mean(dim=0), acts_NF[:half].mean(dim=0)
    fit_ND, test_ND = x_ND[:half] - mean_D, x_ND[half:] - mean_D
    gram_DD = fit_ND.T @ fit_ND
    gram_DD += ridge * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=gram_DD.dtype)
    weights_DF = torch.linalg.solve(gram_DD, fit_ND.T @ (acts_NF[:half] - mean_F))
    error_F = (acts_NF[half:] - mean_F - test_ND @ weights_DF).square().mean(dim=0)
    return 1 - error_F / acts_NF[half:].var(dim=0, correction=0)


def _one_site_per_model(crosscoder: Crosscoder) -> list[Site]:
    """The site that a model-diffing crosscoder writes in each model, in order."""
    wiring = crosscoder.wiring
    sites = sorted(wiring.writes[0], key=lambda site: site.model)
    if wiring.n_groups != 1 or [site.model for site in sites] != list(range(max(2, len(sites)))):
        raise ValueError(f"expected a model-diffing crosscoder, got one of wiring {wiring.name}")
    return sites
