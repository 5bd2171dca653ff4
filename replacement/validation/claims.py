"""What a crosscoder's file says of its sparsity and fidelity, beside what is measured on a text.

A crosscoder that is read by a wrong rule (another read site, scale or choice of features) still runs. What gives it away is
that its sparsity and fidelity are far from what its publisher measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from replacement.crosscoder.checkpoint import check_fits
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.data.open_tokens import open_source
from replacement.language_model.language_model import LanguageModel
from replacement.validation.measure import measure
from replacement.validation.slices import stream

FACTOR = 1.5
"""Measured and claimed values further apart than this are warned of."""
L0, UNEXPLAINED = "active features per token", "unexplained variance"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One quantity: of every layer or site, and over all of them."""

    quantity: str
    places: Sequence[str]
    """Layers, or the sites that are written."""
    measured: Sequence[float | None]
    claimed: Sequence[float] | float | None
    """For each place, or their mean; None where the file says nothing."""
    total: float | None
    """Measured: of all layers together, or the mean over sites."""

    @property
    def over_all(self) -> str:
        """Name of the place that `total` is about."""
        return "all layers together" if self.quantity == L0 else "mean over sites"

    @property
    def claimed_total(self) -> float | None:
        """What the file says in the sense of `total`."""
        if self.claimed is None:
            return None
        values = [self.claimed] * len(self.places) if isinstance(self.claimed, float) else self.claimed
        return sum(values) / (1 if self.quantity == L0 else len(values))

    def claim(self, place: int) -> float | None:
        """What the file says of one place alone."""
        return None if self.claimed is None or isinstance(self.claimed, float) else self.claimed[place]

    def warning(self) -> str | None:
        """One line where the file and the measurement disagree: at the worst place, or over all where only that is claimed."""
        values = [(name, self.measured[n], self.claim(n)) for n, name in enumerate(self.places)]
        values.append((self.over_all, self.total, self.claimed_total))
        known = [(name, value, claim) for name, value, claim in values if value is not None and claim is not None]
        name, value, claim = max(known, key=lambda entry: _ratio(entry[1], entry[2]), default=("", 0.0, 0.0))
        if _ratio(value, claim) <= FACTOR:
            return None
        return (
            f"{self.quantity}, {name}: measured {value:.4g}, the file says {claim:.4g}; perhaps the text is of another kind, "
            "or the crosscoder is not read as it was trained (read site, scales, choice of features)"
        )


def _ratio(measured: float, claimed: float) -> float:
    low, high = sorted((measured, claimed))
    return 1.0 if low == high else high / low if low > 0 else float("inf")


@torch.no_grad()
def compare_with_claims(
    lm: LanguageModel, crosscoder: Crosscoder, facts: Mapping[str, Any], *, data: str, n_tokens: int
) -> tuple[int, list[Compared]]:
    """Measure on a text what `facts` (`Published.facts`) claim: `l0` or `k`, and `unexplained variance`.

    A claim is a number, or one for each group of features (each written site for the variance).

    Args:
        data: text files, a dataset or token ids, as `replacement validate` takes them.
        n_tokens: tokens to measure on, rounded down to rows.

    Returns:
        The number of tokens measured, and the two quantities.

    Raises:
        ValueError: a crosscoder of another model, data that cannot be opened or has no token to measure, or `n_tokens` below 1.
    """
    if n_tokens < 1:
        raise ValueError(f"tokens: expected at least 1, given {n_tokens}")
    check_fits(crosscoder, lm)
    source = open_source(data, lm)
    rows = stream("whole", source.name, source, lm, n_tokens=n_tokens)
    measured = measure(lm, [crosscoder], rows.batches(), [])
    reconstruction = measured.facts()["reconstruction"]
    (activity,) = measured.activity
    wiring = crosscoder.wiring
    layers = [f"layer {wiring.group_layer(group)}" for group in range(wiring.n_groups)]
    sites = [entry["site"] for entry in reconstruction["sites"]]
    return measured.n_tokens, [
        Compared(
            quantity=L0,
            places=layers,
            measured=activity.l0,
            claimed=_claim(facts.get("l0", facts.get("k")), len(layers)),
            total=reconstruction["l0"],
        ),
        Compared(
            quantity=UNEXPLAINED,
            places=sites,
            measured=[entry["unexplained"] for entry in reconstruction["sites"]],
            claimed=_claim(facts.get(UNEXPLAINED), len(sites)),
            total=reconstruction["unexplained_mean"],
        ),
    ]


def _claim(value: Any, n_places: int) -> list[float] | float | None:
    """Claims as numbers; None for whatever is no number, or no number for each place."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, list | tuple) or len(value) != n_places:
        return None
    single = [_claim(item, 1) for item in value]
    return [item for item in single if isinstance(item, float)] if all(isinstance(i, float) for i in single) else None
