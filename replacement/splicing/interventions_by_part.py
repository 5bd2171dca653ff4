"""Interventions on a replacement model, taken apart by the crosscoder whose features they change, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.splicing.feature_changes import Change, change_of
from replacement.splicing.intervention import Intervention, check_interventions


def interventions_by_part(
    interventions: Iterable[Intervention], crosscoders: Mapping[str, Crosscoder], *, n_positions: int
) -> dict[str, tuple[Intervention, ...]]:
    """Interventions on the features of each crosscoder, checked.

    Args:
        crosscoders: by part, those that are in place.
        n_positions: tokens of the prompt.

    Raises:
        UnknownFeatureError: a layer, index or position that does not exist.
        ValueError: something other than interventions, or one on a part without a crosscoder.
    """
    by_part: dict[str, list[Intervention]] = {part: [] for part in crosscoders}
    if not isinstance(interventions, Iterable):
        raise ValueError(f"interventions must be a list of Intervention, got {type(interventions).__name__}")
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise ValueError(f"interventions must be a list of Intervention, got one that holds {intervention!r:.50}")
        if intervention.part not in by_part:
            raise ValueError(
                f"an intervention sets a feature of {intervention.part}, which is not replaced in this call"
            )
        by_part[intervention.part].append(intervention)
    return {
        part: check_interventions(
            by_part[part],
            crosscoder.wiring,
            n_features=crosscoder.n_features,
            n_positions=n_positions,
            first_position=crosscoder.undecomposed_positions,
        )
        for part, crosscoder in crosscoders.items()
    }


def check_felt(interventions: Iterable[Intervention], crosscoder: Crosscoder, sites: tuple[Site, ...]) -> None:
    """Check that interventions on a crosscoder's features reach one of the replaced sites.

    Raises:
        ValueError: one that would do nothing, because its features write to none of them.
    """
    for intervention in interventions:
        if not set(crosscoder.wiring.writes[crosscoder.wiring.group_of(intervention.layer)]) & set(sites):
            replaced = ", ".join(map(str, sites)) or "no site"
            raise ValueError(
                f"intervention on layer {intervention.layer} would do nothing: only {replaced} is replaced"
            )


def changes_of(
    by_part: Mapping[str, Sequence[Intervention]], crosscoders: Mapping[str, Crosscoder], tokens_BT: Tensor
) -> dict[str, Change | None]:
    """The same interventions in every prompt, as changes of features."""
    B, T = tokens_BT.shape
    return {part: change_of([by_part[part]] * B, crosscoder, n_positions=T) for part, crosscoder in crosscoders.items()}
