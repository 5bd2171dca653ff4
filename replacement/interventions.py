"""Interventions: set chosen features to chosen activations while the replacement model runs.

S active features. Positions count from the beginning-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from replacement.features import Features

PARTS = ("mlp", "attention")
"""Parts of a language model that a crosscoder may stand in for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """Set one feature at one position to an activation; 0 suppresses it, and an inactive feature may be switched on.

    Raises:
        ValueError: an unknown part.
    """

    group: int
    """Feature group; in a per-layer or cross-layer crosscoder, the layer the feature reads."""
    position: int
    """Token position in the prompt."""
    index: int
    """Feature index in its group."""
    activation: float
    """The activation it is set to, in the crosscoder's own units."""
    part: str = "mlp"
    """Whose feature it is: of the crosscoder for the `mlp`s or of the one for `attention`."""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"the part of an intervention must be 'mlp' or 'attention', got {self.part!r}")


def check_interventions(
    interventions: Iterable[Intervention], *, n_groups: int, n_positions: int, n_features: int
) -> tuple[Intervention, ...]:
    """Return the interventions unchanged if every feature exists.

    Raises:
        ValueError: a group, position or index that does not exist, an activation that is not finite, or one feature set
            twice.
    """
    checked = tuple(interventions)
    for one in checked:
        for name, value, bound in (
            ("group", one.group, n_groups),
            ("position", one.position, n_positions),
            ("index", one.index, n_features),
        ):
            if not 0 <= value < bound:
                raise ValueError(f"intervention on {name} {value}: expected 0 to {bound - 1}")
        if not abs(one.activation) < float("inf"):
            raise ValueError(f"intervention sets {one.group, one.position, one.index} to {one.activation}")
    if len({(one.group, one.position, one.index) for one in checked}) < len(checked):
        raise ValueError("two interventions set the same feature")
    return checked


def intervene(features: Features, interventions: Sequence[Intervention], *, group: int, n_positions: int) -> Features:
    """Features of one group with the interventions on that group applied, in every prompt of the batch.

    Args:
        features: active features; row = prompt * n_positions + position.
        interventions: checked interventions, of any group.
        group: the group these features belong to.
        n_positions: tokens per prompt.
    """
    own = [one for one in interventions if one.group == group]
    if not own:
        return features
    n_prompts = features.n_rows // n_positions
    rows = [prompt * n_positions + one.position for prompt in range(n_prompts) for one in own]
    row_S = torch.tensor(rows, device=features.row.device)
    index_S = torch.tensor([one.index for one in own] * n_prompts, device=row_S.device)
    value_S = features.activation.new_tensor([one.activation for one in own] * n_prompts)
    key_S = row_S * features.n_features + index_S
    untouched = ~torch.isin(features.row * features.n_features + features.index, key_S)
    kept, on = features.select(untouched), value_S != 0
    return Features.from_unsorted(
        torch.cat([kept.group, torch.full_like(row_S[on], group)]),
        torch.cat([kept.row, row_S[on]]),
        torch.cat([kept.index, index_S[on]]),
        torch.cat([kept.activation, value_S[on]]),
        n_rows=features.n_rows,
        n_groups=features.n_groups,
        n_features=features.n_features,
    )
