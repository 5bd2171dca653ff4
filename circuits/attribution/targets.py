"""What a circuit is traced from: top logits, named tokens, token differences, features; at any position.

T tokens, D d_model, V vocabulary, N targets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeGuard

import torch
from torch import Tensor

from circuits.graph.text import parse_feature_name
from replacement import LanguageModel, LocalReplacement, ReplacementModel
from replacement.number_checks import integer
from replacement.splicing.intervention import PARTS
from replacement.token_texts import visible

TOP_PROBABILITY = 0.95
TOP_LOGITS = 10
_FEATURE = re.compile(r"(feature|attention):\S*/\S*")  # well formed or not; `2/345` alone is a text


@dataclass(frozen=True, slots=True)
class TokenTarget:
    """The logit of one token above the mean logit: direction `W_U[:, v] - mean_v W_U`."""

    token: str | int
    """Text of a single token, or its id."""
    position: int = -1
    """Position whose prediction is explained; negative counts from the end."""


@dataclass(frozen=True, slots=True)
class DifferenceTarget:
    """The logit of one token minus that of another."""

    plus: str | int
    minus: str | int
    position: int = -1


@dataclass(frozen=True, slots=True)
class FeatureTarget:
    """The pre-activation of one active feature."""

    layer: int
    index: int
    position: int = -1
    part: str = "mlp"
    """Whose feature it is: of the crosscoder for the `mlp`s or of the one for `attention`."""

    def __str__(self) -> str:
        prefix = "attention:" if self.part == "attention" else ""
        return f"{prefix}{self.layer}/{self.index}@{self.position}"


Target = TokenTarget | DifferenceTarget | FeatureTarget


@dataclass(frozen=True, slots=True)
class LogitTarget:
    """A resolved logit target, ready for transport."""

    direction_D: Tensor
    value: float
    """The logit (demeaned) or the difference, from the original model."""
    bias: float
    """The unembedding's own part of the value."""
    position: int
    token_id: int
    """Vocabulary id; -1 for a difference."""
    label: str
    probability: float
    """Probability of the token; 0 for a difference."""
    token_ids: tuple[int, int] | None = None
    """Both tokens of a difference."""

    def read(self, logits_BV: Tensor) -> Tensor:
        """The target's value in rows of logits: of the token above their mean, or the difference of two tokens, `[B]`."""
        plus, minus = self.token_ids or (self.token_id, None)
        return logits_BV[:, plus] - (logits_BV.mean(-1) if minus is None else logits_BV[:, minus])


def parse_target(text: str) -> Target:
    """Read a target as the command line writes it.

    `Austin`, `Austin@5`, `Austin - Houston`, `feature:2/345@7` (layer/index@position; positions count from 0, the
    beginning-of-sequence token included), `attention:2/345@7` for a feature of the attention crosscoder. A token is taken
    with its leading space where the vocabulary has it so.

    Raises:
        ValueError: empty text.
    """
    if _FEATURE.fullmatch(text.strip()):
        return parse_feature(text)
    body, position = text, -1
    if match := re.fullmatch(r"(.+)@(-?\d{1,40})\s*", text, re.DOTALL):
        body, position = match.group(1), int(match.group(2))
    if not body.strip():
        raise ValueError("a target is empty: expected 'token', 'token - token' or 'feature:layer/index'")
    plus, minus_sign, minus = body.partition(" - ")
    if minus_sign and plus.strip() and minus.strip():
        return DifferenceTarget(plus, minus, position)
    return TokenTarget(body, position)


def parse_feature(text: str) -> FeatureTarget:
    """Read the name of a feature: `2/345@7` (layer/index@position), `attention:2/345@7`; without a position, the last one.

    Raises:
        ValueError: another form.
    """
    part, layer, index, position = parse_feature_name(text)
    return FeatureTarget(layer, index, position, part=part)


def as_target(target: object) -> Target:
    """Texts are parsed, numbers are token ids, targets stay as they are; anything else raises `ValueError`."""
    if isinstance(target, str):
        return parse_target(target)
    if isinstance(target, TokenTarget | DifferenceTarget | FeatureTarget):
        return target
    if _is_whole(target):
        return TokenTarget(int(target))
    raise ValueError(f"cannot read target {target!r}: expected a text, a token id or one of the target types")


def active_feature(target: FeatureTarget, local: LocalReplacement) -> int:
    """Number of a feature target among the active features of all parts.

    Raises:
        ValueError: no such part, layer or position, or the feature is not active there.
    """
    position = check_position(target.position, local.n_positions)
    layer, wanted = integer("the layer of a target", target.layer), integer("the index of a target", target.index)
    if target.part not in PARTS:
        raise ValueError(f"the part of a target must be 'mlp' or 'attention', got {target.part!r}")
    if target.part == "attention" and local.attention is None:
        raise ValueError("there are no attention features: load the model with an attention crosscoder")
    part = local.decompositions[PARTS.index(target.part)]
    wiring, features = part.crosscoder.wiring, part.features
    groups = [g for g in range(wiring.n_groups) if wiring.group_layer(g) == layer]
    if not groups:
        raise ValueError(f"the crosscoder has no features in layer {layer}")
    index = wanted if 0 <= wanted < part.crosscoder.n_features else -1  # which no feature has
    found = (features.group == groups[0]) & (features.row == position) & (features.index == index)
    if not bool(found.any()):
        kind = "attention feature" if target.part == "attention" else "feature"
        raise ValueError(f"{kind} {layer}/{wanted} is not active at position {position}")
    return int(torch.nonzero(found)[0, 0]) + (len(local.features) if target.part == "attention" else 0)


def top_logits(local: LocalReplacement, *, position: int = -1) -> list[TokenTarget]:
    """The most probable tokens until their probability sums to 0.95, at most 10."""
    probability_V = local.probabilities[position]
    top = torch.topk(probability_V, min(TOP_LOGITS, len(probability_V)))
    before = torch.cumsum(top.values, 0) - top.values
    kept = top.indices[before < TOP_PROBABILITY]
    return [TokenTarget(int(token), position) for token in kept]


def resolve_logit(target: TokenTarget | DifferenceTarget, local: LocalReplacement, lm: LanguageModel) -> LogitTarget:
    """Direction, value and constant part of a logit target.

    Raises:
        ValueError: an unknown token, two equal tokens, or a position outside the prompt.
    """
    position = check_position(target.position, local.n_positions)
    logits_V = local.frozen.logits_TV[position]
    if isinstance(target, TokenTarget):
        token = _token_id(target.token, lm)
        (read_D, bias), (other_D, mean_bias) = local.unembedding.token(token), local.unembedding.mean()
        value, bias = logits_V[token] - logits_V.mean(), bias - mean_bias
        label, probability = lm.token_strings([token])[0], float(local.probabilities[position, token])
        pair = None
    else:
        token, minus = _token_id(target.plus, lm), _token_id(target.minus, lm)
        if token == minus:
            raise ValueError(f"a difference needs two different tokens, got {target.plus!r} twice")
        (read_D, bias), (other_D, minus_bias) = local.unembedding.token(token), local.unembedding.token(minus)
        value, bias = logits_V[token] - logits_V[minus], bias - minus_bias
        label, probability = " − ".join(map(visible, lm.token_strings([token, minus]))), 0.0
        token, pair = -1, (token, minus)
    return LogitTarget(read_D - other_D, float(value), float(bias), position, token, label, probability, pair)


def check_position(position: int, n_positions: int, *, name: str = "target") -> int:
    """Position counted from the start.

    Args:
        name: whose position it is, for messages.

    Raises:
        ValueError: it is no whole number, or lies outside the prompt.
    """
    if not -n_positions <= integer(f"{name} position", position) < n_positions:
        raise ValueError(f"{name} position {position} lies outside the prompt of {n_positions} tokens")
    return position % n_positions


def check_model(model: object) -> None:
    """Raise `ValueError` for anything but a replacement model, such as its name."""
    if not isinstance(model, ReplacementModel):
        raise ValueError(f"expected a replacement model, as replacement.load gives it, got {model!r:.50}")


def output_weights(targets: Sequence[LogitTarget]) -> list[float]:
    """Share of the output each logit stands for: probabilities normalised, or equal parts where one has none."""
    probabilities = [target.probability for target in targets]
    if len(targets) > 1 and all(p > 0 for p in probabilities):
        return [p / sum(probabilities) for p in probabilities]
    return [1 / len(targets)] * len(targets)


def _token_id(token: str | int, lm: LanguageModel) -> int:
    if isinstance(token, str):
        return lm.token_id(token)
    if not _is_whole(token):
        raise ValueError(f"expected the text of a token or its id, got {token!r}")
    if not 0 <= token < lm.vocabulary_size:
        raise ValueError(f"token id {token} lies outside [0, {lm.vocabulary_size})")
    return token


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
