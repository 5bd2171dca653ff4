"""How well the written sites are reconstructed from clean activations, and how the features fire. N rows, D width, G groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.validation.fidelity_metrics import Mean, VarianceUnexplained

DENSE_ABOVE = 0.1
"""A feature that fires on a larger share of the tokens is called dense."""


class SiteErrors:
    """Fraction of variance unexplained and mean cosine of every written site."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._errors = {site: VarianceUnexplained() for site in sites}
        self._cosines = {site: Mean() for site in sites}

    def add(self, site: Site, target_ND: Tensor, output_ND: Tensor) -> None:
        """Add some tokens of one site."""
        if not len(target_ND):
            return
        target_ND, output_ND = target_ND.double(), output_ND.double()
        self._errors[site].update(target_ND, output_ND)
        self._cosines[site].update(functional.cosine_similarity(target_ND, output_ND, dim=-1))

    @property
    def total(self) -> float | None:
        """Squared error of all sites over the variance of all sites; None if nothing varies."""
        variance = sum(each.variance for each in self._errors.values())
        return sum(each.error for each in self._errors.values()) / variance if variance > 0 else None

    def facts(self) -> dict[str, Any]:
        """Plain JSON value."""
        sites = [
            {
                "site": str(site),
                "layer": site.layer,
                "unexplained": error.error / error.variance if error.variance > 0 else None,
                "cosine": self._cosines[site].value() if self._cosines[site].count else None,
            }
            for site, error in self._errors.items()
        ]
        known = [error.error / error.variance for error in self._errors.values() if error.variance > 0]
        return {
            "sites": sites,
            "unexplained": self.total,
            "unexplained_mean": sum(known) / len(known) if known else None,
        }


class Activity:
    """On how many tokens each feature of a crosscoder fires."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.wiring, self.n_features = crosscoder.wiring, crosscoder.n_features
        self.n_tokens = 0
        self._fired_GF = torch.zeros(crosscoder.n_groups, crosscoder.n_features, dtype=torch.int64)

    def add(self, features: Mapping[int, Features], asked_R: Tensor) -> None:
        """Add the features of one pass, counting the rows asked about."""
        self.n_tokens += int(asked_R.sum())
        for group, own in features.items():
            counted = asked_R.to(own.row.device)[own.row] & (own.activation != 0)
            self._fired_GF[group] += torch.bincount(own.index[counted], minlength=self.n_features).cpu()

    @property
    def l0(self) -> list[float]:
        """Active features per token of each group."""
        return (self._fired_GF.sum(1) / max(1, self.n_tokens)).tolist()

    def facts(self) -> dict[str, Any]:
        """Plain JSON value."""
        dead_G = (self._fired_GF == 0).sum(1).tolist()
        dense_G = (self._fired_GF > DENSE_ABOVE * self.n_tokens).sum(1).tolist()
        groups = [
            {
                "group": group,
                "layer": self.wiring.group_layer(group),
                "n_features": self.n_features,
                "l0": l0,
                "dead": dead_G[group],
                "dense": dense_G[group],
            }
            for group, l0 in enumerate(self.l0)
        ]
        return {"groups": groups, "l0": sum(self.l0), "dead": sum(dead_G), "dense": sum(dense_G)}


class SiteMeans:
    """Mean activation of every site, in fp64."""

    def __init__(self) -> None:
        self._sums: dict[Site, Tensor] = {}
        self._n_tokens = 0

    def add(self, activations: Mapping[Site, Tensor]) -> None:
        """Add activations `[N, D]`, the same tokens of every site."""
        for site, x_ND in activations.items():
            sum_D = x_ND.double().sum(dim=0)
            self._sums[site] = self._sums[site] + sum_D if site in self._sums else sum_D
        self._n_tokens += len(next(iter(activations.values())))

    def value(self) -> dict[Site, Tensor]:
        """The means `[D]`.

        Raises:
            ValueError: no token was seen.
        """
        if not self._n_tokens:
            raise ValueError("no token to measure: expected at least one that the crosscoder decomposes")
        return {site: sum_D / self._n_tokens for site, sum_D in self._sums.items()}
