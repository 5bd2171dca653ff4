"""Changes of sparse features: interventions applied to a table of them, differences of two tables, swaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.splicing.intervention import PARTS, Intervention
from replacement.splicing.local_replacement import LocalReplacement

Change = Callable[[int, Features, Features], Features]
"""`change(group, features, current)`: the features of a group (row = prompt * T + position) with some of them changed;
`current` holds the activations that multiples and sums refer to."""


def change_of(
    interventions: Sequence[Sequence[Intervention]], crosscoder: Crosscoder, *, n_positions: int
) -> Change | None:
    """Interventions as a function of features; None where there are none.

    Args:
        interventions: for each prompt of the batch those on its features, checked.
        crosscoder: whose features they are.
        n_positions: tokens per prompt.
    """
    first = crosscoder.undecomposed_positions
    by_group: dict[int, list[tuple[int, int, float, float]]] = {}  # (row, index, multiple, constant)
    for prompt, of_prompt in enumerate(interventions):
        for intervention in of_prompt:
            changes = by_group.setdefault(crosscoder.wiring.group_of(intervention.layer), [])
            everywhere = range(first, n_positions)
            for position in everywhere if intervention.position is None else (intervention.position,):
                changes.append((prompt * n_positions + position, intervention.index, *intervention.terms))

    def change(group: int, features: Features, current: Features) -> Features:
        return _with_changes(features, current, group, by_group[group]) if group in by_group else features

    return change if by_group else None


def _with_changes(
    features: Features, current: Features, group: int, changes: Sequence[tuple[int, int, float, float]]
) -> Features:
    rows, indices, multiples, constants = zip(*changes, strict=True)
    row_P, index_P = (torch.tensor(column, device=features.row.device) for column in (rows, indices))
    current_P = activations_at(current, row_P, index_P)
    value_P = current_P * current_P.new_tensor(multiples) + current_P.new_tensor(constants)
    untouched = features.select(~torch.isin(_keys(features), row_P * features.n_features + index_P))
    on_P = value_P != 0
    return Features.from_unsorted(
        torch.cat([untouched.group, torch.full_like(row_P[on_P], group)]),
        torch.cat([untouched.row, row_P[on_P]]),
        torch.cat([untouched.index, index_P[on_P]]),
        torch.cat([untouched.activation, value_P[on_P]]),
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


def repeat_prompt(features: Features, n_copies: int) -> Features:
    """The features of one prompt, repeated for every copy of it; row = copy * T + position."""
    starts = torch.arange(n_copies, device=features.row.device) * features.n_rows
    return Features.from_unsorted(
        features.group.repeat(n_copies),
        (features.row + starts[:, None]).flatten(),
        features.index.repeat(n_copies),
        features.activation.repeat(n_copies),
        n_rows=features.n_rows * n_copies,
        n_groups=features.n_groups,
        n_features=features.n_features,
    )


def activations_at(features: Features, row_P: Tensor, index_P: Tensor) -> Tensor:
    """Activations of features of one group at (row, index) pairs; 0 where one is not active."""
    if not len(features):
        return features.activation.new_zeros(row_P.shape)
    known, wanted = _keys(features), row_P * features.n_features + index_P  # rows and indices of one group rise
    place_P = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    return torch.where(known[place_P] == wanted, features.activation[place_P], features.activation.new_zeros(()))


def _keys(features: Features) -> Tensor:
    return features.row * features.n_features + features.index


def swap(
    local: LocalReplacement, first: tuple[int, int, int], second: tuple[int, int, int], *, part: str = "mlp"
) -> tuple[Intervention, Intervention]:
    """Interventions that give each of two features the activation that the other one has on a prompt.

    Args:
        local: the prompt, `model.localize(tokens)`.
        first, second: (layer, index, position); a feature that is not active there has activation 0.
        part: whose features they are.
    """
    decomposition = local.decompositions[PARTS.index(part)]
    features, wiring = decomposition.features, decomposition.crosscoder.wiring

    def activation(layer: int, index: int, position: int) -> float:
        row, column = features.row.new_tensor([position]), features.row.new_tensor([index])
        return float(activations_at(features.of(wiring.group_of(layer)), row, column))

    def given(feature: tuple[int, int, int], value: float) -> Intervention:
        layer, index, position = feature
        return Intervention(layer=layer, index=index, position=position, activation=value, part=part)

    return given(first, activation(*second)), given(second, activation(*first))
