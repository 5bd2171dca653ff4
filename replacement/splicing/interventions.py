"""Interventions: features set, scaled, added to or swapped while the replacement model runs.

S active features. Positions count from the beginning-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replacement.crosscoder.features import Features

PARTS = ("mlp", "attention")
"""Parts of a language model that a crosscoder may stand in for."""
_CHANGES = ("activation", "scale", "add")


class UnknownFeatureError(ValueError):
    """An intervention names a group, position or feature that does not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """Change one feature, at one position or at all of them.

    Exactly one of `activation`, `scale` and `add` says how. Scaling an inactive feature leaves it inactive; setting and
    adding switch it on.

    Raises:
        ValueError: an unknown part, or none or several ways to change the feature.
    """

    group: int
    """Feature group; in a per-layer or cross-layer crosscoder, the layer the feature reads."""
    position: int | None
    """Token position in the prompt; None for every position, those generated later included."""
    index: int
    """Feature index in its group."""
    activation: float | None = None
    """The activation it is set to, in the crosscoder's own units; 0 suppresses it."""
    scale: float | None = None
    """Multiple of the activation it has in this run when it is reached; 0 suppresses it."""
    add: float | None = None
    """What is added to that activation."""
    part: str = "mlp"
    """Whose feature it is: of the crosscoder for the `mlp`s or of the one for `attention`."""

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"the part of an intervention must be 'mlp' or 'attention', got {self.part!r}")
        given = [name for name in _CHANGES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"an intervention needs exactly one of activation, scale and add, got {', '.join(given) or 'none'}"
            )

    @property
    def terms(self) -> tuple[float, float]:
        """`(m, c)`: the new activation is `m * current + c`."""
        if self.activation is not None:
            return 0.0, self.activation
        return (self.scale, 0.0) if self.scale is not None else (1.0, self.add or 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Intervened:
    """A run with interventions, and the same run without them.

    Features are those the crosscoder reads off the run's stream; at layers that are held, what they would be if they could
    react, but for the changed ones. Row = position in `tokens`.
    """

    tokens: Tensor
    """`[T]`, the prompt and the tokens generated."""
    logits: Tensor
    """`[T, V]`."""
    clean_logits: Tensor
    """`[T, V]`, of the same tokens."""
    features: Features
    """Of the MLPs' crosscoder."""
    clean_features: Features
    attention_features: Features | None = None
    """Of the attention crosscoder; None where attention is not replaced."""
    clean_attention_features: Features | None = None


def swap(
    features: Features, first: tuple[int, int, int], second: tuple[int, int, int], *, part: str = "mlp"
) -> tuple[Intervention, Intervention]:
    """Interventions that give each of two features the activation that the other one has.

    Args:
        features: where both activations are looked up, such as `model.localize(tokens).features`; row = position.
        first, second: (group, position, index); a feature that is not active there has activation 0.
        part: whose features they are.
    """

    def activation(group: int, position: int, index: int) -> float:
        found_S = (features.group == group) & (features.row == position) & (features.index == index)
        return float(features.activation[found_S].sum())

    return (
        Intervention(group=first[0], position=first[1], index=first[2], activation=activation(*second), part=part),
        Intervention(group=second[0], position=second[1], index=second[2], activation=activation(*first), part=part),
    )


def check_interventions(
    interventions: Iterable[Intervention], *, n_groups: int, n_positions: int, n_features: int, first_position: int = 0
) -> tuple[Intervention, ...]:
    """Return the interventions unchanged if every feature exists.

    Args:
        first_position: positions before it have no features.

    Raises:
        UnknownFeatureError: a group, position or index that does not exist.
        ValueError: a number that is not finite, or one feature changed twice.
    """
    checked = tuple(interventions)
    for one in checked:
        for name, value, first, bound in (
            ("group", one.group, 0, n_groups),
            ("position", one.position, first_position, n_positions),
            ("index", one.index, 0, n_features),
        ):
            if value is not None and not first <= value < bound:
                raise UnknownFeatureError(f"intervention on {name} {value}: expected {first} to {bound - 1}")
        if not all(abs(term) < float("inf") for term in one.terms):
            how = next(name for name in _CHANGES if getattr(one, name) is not None)
            verb = {"activation": "sets", "scale": "scales", "add": "changes"}[how]
            by = "to" if how == "activation" else "by"
            raise ValueError(
                f"intervention {verb} {one.group, one.position, one.index} {by} {getattr(one, how)}, not a finite number"
            )
    everywhere = {(one.group, one.index) for one in checked if one.position is None}
    single = [one for one in checked if one.position is not None and (one.group, one.index) in everywhere]
    if single or len({(one.group, one.position, one.index) for one in checked}) < len(checked):
        raise ValueError("two interventions set the same feature")
    return checked


def intervene(
    features: Features,
    interventions: Sequence[Sequence[Intervention]],
    *,
    group: int,
    n_positions: int,
    current: Features | None = None,
    first_position: int = 0,
) -> Features:
    """Features of one group with interventions on that group applied.

    Args:
        features: active features; row = prompt * n_positions + position.
        interventions: for each prompt of the batch its checked interventions, of any group.
        group: the group these features belong to.
        n_positions: tokens per prompt.
        current: what multiples and sums refer to, if not `features` themselves.
        first_position: positions before it have no features, whatever an intervention at every position says.
    """
    changes: list[tuple[int, int, float, float]] = []  # row, index, multiple, constant
    for prompt, own in enumerate(interventions):
        for one in own:
            if one.group == group:
                positions = range(first_position, n_positions) if one.position is None else (one.position,)
                changes += [(prompt * n_positions + position, one.index, *one.terms) for position in positions]
    if not changes:
        return features
    rows, indices, multiples, constants = zip(*changes, strict=True)
    row_S, index_S = (torch.tensor(column, device=features.row.device) for column in (rows, indices))
    now_S = _activations_at(features if current is None else current, row_S, index_S)
    value_S = now_S * now_S.new_tensor(multiples) + now_S.new_tensor(constants)
    untouched = ~torch.isin(_keys(features), row_S * features.n_features + index_S)
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


def difference(new: Features, old: Features, *, group: int) -> Features:
    """Features of one group whose activations are `new - old`; those that did not change are left out."""
    key_S, place_S = torch.cat([_keys(new), _keys(old)]).unique(return_inverse=True)
    change_S = new.activation.new_zeros(len(key_S)).index_add(0, place_S, torch.cat([new.activation, -old.activation]))
    key_S, change_S = key_S[change_S != 0], change_S[change_S != 0]
    return Features(
        torch.full_like(key_S, group),
        key_S // new.n_features,
        key_S % new.n_features,
        change_S,
        new.n_rows,
        new.n_groups,
        new.n_features,
    )


def _keys(features: Features) -> Tensor:
    return features.row * features.n_features + features.index


def _activations_at(features: Features, row_S: Tensor, index_S: Tensor) -> Tensor:
    """Activations of features of one group at (row, index) pairs; 0 where one is not active."""
    if not len(features):
        return features.activation.new_zeros(len(row_S))
    known, wanted = _keys(features), row_S * features.n_features + index_S  # rows and indices of one group rise
    place_S = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return torch.where(known[place_S] == wanted, features.activation[place_S], features.activation.new_zeros(()))
