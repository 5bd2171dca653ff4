"""A crosscoder applied to activations in the model's scale, some groups at a time: what a pass with crosscoders computes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site


class ScaledCrosscoder:
    """A crosscoder that reads `scale * x` and whose writes are divided by the scale of their site, on rows of some prompts.

    Attributes:
        encoded_together: groups whose features are chosen together: each alone, or all at once.
    """

    def __init__(
        self, crosscoder: Crosscoder, scales: Mapping[Site, float], shape: Sequence[int], *, keep_BT: Tensor | None
    ) -> None:
        """Prepare rows of prompts.

        Args:
            scales: factor by site; 1 where absent.
            shape: number of prompts B and of tokens T in each.
            keep_BT: bool mask of the tokens that have features; all if None.
        """
        self.crosscoder, self._scales = crosscoder, dict(scales)
        n_prompts, n_positions = shape
        self._positions_R = torch.arange(n_positions, device=crosscoder.device).repeat(n_prompts)
        self._keep_R = None if keep_BT is None else keep_BT.to(crosscoder.device).flatten()
        groups = range(crosscoder.n_groups)
        self.encoded_together: list[Sequence[int]] = (
            [groups] if crosscoder.activation.chooses_over_groups else [[group] for group in groups]
        )

    def inputs(self, groups: Iterable[int], activations: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """What the crosscoder reads for some groups: scaled, in its own dtype."""
        crosscoder = self.crosscoder
        scaled = {}
        for site in {site for group in groups for site in crosscoder.wiring.reads[group]}:
            x_RD = activations[site].to(crosscoder.device, crosscoder.dtype)
            scaled[site] = x_RD * self._scales[site] if site in self._scales else x_RD
        return scaled

    def encode(self, groups: Sequence[int], activations: Mapping[Site, Tensor]) -> Features:
        """Features of groups that are encoded together, of the tokens that have features."""
        crosscoder = self.crosscoder
        together = crosscoder.activation.chooses_over_groups
        encode = crosscoder.encode if together else functools.partial(crosscoder.encode_group, groups[0])
        return encode(self.inputs(groups, activations), positions=self._positions_R, keep=self._keep_R)

    def add(
        self,
        sums: dict[Site, Tensor],
        group: int,
        features: Features,
        inputs: Mapping[Site, Tensor],
        sites: Collection[Site],
    ) -> None:
        """Add to sums what one group writes to those of its sites that are named, skip terms included, still scaled.

        Args:
            inputs: what `inputs` gives for the group.
        """
        writes = [site for site in self.crosscoder.wiring.writes[group] if site in sites]
        if writes:
            add_sites(sums, self.crosscoder.skip_contribution(inputs, groups=[group]), writes)
            add_sites(sums, self.crosscoder.decode_contribution(features, groups=[group], sites=writes), writes)

    def reconstruction(self, site: Site, sum_RD: Tensor) -> Tensor:
        """Reconstruction of a site from its sum: the bias added, in the model's scale."""
        return (sum_RD + self.crosscoder.decoder_bias(site)) / self._scales.get(site, 1.0)


def add_sites(sums: dict[Site, Tensor], terms: Mapping[Site, Tensor], sites: Iterable[Site]) -> None:
    """Add the terms at some sites to the sums there, as far as there are terms."""
    for site in sites:
        if site in terms:
            sums[site] = sums[site] + terms[site] if site in sums else terms[site]
