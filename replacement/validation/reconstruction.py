"""How well sites are reconstructed, as plain JSON values, and how features fire: sums over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.validation.metrics import ReconstructionError

DENSE_ABOVE = 0.1
"""A feature that fires on a larger share of the tokens is called dense."""


class Activity:
    """On how many tokens each feature of a crosscoder fires.

    Attributes:
        n_tokens: tokens seen.
    """

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.wiring, self.n_features = crosscoder.wiring, crosscoder.n_features
        self.n_tokens = 0
        self._fired_GF = torch.zeros(crosscoder.n_groups, crosscoder.n_features, dtype=torch.int64)

    def add(self, features: Features, measured_P: Tensor) -> None:
        """Add the features of P tokens, counting those that are measured."""
        self.n_tokens += int(measured_P.sum())
        counted = measured_P.to(features.row.device)[features.row] & (features.activation != 0)
        place = features.group[counted] * self.n_features + features.index[counted]
        self._fired_GF += torch.bincount(place, minlength=self._fired_GF.numel()).view_as(self._fired_GF).cpu()

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


def site_facts(errors: Mapping[Site, ReconstructionError]) -> dict[str, Any]:
    """Plain JSON value; over all sites, sums are taken before the ratio."""
    known = [error.unexplained for error in errors.values() if error.unexplained is not None]
    variance = sum(error.variance for error in errors.values())
    return {
        "sites": [
            {"site": str(site), "layer": site.layer, "unexplained": error.unexplained, "cosine": error.cosine.value()}
            for site, error in errors.items()
        ],
        "unexplained": sum(error.error for error in errors.values()) / variance if variance > 0 else None,
        "unexplained_mean": sum(known) / len(known) if known else None,
    }
