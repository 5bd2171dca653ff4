"""Latent scaling: is a feature of a model-diffing crosscoder really absent from one of its models?

A decoder vector near zero in one model says that the crosscoder does not write the feature there, not that the model lacks
it: an L1 penalty shrinks what is weaker in one model, or splits it over other features. The check of Minder et al. 2025,
"Robustly identifying concepts introduced during chat fine-tuning using crosscoders", asks the activations. With activation
f_j(r) at token r and the second model's decoder vector d_j, the least-squares scale of feature j in a target y is

    beta_j(y) = argmin_b sum_r ||y_r - b f_j(r) d_j||^2 = sum_r f_j(r) <y_r, d_j> / (||d_j||^2 sum_r f_j(r)^2)

and the targets are, for each model, what the features other than j leave over (the error), and what all features write (the
reconstruction). If the ratio of the first model's scale to the second's is near 0 for both, the feature is new. In a crosscoder
over many models any two of one width can be the first and the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.validation.measure import evaluating

MAX_NU_ERROR, MAX_NU_RECONSTRUCTION = 0.2, 0.5
"""Ratios below which Minder et al. call a feature exclusive."""


class LatentScaling(NamedTuple):
    """Scales of every feature, `[F]` each; NaN for features that never fire or have no decoder in the second model."""

    beta_error: tuple[Float[Tensor, " F"], Float[Tensor, " F"]]
    """Scale in `y - b_dec - sum_{i != j} f_i d_i` of the first and of the second model."""
    beta_reconstruction: tuple[Float[Tensor, " F"], Float[Tensor, " F"]]
    """Scale in `sum_i f_i d_i` of the first and of the second model."""
    fired: Float[Tensor, " F"]
    """Tokens on which each feature fires."""

    @property
    def nu_error(self) -> Float[Tensor, " F"]:
        """First model's scale over the second's, in the errors: near 1 where the first model has what was shrunk away."""
        return self.beta_error[0] / self.beta_error[1]

    @property
    def nu_reconstruction(self) -> Float[Tensor, " F"]:
        """The same in the reconstructions: near 1 where other features write it to the first model."""
        return self.beta_reconstruction[0] / self.beta_reconstruction[1]

    def is_exclusive(
        self, *, max_nu_error: float = MAX_NU_ERROR, max_nu_reconstruction: float = MAX_NU_RECONSTRUCTION
    ) -> Bool[Tensor, " F"]:
        """Features whose two ratios are both below their limits: the second model's own."""
        return (self.nu_error < max_nu_error) & (self.nu_reconstruction < max_nu_reconstruction)


def relative_decoder_norms(crosscoder: Crosscoder, *, models: tuple[int, int] = (0, 1)) -> Float[Tensor, " F"]:
    """`||d_1|| / (||d_0|| + ||d_1||)` of every feature: 0 for the first model's own, 1 for the second's, NaN if both are 0.

    Args:
        models: numbers of the first and the second model.

    Raises:
        ValueError: not a model-diffing crosscoder, or one without these models.
    """
    first, second = (crosscoder.decoder(0, site).detach().norm(dim=1) for site in _sites_of(crosscoder, models))
    return second / (first + second)


def latent_scaling(
    crosscoder: Crosscoder, batches: Iterable[Mapping[Site, Tensor]], *, models: tuple[int, int] = (0, 1)
) -> LatentScaling:
    """Scales of all features of a model-diffing crosscoder at once, in float64.

    Args:
        crosscoder: measured in evaluation mode and left in the mode it came in.
        batches: activations `{site: [N, D]}` of all models on tokens that are decomposed; best held out from training.
        models: numbers of the first and the second model.

    Raises:
        ValueError: not a model-diffing crosscoder, one without these models, models of different widths, a site that is
            missing, or no tokens.
    """
    sites, wiring = _sites_of(crosscoder, models), crosscoder.wiring
    if wiring.width(sites[0]) != wiring.width(sites[1]):
        widths = " and ".join(f"{site} {wiring.width(site)}" for site in sites)
        raise ValueError(f"latent scaling compares models of one width, got {widths}")
    decoders = [crosscoder.decoder(0, site).detach().double() for site in sites]
    d_FD = decoders[1]
    errors, written = ([torch.zeros_like(d_FD) for _ in sites] for _ in range(2))
    squares_F, fired_F = (d_FD.new_zeros(len(d_FD)) for _ in range(2))
    n_tokens = 0
    with evaluating(crosscoder):
        for batch in batches:
            reads = {
                site: batch[site].to(crosscoder.device, crosscoder.dtype) for site in wiring.read_sites if site in batch
            }
            n_rows = len(next(iter(reads.values()), torch.empty(0)))
            # None of these tokens is among the first positions of a prompt.
            positions_R = torch.full((n_rows,), crosscoder.undecomposed_positions, device=crosscoder.device)
            features = crosscoder.encode(reads, positions=positions_R)
            n_tokens += features.n_rows
            acts_S = features.activation.double()
            squares_F.index_add_(0, features.index, acts_S.square())
            fired_F += torch.bincount(features.index[acts_S != 0], minlength=len(d_FD))
            sums = crosscoder.decode_contribution(features)
            for model, site in enumerate(sites):
                error_RD = reads[site].double() - crosscoder.decoder_bias(site).double() - sums[site].double()
                errors[model] += _activity_times(features, error_RD)
                written[model] += _activity_times(features, sums[site].double())
    if not n_tokens:
        raise ValueError("latent scaling needs at least one token, got none")
    power_F = d_FD.square().sum(dim=1) * squares_F
    beta_error, beta_written = [], []
    for model, decoder_FD in enumerate(decoders):
        # Leaving feature j out of the reconstruction adds f_j times its decoder vector to the error.
        left_out_F = squares_F * (decoder_FD * d_FD).sum(dim=1)
        beta_error.append(((errors[model] * d_FD).sum(dim=1) + left_out_F) / power_F)
        beta_written.append((written[model] * d_FD).sum(dim=1) / power_F)
    return LatentScaling((beta_error[0], beta_error[1]), (beta_written[0], beta_written[1]), fired_F)


def _activity_times(features: Features, y_RD: Tensor) -> Tensor:
    """`sum_r f_j(r) y_r` for every feature, `[F, D]`."""
    size = (features.n_features, features.n_rows)
    places = torch.stack([features.index, features.row])
    return torch.sparse_coo_tensor(places, features.activation.double(), size, check_invariants=False) @ y_RD


def _sites_of(crosscoder: Crosscoder, models: tuple[int, int]) -> list[Site]:
    """The written site of each of two models."""
    wiring = crosscoder.wiring
    by_model = {site.model: site for site in wiring.writes[0]}
    if wiring.n_groups != 1 or len(by_model) < max(2, len(wiring.writes[0])):
        raise ValueError(f"expected a model-diffing crosscoder, got one of wiring {wiring.name}")
    if missing := [number for number in models if number not in by_model]:
        raise ValueError(f"the crosscoder has no model {missing[0]}: it has {', '.join(map(str, sorted(by_model)))}")
    return [by_model[number] for number in models]
