"""Whether the original model uses the features of a family: swaps and ablations in its own run.

The model's own MLPs run; the change of what the changed features write is added to their outputs. Features are changed at one
token, the place of the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from replacement.demo.accuracy import answer_ids, batches_by_length, token_rows
from replacement.demo.families import Family
from replacement.demo.family_cases import NO_CONCEPT, Case
from replacement.demo.feature_families import ChosenFeatures, Firings, case_positions, layer_and_index
from replacement.splicing.clean_run import CleanRun, Conditions
from replacement.splicing.feature_changes import change_of
from replacement.splicing.intervention import Intervention
from replacement.splicing.replacement_model import ReplacementModel

N_SWAPS, N_ABLATIONS = 40, 200
SMALLEST = 1e-9
"""Probability below which log odds are not told apart."""
_SEED = 14
_PROMPTS_AT_ONCE = 128


class Change(NamedTuple):
    """Features of one case set to new activations at the family's place."""

    case: Case
    activation: Mapping[int, float]
    """Feature, numbered over all layers -> its new activation."""


@torch.no_grad()
def next_token_probabilities(model: ReplacementModel, changes: Sequence[Change]) -> Tensor:
    """`[B, V]`, what the original model answers with features changed."""
    lm, crosscoder = model.language_model, model.crosscoder
    cases = [change.case for change in changes]
    positions = case_positions(model, cases)
    p_BV = torch.zeros(len(cases), lm.vocabulary_size, dtype=torch.float64)
    rows = token_rows(lm.tokenizer, [case.prompt for case in cases])
    for numbers, tokens_BT in batches_by_length(rows, _PROMPTS_AT_ONCE):
        interventions = [
            [
                Intervention(layer=layer, index=index, position=positions[number], activation=value)
                for feature, value in changes[number].activation.items()
                for layer, index in [layer_and_index(model, feature)]
            ]
            for number in numbers
        ]
        change = change_of(interventions, crosscoder, n_positions=tokens_BT.shape[1])
        run = CleanRun(lm, {"mlp": crosscoder}, tokens_BT.to(lm.device)).run(
            Conditions(errors="drop", mlps="original"), {"mlp": change}
        )
        p_BV[numbers] = run.logits_BTV[:, -1].double().softmax(-1).cpu()
    return p_BV


class FamilyUse:
    """Swaps and ablations of one family's chosen features, on cases that the model answers rightly."""

    def __init__(
        self, model: ReplacementModel, family: Family, chosen: ChosenFeatures, cases: Sequence[Case], firings: Firings
    ) -> None:
        """Ask all cases that ask for something."""
        self.model, self.family, self.chosen = model, family, chosen
        asking = [number for number, case in enumerate(cases) if case.asks and self._is_known(case.concept)]
        p_BV = next_token_probabilities(model, [Change(cases[number], {}) for number in asking])
        self.n_asked = len(asking)
        self._top = {number: int(top) for number, top in zip(asking, p_BV.argmax(1), strict=True)}
        self._cases, self._firings = cases, firings
        right = [
            number for number in asking if self._top[number] in self._answers(cases[number], cases[number].concept)
        ]
        order = np.random.default_rng(_SEED).permutation(len(right)).tolist()
        self._right = [right[place] for place in order]

    def swaps(self) -> dict[str, Any]:
        """Share of pairs whose answer becomes the other concept's when one concept's feature is switched off, the other's on.

        A pair is a case that the model answers rightly and another concept for which that answer would be wrong. The other
        concept's feature gets its mean activation over the choosing cases of that concept that it fires on.
        """
        rng = np.random.default_rng(_SEED)
        targets = sorted({self._cases[number].concept for number in self._top})
        pairs = []
        for number in self._right:
            case, target = self._cases[number], targets[int(rng.integers(len(targets)))]
            if target != case.concept and self._top[number] not in self._answers(case, target):
                pairs.append((case, target))
        pairs = pairs[:N_SWAPS]

        def share(features_of: Callable[[str], Sequence[int]]) -> float | None:
            changes = []
            for case, target in pairs:
                on = {feature: self.chosen.activation[target, feature] for feature in features_of(target)}
                changes.append(Change(case, {**dict.fromkeys(features_of(case.concept), 0.0), **on}))
            top = next_token_probabilities(self.model, changes).argmax(1).tolist() if changes else []
            followed = [answer in self._answers(*pair) for answer, pair in zip(top, pairs, strict=True)]
            return fmean(followed) if followed else None

        best, good = self.chosen.best, self.chosen.good
        return {
            "pairs": len(pairs),
            "best_feature": share(lambda concept: () if concept == NO_CONCEPT else (best[concept],)),
            "good_features": share(lambda concept: good.get(concept, ())),
        }

    def ablations(self) -> dict[str, Any]:
        """What ablating the concept's features costs, and what as many other active features of the same token cost.

        Log odds, `log(p / (1 - p))` in nats, show what an answer near certainty loses.
        """
        numbers = [number for number in self._right if self._cases[number].concept != NO_CONCEPT][:N_ABLATIONS]
        rng = np.random.default_rng(_SEED)
        none, of_family, control = [], [], []
        for number in numbers:
            case = self._cases[number]
            active = self._firings.feature_S[self._firings.case_S == number].tolist()
            good = [feature for feature in active if feature in self.chosen.good[case.concept]]
            others = [feature for feature in active if feature not in good]
            drawn = [others[i] for i in rng.permutation(len(others))[: len(good)].tolist()]
            none.append(Change(case, {}))
            of_family.append(Change(case, dict.fromkeys(good, 0.0)))
            control.append(Change(case, dict.fromkeys(drawn, 0.0)))
        facts: dict[str, Any] = {"probes": len(numbers)}
        for name, changes in (("none", none), ("family", of_family), ("control", control)):
            facts |= {f"{fact}_{name}": value for fact, value in self._answered(changes).items()}
        facts["features"] = fmean(len(change.activation) for change in of_family) if of_family else None
        return facts

    def _answered(self, changes: Sequence[Change]) -> dict[str, float | None]:
        """Share of cases still answered rightly, and means of the right answers' probability and its log odds."""
        right: list[float] = []
        probability: list[float] = []
        log_odds: list[float] = []
        for change, p_V in zip(changes, next_token_probabilities(self.model, changes), strict=True) if changes else ():
            answers = self._answers(change.case, change.case.concept)
            p = float(p_V[answers].sum())
            right.append(int(p_V.argmax()) in answers)
            probability.append(p)
            log_odds.append(math.log(max(p, SMALLEST) / max(1 - p, SMALLEST)))
        columns = {"right": right, "probability": probability, "log_odds": log_odds}
        return {name: fmean(values) if values else None for name, values in columns.items()}

    def _is_known(self, concept: str) -> bool:
        return concept == NO_CONCEPT or concept in self.chosen.best

    def _answers(self, case: Case, concept: str) -> list[int]:
        return answer_ids(self.model.language_model.tokenizer, self.family.answers(case, concept))
