"""What a validation allows to be trusted: for every claim a number, a rule, and whether the number keeps the rule.

The rules are conventions: they are stated beside every number, so that a reader may draw the line elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from replacement.validation.protocols import CLEAN, ERRORS_KEPT, PROPAGATED

MOST_KL, MOST_KL_OF_TAIL, MOST_KL_OF_SLICE = 0.05, 0.5, 0.1
"""Nats: the mean over tokens, the 99th percentile, and the mean over a slice."""
LEAST_AGREEMENT, MOST_UNEXPLAINED, MOST_DEAD = 0.9, 0.05, 0.25
MOST_OF_CONTROL = 0.5
"""KL as a share of the best control's."""
ROUNDING = {"float64": 1e-8, "float32": 1e-6}
"""KL of the model with its errors added back that rounding explains; `COARSE` in 16 bits."""
COARSE = 1e-2


@dataclass(frozen=True, slots=True)
class Verdict:
    """One claim about a replacement model."""

    claim: str
    """What may be trusted if the rule is kept."""
    number: float | None
    """What was measured; None where that is undefined."""
    measured: str
    """The number in words."""
    rule: str
    is_kept: bool

    @property
    def word(self) -> str:
        """`yes`, `no`, or `not measured`."""
        return "not measured" if self.number is None else "yes" if self.is_kept else "no"


def verdicts(facts: dict[str, Any]) -> list[Verdict]:
    """The verdict on every claim that the facts of a validation speak of."""
    return list(_verdicts(facts))


def headline(found: list[Verdict]) -> str:
    """How many claims may be trusted, and which not."""
    refused = [verdict.claim for verdict in found if verdict.word != "yes"]
    kept = f"{len(found) - len(refused)} of {len(found)} claims may be trusted"
    return f"{kept}. Not shown: {'; '.join(refused)}." if refused else f"{kept}."


def _at_most(claim: str, number: float | None, most: float, what: str, unit: str = " nats") -> Verdict:
    measured = "undefined" if number is None else f"{what} {number:.3g}{unit}"
    return Verdict(claim, number, measured, f"at most {most:g}{unit}", number is not None and number <= most)


def _share(claim: str, number: float | None, what: str, *, least: float = 0.0, most: float = 1.0) -> Verdict:
    measured = "undefined" if number is None else f"{what} {100 * number:.1f} %"
    rule = f"at least {100 * least:g} %" if least else f"at most {100 * most:g} %"
    return Verdict(claim, number, measured, rule, number is not None and least <= number <= most)


def _verdicts(facts: dict[str, Any]) -> Iterator[Verdict]:
    protocols, reconstruction = facts["protocols"], facts["reconstruction"]
    output = protocols[PROPAGATED]
    kl, agreement = output["kl"], output["agreement"]
    yield _at_most("it predicts what the model predicts", kl["mean"], MOST_KL, "mean KL")
    yield _share("its first choice is the model's", agreement["all"], "agreement", least=LEAST_AGREEMENT)
    unsure = agreement["right_but_unsure"]
    yield _share("also where the model is unsure", unsure, "agreement", least=LEAST_AGREEMENT)
    yield _at_most("few tokens are far off", kl["p99"], MOST_KL_OF_TAIL, "99th percentile of KL")
    alone, together = protocols[CLEAN]["kl"]["mean"], kl["mean"]
    growth = None if alone is None or together is None else max(together - alone, 0.0)
    yield _at_most("errors do not build up from layer to layer", growth, MOST_KL, "KL added by them")
    unexplained = reconstruction["unexplained"]
    yield _share("layers are reconstructed", unexplained, "variance unexplained", most=MOST_UNEXPLAINED)
    parts = reconstruction["crosscoders"]
    n_features = sum(group["n_features"] for part in parts for group in part["groups"])
    n_dead = sum(part["dead"] for part in parts)
    claim = "most features fire on this text, so that they are tested"
    yield _share(
        claim, n_dead / n_features if n_features else None, f"never fire: {n_dead:,} of {n_features:,},", most=MOST_DEAD
    )
    slices = [row for row in facts["slices"][1:] if row["kl"]["mean"] is not None]
    if slices:
        worst = max(slices, key=lambda row: row["kl"]["mean"])
        claim = "text of other kinds is predicted as well"
        yield _at_most(claim, worst["kl"]["mean"], MOST_KL_OF_SLICE, f"worst slice ({worst['name']}): KL")
    controls = [row["kl"] for row in facts["controls"] if not row["is_oracle"]]
    known = [value for value in controls[1:] if value is not None]
    if known and controls[0] is not None:
        ratio = controls[0] / min(known) if min(known) else None
        yield _share(
            "no arbitrary dictionary does as well", ratio, "KL against the best control's:", most=MOST_OF_CONTROL
        )
    if ERRORS_KEPT in protocols:
        most = ROUNDING.get(facts["model"]["dtype"].removeprefix("torch."), COARSE)
        gap = protocols[ERRORS_KEPT]["kl"]["max"]
        yield _at_most("with the errors added back it is the model", gap, most, "largest KL")
