"""Measurement of a crosscoder on held-out rows while it is being trained. R rows, T tokens per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.training.build import Models
from replacement.validation.fidelity import measure_fidelity


def evaluate(
    crosscoder: Crosscoder,
    models: Models,
    rows_RT: Int[Tensor, "R T"],
    keep_RT: Bool[Tensor, "R T"],
    *,
    scales: Mapping[Site, float],
) -> dict[str, Any]:
    """One record for `metrics.jsonl`: reconstruction, and the output of the model with the crosscoder spliced in.

    Args:
        keep_RT: the tokens that count; the others keep the model's own activations.
        scales: of the activations the crosscoder lives in.
    """
    device = models.first.device
    fidelity = measure_fidelity(
        models.first,
        crosscoder,
        rows_RT.to(device),
        keep_RT=keep_RT.to(device),
        scales=scales,
        second_model=models.second,
    )
    sites = crosscoder.wiring.write_sites
    return {
        "unexplained": {str(site): value for site, value in zip(sites, fidelity.unexplained, strict=True)},
        "l0": list(fidelity.l0),
        "l0_total": fidelity.total_l0,
        "kl": fidelity.kl,
        "cross_entropy": fidelity.cross_entropy,
        "cross_entropy_original": fidelity.cross_entropy_original,
        "cross_entropy_recovered": fidelity.cross_entropy_recovered,
        "agreement": fidelity.agreement,
        "agreement_all": fidelity.agreement_all,
    }
