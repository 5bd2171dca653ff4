"""How well each credit rule predicts what a feature loses when a head's contribution is removed in the model itself.

Features are drawn at random among the active ones. For each, and for every head below it, the head's contribution is
removed at the feature's position, and the loss `a_clean - a_removed` of the feature's activation is measured on three rungs:

| rung   | what is removed from                     | what may react                                                     |
|--------|------------------------------------------|--------------------------------------------------------------------|
| direct | what the feature itself reads            | nothing: `ablation` is exact here by construction, a self-check    |
| frozen | the residual stream behind the head      | MLPs, norms, later heads' values; patterns stay as they were       |
| live   | the same                                 | everything                                                         |

Removing a head sets its `attn_z` at that position to what biases alone make of it (zero in models without any), which is
the part of the head that `circuits.heads.feature_heads` counts as bias. Activations are those the crosscoder computes on the
stream that results, in competition with all other features where the activation function is TopK.

P (feature, head) pairs, B copies of a prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Group
from torch import Tensor

from circuits.heads.feature_heads import HeadView, HeadViews
from circuits.heads.relu_credit import RULES
from replacement import Crosscoder, LanguageModel, LocalReplacement, Lorsa, ReplacementModel, Site
from replacement.console import section, table
from replacement.language_model.language_model import EnoughSeen, Hook
from replacement.language_model.prompts import Prompt
from replacement.notebook import repr_html
from replacement.splicing.intervention import PARTS

RUNGS: tuple[str, ...] = ("direct", "frozen", "live")
NON_TRIVIAL = 0.1
"""Features are drawn among those whose heads hold at least this share of their contributions' summed magnitudes."""
TOKENS_AT_ONCE = 8192
"""Tokens of all copies of a prompt that run together: bounds memory."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadCheck:
    """Predicted and measured losses of activation, one per (feature, head) pair."""

    n_prompts: int
    n_features: int
    predicted: dict[str, np.ndarray]
    """Rule -> float64[P], the head's credit."""
    measured: dict[str, np.ndarray]
    """Rung -> float64[P], `a_clean - a_removed`."""

    def __repr__(self) -> str:
        return f"HeadCheck({self.n_pairs} pairs of feature and head, {self.n_features} features)"

    def __rich__(self) -> Group:
        rows = (
            (rule, *(f"{of(rule, rung):.3f}" for rung in RUNGS for of in (self.correlation, self.relative_error)))
            for rule in self.predicted
        )
        heads = (f"{rung}: {figure}" for rung in RUNGS for figure in ("correlation", "relative error"))
        title = f"Credit against measured removals, {self.n_pairs:,} pairs of feature and head"
        return section(title, table("rule", *heads, rows=rows))

    _repr_html_ = repr_html

    @property
    def n_pairs(self) -> int:
        """P."""
        return len(self.measured[RUNGS[0]])

    def correlation(self, rule: str, rung: str) -> float:
        """Pearson's correlation over all pairs; NaN where one side does not vary."""
        predicted_P, measured_P = self.predicted[rule], self.measured[rung]
        if self.n_pairs < 2 or not predicted_P.std() or not measured_P.std():
            return float("nan")
        return float(np.corrcoef(predicted_P, measured_P)[0, 1])

    def relative_error(self, rule: str, rung: str) -> float:
        """`sum |predicted - measured| / sum |measured|`; NaN where nothing was lost."""
        lost = float(np.abs(self.measured[rung]).sum())
        return float(np.abs(self.predicted[rule] - self.measured[rung]).sum()) / lost if lost else float("nan")


def check_heads(model: ReplacementModel, prompts: Sequence[Prompt], *, n_features: int = 4, seed: int = 0) -> HeadCheck:
    """Remove heads one by one and compare what features lose with each rule's credit.

    Args:
        model: language model with a crosscoder spliced in.
        prompts: several prompts, each a text, a list of token ids or a 1-D tensor of them.
        n_features: features drawn per prompt, behind its first position (which is the same in every prompt).
        seed: of the draw.

    Raises:
        ValueError: no prompts, fewer than one feature, a prompt the model cannot read, no feature that reads heads, or features
            that credit does not divide: chosen over all layers together, or scaled and shifted after their choice.
        IdentityError: the heads, direct stream and bias of a feature do not sum to its pre-activation.
    """
    if isinstance(prompts, str):
        raise ValueError("expected a list of prompts, given a single one")
    if not prompts:
        raise ValueError("expected at least one prompt, given none")
    if n_features < 1:
        raise ValueError(f"n_features must be 1 or more, got {n_features}")
    if any(crosscoder.activation.affine for crosscoder in model.crosscoders.values()):
        raise ValueError(
            "cannot check credit for activations that are scaled and shifted: it divides those in front of that"
        )
    lm, rng = model.language_model, np.random.default_rng(seed)
    predicted: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    measured: dict[str, list[np.ndarray]] = {rung: [] for rung in RUNGS}
    for prompt in prompts:
        with torch.no_grad():
            local = model.localize(lm.tokens(prompt))
            views = _draw(local, n_features, rng)
            remaining = {"direct": [direct_removals(local, view) for view in views], **_rerun(lm, local, views)}
        for rule in RULES:
            predicted[rule] += [view.credit(rule).credit_J[:-1] for view in views]
        for rung in RUNGS:
            measured[rung] += [view.activation - acts for view, acts in zip(views, remaining[rung], strict=True)]
    n_drawn = len(measured["direct"])
    if not n_drawn:
        raise ValueError("no active feature of these prompts reads attention heads behind the first position")
    return HeadCheck(
        n_prompts=len(prompts),
        n_features=n_drawn,
        predicted={rule: np.concatenate(parts) for rule, parts in predicted.items()},
        measured={rung: np.concatenate(parts) for rung, parts in measured.items()},
    )


def _draw(local: LocalReplacement, n_features: int, rng: np.random.Generator) -> list[HeadView]:
    """Views of features drawn at random among those that read heads of the model, where these are not trivial."""
    views = HeadViews(local, ("",) * local.n_positions)
    parts = [part for part in local.decompositions if not isinstance(part.crosscoder, Lorsa)]
    behind_first = ((part, torch.nonzero(part.features.row > 0)[:, 0].tolist()) for part in parts)
    candidates = [(part, number) for part, numbers in behind_first for number in numbers]
    drawn: list[HeadView] = []
    for place in rng.permutation(len(candidates)):
        if len(drawn) == n_features:
            break
        view = views.of(*candidates[place])
        size_J = np.abs(view.contributions)
        if size_J[:-1].sum() >= NON_TRIVIAL * max(float(size_J.sum()), 1e-30):
            drawn.append(view)
    return drawn


def direct_removals(local: LocalReplacement, view: HeadView) -> np.ndarray:
    """float64[J - 1], a feature's activation when only what it reads itself loses one head's contribution.

    The crosscoder's activation function chooses anew among all features of the group; the others stay as they were.
    """
    crosscoder, group = _crosscoder_of(local, view)
    position, index = view.feature.position, view.feature.index
    inputs = {site: local.frozen.activations[site][position : position + 1] for site in crosscoder.wiring.reads[group]}
    pre_F = crosscoder.pre_activations(inputs, group)[0]
    lost_J = torch.from_numpy(view.contributions[:-1]).to(pre_F)
    pre_JF = pre_F.repeat(len(lost_J), 1)
    pre_JF[:, index] = view.pre_activation - lost_J
    row_S, index_S = crosscoder.select(pre_JF, group)
    activation_S = crosscoder.activations(pre_JF[row_S, index_S], group, index_S)
    return _by_row(row_S[index_S == index], activation_S[index_S == index], len(lost_J))


def _rerun(lm: LanguageModel, local: LocalReplacement, views: Sequence[HeadView]) -> dict[str, list[np.ndarray]]:
    """Rung -> for each view its activations float64[J - 1] without each head: one copy of the prompt per (view, head)."""
    heads = [(layer, head, view.feature.position) for view in views for layer, head in view.players]
    if not heads:
        return {"frozen": [], "live": []}
    crosscoders = [_crosscoder_of(local, view) for view in views]
    sites = {site for crosscoder, group in crosscoders for site in crosscoder.wiring.reads[group]}
    activations: dict[str, list[np.ndarray]] = {}
    step = max(1, TOKENS_AT_ONCE // local.n_positions)
    for rung, patterns in (("frozen", lm.read_patterns(local.frozen.tokens_T)), ("live", None)):
        chunks = [
            run_without(lm, local, heads[begin : begin + step], sites, patterns) for begin in range(0, len(heads), step)
        ]
        values = {site: torch.cat([chunk[site] for chunk in chunks]) for site in sites}
        activations[rung], begin = [], 0
        for view, (crosscoder, group) in zip(views, crosscoders, strict=True):
            rows = slice(begin, begin + len(view.players))
            begin = rows.stop
            inputs = {site: values[site][rows] for site in crosscoder.wiring.reads[group]}
            positions_B = torch.full((len(view.players),), view.feature.position, device=crosscoder.device)
            features = crosscoder.encode_group(group, inputs, positions=positions_B)
            features = features.select(features.index == view.feature.index)
            activations[rung].append(_by_row(features.row, features.activation, len(view.players)))
    return activations


def run_without(
    lm: LanguageModel,
    local: LocalReplacement,
    heads: Sequence[tuple[int, int, int]],
    sites: Iterable[Site],
    patterns: Sequence[Tensor] | None,
) -> dict[Site, Tensor]:
    """Values of sites, `[B, D]`, in a copy of the prompt for each (layer, head, position), without that head there.

    Row b is the site at the b-th position; the other rows of a copy are not returned.

    Args:
        lm: the original model.
        local: the prompt.
        heads: what is removed, one from each copy.
        sites: what is returned.
        patterns: attention patterns `[1, H, T, T]` to hold, one per layer; None lets them react.
    """
    tokens_BT = local.frozen.tokens_T.expand(len(heads), -1)
    position_B = torch.tensor([position for *_, position in heads], device=tokens_BT.device)
    copy_B = torch.arange(len(heads), device=tokens_BT.device)
    wanted, seen = set(sites), {}

    def hook_at(site: Site) -> Hook:
        def hook(x: Tensor) -> Tensor | None:
            changed = _without_heads(x, local, heads, site.layer) if site.kind == "attn_z" else None
            if site in wanted:
                seen[site] = (x if changed is None else changed).flatten(2)[copy_B, position_B]
            if len(seen) == len(wanted):
                raise EnoughSeen
            return changed

        return hook

    hooks = {site: hook_at(site) for site in {*wanted, *(Site(layer, "attn_z") for layer, _, _ in heads)}}
    held = None if patterns is None else [pattern.expand(len(heads), -1, -1, -1) for pattern in patterns]
    with contextlib.suppress(EnoughSeen):
        lm.run(tokens_BT, hooks, patterns=held)
    return seen


def _without_heads(
    z: Tensor, local: LocalReplacement, heads: Sequence[tuple[int, int, int]], layer: int
) -> Tensor | None:
    """`attn_z` of one layer with the removed heads' entries at their constants, in any layout of heads; None without any."""
    removed = [(copy, head, position) for copy, (at, head, position) in enumerate(heads) if at == layer]
    if not removed:
        return None
    z_BTX, width = z.flatten(2).clone(), local.shape.d_head
    constant_TX = local.frozen.attentions[layer].constant_z_TX
    for copy, head, position in removed:
        of_head = slice(head * width, (head + 1) * width)
        z_BTX[copy, position, of_head] = constant_TX[position, of_head]
    return z_BTX.view_as(z)


def _by_row(row_S: Tensor, activation_S: Tensor, n_rows: int) -> np.ndarray:
    activation_B = np.zeros(n_rows)
    activation_B[row_S.cpu().numpy()] = activation_S.double().cpu().numpy()
    return activation_B


def _crosscoder_of(local: LocalReplacement, view: HeadView) -> tuple[Crosscoder, int]:
    """The crosscoder of a view's feature, and its group."""
    crosscoder = local.decompositions[PARTS.index(view.feature.part)].crosscoder
    wiring = crosscoder.wiring
    return crosscoder, [wiring.group_layer(group) for group in range(wiring.n_groups)].index(view.feature.layer)
