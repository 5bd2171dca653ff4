"""Which single feature stands for each concept of a family, and how well: chosen on some cases, judged on others.

A feature is a detector of a concept at a place: it fires where its activation is above 0. Its F1 is
`2 fires on positives / (all fires + positives)`, over the cases of one set. C concepts, S active features, F features of all
layers together: feature `f` is index `f % n_features` of group `f // n_features`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from replacement.demo.accuracy import batches_by_length, token_rows
from replacement.demo.family_cases import NO_CONCEPT, Case
from replacement.splicing.replacement_model import ReplacementModel

GOOD = 0.9
"""F1 from which on a feature is said to stand for a concept."""
AS_GOOD = 0.05
"""Difference in F1 that a few cases make: of features that near the best one, that of the earliest layer stands for a concept.

Later layers read what earlier ones wrote, so they hold echoes of a concept that detect it at least as well as its origin does.
"""
_PROMPTS_AT_ONCE = 256


class Firings(NamedTuple):
    """Active features at the place of every case."""

    case_S: Tensor
    feature_S: Tensor
    activation_S: Tensor
    n_cases: int
    n_features_per_layer: int
    n_layers: int

    @property
    def n_features(self) -> int:
        """Of all layers together."""
        return self.n_layers * self.n_features_per_layer


class Scores(NamedTuple):
    """How well every feature detects every concept."""

    concepts: tuple[str, ...]
    f1_CF: Tensor
    activation_CF: Tensor
    """Mean activation over the positives that a feature fires on; 0 where it fires on none."""


@dataclass(frozen=True, slots=True)
class ChosenFeatures:
    """The features that stand for a family's concepts, chosen on its choosing cases."""

    best: Mapping[str, int]
    """Concept -> the feature of best F1 in the earliest layer that has one within `AS_GOOD` of the best of all."""
    good: Mapping[str, tuple[int, ...]]
    """Concept -> all features of F1 >= 0.9, the best one in any case."""
    activation: Mapping[tuple[str, int], float]
    """(Concept, feature) -> its mean activation where it fires on the concept."""


@torch.no_grad()
def read_firings(model: ReplacementModel, cases: Sequence[Case]) -> Firings:
    """Active features of the original model's run at the place of every case."""
    lm, crosscoder = model.language_model, model.crosscoder
    position_of = case_positions(model, cases)
    rows = token_rows(lm.tokenizer, [case.prompt for case in cases])
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for numbers, tokens_BT in batches_by_length(rows, _PROMPTS_AT_ONCE):
        activations = lm.read(tokens_BT.to(lm.device), crosscoder.wiring.read_sites)
        row_B = torch.arange(len(numbers), device=lm.device)
        position_B = torch.tensor([position_of[number] for number in numbers], device=lm.device)
        inputs = {site: x_BTD[row_B, position_B] for site, x_BTD in activations.items()}
        features = crosscoder.encode(inputs, positions=position_B)
        case_S = torch.tensor(numbers, device=lm.device)[features.row]
        parts.append((case_S, features.group * features.n_features + features.index, features.activation))
    case_S, feature_S, activation_S = (torch.cat(column) for column in zip(*parts, strict=True))
    return Firings(case_S, feature_S, activation_S, len(cases), crosscoder.n_features, crosscoder.n_groups)


def case_positions(model: ReplacementModel, cases: Sequence[Case]) -> list[int]:
    """The token position of every case's place: that of the last token of the prompt's beginning."""
    return [len(row) - 1 for row in token_rows(model.language_model.tokenizer, [case.beginning for case in cases])]


def score_features(firings: Firings, cases: Sequence[Case]) -> Scores:
    """F1 of every feature as a detector of every concept that some case has."""
    concepts = tuple(sorted({case.concept for case in cases} - {NO_CONCEPT}))
    number = {concept: place for place, concept in enumerate(concepts)} | {NO_CONCEPT: len(concepts)}
    concept_B = torch.tensor([number[case.concept] for case in cases], device=firings.case_S.device)
    C, F = len(concepts) + 1, firings.n_features
    key_S = concept_B[firings.case_S] * F + firings.feature_S
    fires_CF = torch.bincount(key_S, minlength=C * F).view(C, F).float()
    summed_CF = torch.bincount(key_S, weights=firings.activation_S.double(), minlength=C * F).view(C, F)
    positives_C1 = torch.bincount(concept_B, minlength=C)[:, None]
    f1_CF = 2 * fires_CF / (fires_CF.sum(0) + positives_C1).clamp(min=1)
    activation_CF = (summed_CF / fires_CF.clamp(min=1)).float()
    return Scores(concepts, f1_CF[:-1], activation_CF[:-1])


def choose_features(firings: Firings, cases: Sequence[Case]) -> ChosenFeatures:
    """The features that detect every concept best, on choosing cases."""
    scores = score_features(firings, cases)
    f1_CGF = scores.f1_CF.unflatten(1, (-1, firings.n_features_per_layer))
    best_CG = f1_CGF.amax(2)
    layer_C = (best_CG >= best_CG.amax(1, keepdim=True) - AS_GOOD).int().argmax(1)  # the first of them
    index_C = f1_CGF[torch.arange(len(layer_C)), layer_C].argmax(1)
    numbers = (layer_C * firings.n_features_per_layer + index_C).tolist()
    best = dict(zip(scores.concepts, numbers, strict=True))
    good: dict[str, tuple[int, ...]] = {}
    activation: dict[tuple[str, int], float] = {}
    for concept, f1_F, activation_F in zip(scores.concepts, scores.f1_CF, scores.activation_CF, strict=True):
        good[concept] = tuple(sorted({best[concept], *(f1_F >= GOOD).nonzero()[:, 0].tolist()}))
        activation |= {(concept, feature): float(activation_F[feature]) for feature in good[concept]}
    return ChosenFeatures(best, good, activation)


def judge_features(chosen: ChosenFeatures, firings: Firings, cases: Sequence[Case]) -> dict[str, float]:
    """Concept -> F1 of the feature chosen for it, on cases that may be others; concepts without a positive are left out."""
    scores = score_features(firings, cases)
    return {
        concept: float(f1_F[chosen.best[concept]])
        for concept, f1_F in zip(scores.concepts, scores.f1_CF, strict=True)
        if concept in chosen.best
    }


def layer_and_index(model: ReplacementModel, feature: int) -> tuple[int, int]:
    """Layer and index of a feature numbered over all layers."""
    group, index = divmod(feature, model.crosscoder.n_features)
    return model.crosscoder.wiring.group_layer(group), index
