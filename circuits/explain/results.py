"""Does a claim hold? What a trial did to a group, with an interval, against the sign that the claim gives it.

Effects are medians over the variants of a trial (other prompts, random tokens). Their interval is one of 90 %, as a claim says
a direction: 5 % are left on its side. It assumes nothing about how effects are distributed:

- of features, the effect in excess of controls, `effect - quantiles of the controls' effects`: if the group were but another
  random direction of its size, the interval would lie on the claim's side of 0 in 5 % of cases. That is stricter than a test
  against 0, as any large change lowers the answer's logit;
- of tokens, the order statistics of the variants that hold the population's median with at least 90 %. Fewer than five variants
  have no such interval, and the sign of the median alone counts.

A claim holds in a trial if the effect has its sign, and the interval (if there is one) lies on the same side of 0.

A graph is the replacement model made linear at one prompt: attention patterns, norms and the set of active features held. So
every trial is run in the replacement model first, with all of these live. A claim that this does not bear out is withheld: it
is one of the linear picture alone. What is told is then tested in the original model, whose MLPs the replacement model does not
have. `is_borne_out` asks more than the tests do, so that what is told has a margin: no control at all may do as much.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from circuits.explain.claims import Claim
from circuits.explain.trials import OtherPrompt, Trial, Trials

CONFIDENCE = 0.9
LEAST_PREDICTED = 0.5
"""Another prompt is no trial of a claim where the graph predicts less than this share of what it predicts of ablation: the
group keeps too much of its value there."""
VERDICTS = ("held", "refuted", "untested")
"""What is found of a claim; see `verdict`."""
CONDITIONS = {"constrained": "constrained", "live": "original"}
"""Condition -> patching of `circuits.validation.effects`: all outputs held but for what the group writes, or the original
model running on behind it. Attention patterns and norms are live in both."""
IN_REPLACEMENT = {"constrained": "constrained", "live": "propagated"}
"""The same conditions in the replacement model: its features react instead of the original MLPs. Where all outputs are held
no MLP runs, and both models do the same."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one trial of one claim under one condition; effects as in `circuits.explain.claims.readings`."""

    trial: str
    """`ablated` or `set`."""
    condition: str
    """`constrained` or `live`."""
    predicted: float
    """By the graph: direct edges where constrained, all paths where live; no activation falls below 0."""
    replacement: float
    """What the replacement model does, median over the variants."""
    is_borne_out: bool
    """Whether that is an effect as claimed: of features larger than that of every control; of tokens as the tests ask."""
    measured: float
    """What the original model does, median over the variants."""
    interval: tuple[float, float] | None
    variants: int
    outcome: str
    """`held`, `wrong sign`, or `within noise`: within the noise, which is what controls do or how variants differ."""


def try_claims(trials: Trials, claims: Sequence[Claim], others: Sequence[OtherPrompt]) -> list[list[Result]]:
    """The results of every claim; none for claims about sources that cannot be changed."""
    results: list[list[Result]] = [[] for _ in claims]
    by_source = defaultdict(list)
    for number, claim in enumerate(claims):
        by_source[claim.edge.source].append(number)
    for source, numbers in by_source.items():
        ablated = trials.ablated(source)
        if ablated is None:
            continue
        of_ablation_G = trials.predicted(ablated, total=False)[0]
        for trial in filter(None, (ablated, trials.set_to(source, others))):
            direct_BG = trials.predicted(trial, total=False)
            is_test_BG = direct_BG * np.sign(of_ablation_G) >= LEAST_PREDICTED * np.abs(of_ablation_G)
            for condition, patching in CONDITIONS.items():
                predicted_BG = trials.predicted(trial, total=condition == "live")
                measured_BG = replacement_BG = trials.measured(trial, patching)
                if IN_REPLACEMENT[condition] != patching:
                    replacement_BG = trials.measured(trial, IN_REPLACEMENT[condition])
                for number in numbers:
                    target = claims[number].edge.target
                    chosen = is_test_BG[:, target]
                    if chosen.any():
                        columns = predicted_BG[chosen, target], replacement_BG[:, target], measured_BG[:, target]
                        results[number].append(_judge(claims[number], trial, condition, chosen, *columns))
    return results


def is_told(results: Sequence[Result]) -> bool:
    """Whether the replacement model bears a claim out in all of its trials; claims that cannot be tried are told."""
    return all(result.is_borne_out for result in results)


def _judge(
    claim: Claim,
    trial: Trial,
    condition: str,
    chosen_B: np.ndarray,
    predicted_B: np.ndarray,
    replacement_B: np.ndarray,
    measured_B: np.ndarray,
) -> Result:
    """One result; `chosen_B` are the variants that count, the two last have the controls behind the variants."""
    (expected, beyond_all), (measured, interval) = (
        _effect(trial, chosen_B, values_B, confidence)
        for values_B, confidence in ((replacement_B, 1.0), (measured_B, CONFIDENCE))
    )
    return Result(
        trial=trial.name,
        condition=condition,
        predicted=float(np.median(predicted_B)),
        replacement=expected,
        is_borne_out=outcome(-claim.sign, expected, beyond_all) == "held",
        measured=measured,
        interval=interval,
        variants=int(chosen_B.sum()),
        outcome=outcome(-claim.sign, measured, interval),
    )


def _effect(
    trial: Trial, chosen_B: np.ndarray, values_B: np.ndarray, confidence: float
) -> tuple[float, tuple[float, float] | None]:
    """Median over the variants that count, and its interval: in excess of controls at the confidence, or of the median."""
    variants, controls = np.split(values_B, [len(trial.edits)])
    variants, controls = variants[chosen_B], controls[chosen_B[np.arange(len(controls)) % len(chosen_B)]]
    effect = float(np.median(variants))
    return effect, excess_interval(effect, controls, confidence) if len(controls) else median_interval(variants)


def verdict(results: Sequence[Result]) -> str:
    """`held` if a claim held in all of its tests, `refuted` if it did not in one, `untested` without any."""
    if not results:
        return "untested"
    return "held" if all(result.outcome == "held" for result in results) else "refuted"


def outcome(sign: int, measured: float, interval: tuple[float, float] | None) -> str:
    """`held` where effect and interval have the expected sign, `wrong sign` where both have the other, else `within noise`."""
    signs = {np.sign(value) * sign for value in (measured, *(interval or ()))}
    return "held" if signs == {1} else "wrong sign" if signs == {-1} else "within noise"


def excess_interval(effect: float, controls: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The effect minus what controls do; with a confidence of 1, minus the smallest and the largest of them."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(controls, [tail, 1 - tail])
    return effect - float(high), effect - float(low)


def median_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Order statistics between which the median of the population lies with the confidence; None for fewer than five values.

    `P(x_(k) <= median <= x_(n+1-k)) >= 1 - 2 P(Binomial(n, 1/2) < k)`.
    """
    n, below, rank = len(values), 0.0, 0
    while rank < n and 2 * (below + math.comb(n, rank) / 2**n) <= 1 - CONFIDENCE:
        below += math.comb(n, rank) / 2**n
        rank += 1
    ordered = np.sort(values)
    return (float(ordered[rank - 1]), float(ordered[n - rank])) if rank else None
