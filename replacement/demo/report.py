"""Measure the demo as it ships: what its language model can do, what its features mean, and how faithful its replacement is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from replacement.demo.accuracy import measure_accuracy
from replacement.demo.corpus import Behaviour, Probe, behaviours, held_out_rows
from replacement.demo.families import FAMILIES, Family
from replacement.demo.family_cases import CHOOSE, JUDGE, check_probes
from replacement.demo.family_use import FamilyUse
from replacement.demo.feature_families import GOOD, choose_features, judge_features, layer_and_index, read_firings
from replacement.files import read_json
from replacement.index.token_effects import FeatureWeights
from replacement.loading import ARTIFACTS, load
from replacement.splicing.replacement_model import ReplacementModel
from replacement.validation.fidelity import measure_fidelity

CIRCUITS = ARTIFACTS / "circuits.json"
N_PROMOTED = 3
"""Tokens named that a feature promotes."""
_ROWS_SEED = {JUDGE: 0, CHOOSE: 1}


@torch.no_grad()
def measure_demo(
    *,
    n_rows: int = 512,
    model: ReplacementModel | None = None,
    probes: str = JUDGE,
    families: Sequence[Family] = FAMILIES,
) -> dict[str, Any]:
    """Accuracy of both models on every behaviour, feature families, and fidelity on held-out rows, as plain JSON values.

    Args:
        n_rows: rows of the corpus (64 tokens each) that no training drew.
        model: a replacement model with the demo's tokenizer; the shipped one by default.
        probes: `judge` measures on probes that are used for nothing else; `choose` on those that features are chosen on, and
            by which anything else may be chosen, such as the settings of a training run.
        families: the feature families to measure.

    Raises:
        ValueError: probes that are neither `judge` nor `choose`.
    """
    check_probes(probes)
    model = load() if model is None else model
    lm = model.language_model
    skills = behaviours() if probes == JUDGE else choosing_behaviours()
    original = measure_accuracy(lm, lm.tokenizer, skills)
    replaced = measure_accuracy(model, lm.tokenizer, skills)
    rows = held_out_rows(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=_ROWS_SEED[probes])
    return {
        "probes": probes,
        "behaviours": [
            {**row._asdict(), "replacement_top1": other.top1, "replacement_probability": other.probability}
            for row, other in zip(original, replaced, strict=True)
        ],
        "families": measure_families(model, probes=probes, families=families),
        "fidelity": measure_fidelity(lm, model.crosscoder, torch.from_numpy(rows)).to_dict(),
        "circuits": shipped_circuits(model),
    }


def shipped_circuits(model: ReplacementModel) -> dict[str, Any] | None:
    """What `examples/two_hop.py` found in traced prompts, which ships with the weights; None for other weights."""
    table = read_json(CIRCUITS) if CIRCUITS.is_file() else {}
    return table if table.get("crosscoder") == model.crosscoder.fingerprint else None


def choosing_behaviours() -> tuple[Behaviour, ...]:
    """Every behaviour with the choosing cases of its first family as probes."""
    result: dict[str, Behaviour] = {}
    for family in FAMILIES:
        if family.behaviour not in result:
            asking = [case for case in family.of(CHOOSE) if case.asks]
            probes = tuple(Probe(case.prompt, family.answers(case, case.concept)) for case in asking)
            result[family.behaviour] = Behaviour(family.behaviour, family.about, probes)
    return tuple(result.values())


@torch.no_grad()
def measure_families(
    model: ReplacementModel, *, probes: str = JUDGE, families: Sequence[Family] = FAMILIES
) -> list[dict[str, Any]]:
    """What the features of every family are, how well they detect their concepts, and whether the original model uses them.

    Features are always chosen on the choosing cases.

    Args:
        model: a replacement model with the demo's tokenizer.
        probes: the cases they are measured on, `judge` or `choose`.
    """
    weights = FeatureWeights(model.language_model, model.crosscoder, n_tokens=N_PROMOTED)
    return [_measure_family(model, weights, family, probes) for family in families]


def _measure_family(model: ReplacementModel, weights: FeatureWeights, family: Family, probes: str) -> dict[str, Any]:
    choosing, cases = family.of(CHOOSE), family.of(probes)
    seen = read_firings(model, choosing)
    chosen = choose_features(seen, choosing)
    firings = seen if probes == CHOOSE else read_firings(model, cases)
    f1 = judge_features(chosen, firings, cases)
    use = FamilyUse(model, family, chosen, cases, firings)
    return {
        "name": family.name,
        "behaviour": family.behaviour,
        "about": family.about,
        "place": family.place,
        "cases": len(cases),
        "concepts": len(f1),
        "f1": fmean(f1.values()),
        "good_concepts": sum(value >= GOOD for value in f1.values()),
        "swaps": use.swaps(),
        "ablations": use.ablations(),
        "features": {
            concept: {
                "best": "/".join(map(str, layer_and_index(model, chosen.best[concept]))),
                "f1": value,
                "good": len(chosen.good[concept]),
                "promotes": _promoted(weights, chosen.best[concept]),
            }
            for concept, value in f1.items()
        },
    }


def _promoted(weights: FeatureWeights, feature: int) -> list[str]:
    group, index = divmod(feature, weights.crosscoder.n_features)
    return [token for token, _ in weights.effects(group, torch.tensor([index]))[0].promoted]
