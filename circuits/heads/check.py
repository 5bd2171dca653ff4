"""How well each credit rule predicts what a feature loses when a head's contribution is removed in the model itself.

Features are drawn at random among the active ones. For each, and for every head below it, the head's contribution is
removed at the feature's position, and the loss `a_clean - a_removed` of the feature's activation is measured on three rungs:

| rung   | what is removed from                     | what may react                                                     |
|--------|------------------------------------------|--------------------------------------------------------------------|
| direct | the feature's own read, nothing else     | nothing: `ablation` is exact here by construction, a self-check    |
| frozen | the residual stream behind the head      | MLPs, norms, later heads' values; patterns stay as they were       |
| live   | the same                                 | everything                                                         |

Removing a head sets its `attn_z` at that position to what biases alone make of it (zero in models without any), which is
the part of the head that `circuits.heads.view` counts as bias. Activations are those the crosscoder computes on the stream
that results, in competition with all other features where the activation function is TopK.

P (feature, head) pairs, J players of one feature, B copies of a prompt, T tokens, X heads x d_head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.heads.credit import RULES
from circuits.heads.view import HeadView, HeadViews
from replacement import Decomposition, LanguageModel, LocalReplacement, ReplacementModel, Site
from replacement.language_model.language_model import EnoughSeen, Hook, Prompt
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
        prompts: texts, or lists or 1-D tensors of token ids.
        n_features: features drawn per prompt, behind its first position (which is the same in every prompt).
        seed: of the draw.

    Raises:
        ValueError: no prompts, fewer than one feature, a prompt the model cannot read, or no feature that reads heads.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, given none")
    if n_features < 1:
        raise ValueError(f"n_features must be 1 or more, got {n_features}")
    lm, rng = model.language_model, np.random.default_rng(seed)
    predicted: dict[str, list[np.ndarray]] = {rule: [] for rule in RULES}
    measured: dict[str, list[np.ndarray]] = {rung: [] for rung in RUNGS}
    n_drawn = 0
    for prompt in prompts:
        tokens_T = lm.tokens(prompt)
        with torch.no_grad():
            local = model.localize(tokens_T)
            drawn = _draw(local, n_features, rng)
            removed = _removed_runs(lm, local, drawn)
        n_drawn += len(drawn)
        for view in drawn:
            for rule in RULES:
                predicted[rule].append(view.credit(rule).credit_J[:-1])
            measured["direct"].append(view.activation - direct_removals(local, view))
        for rung, activations in removed.items():
            measured[rung] += [view.activation - acts for view, acts in zip(drawn, activations, strict=True)]
    if not n_drawn:
        raise ValueError("no active feature of these prompts reads attention heads behind the first position")
    return HeadCheck(
        n_prompts=len(prompts),
        n_features=n_drawn,
        predicted={rule: np.concatenate(parts) for rule, parts in predicted.items()},
        measured={rung: np.concatenate(parts) for rung, parts in measured.items()},
    )


def _draw(local: LocalReplacement, n_features: int, rng: np.random.Generator) -> list[HeadView]:
    """Views of features drawn at random among those of all parts whose heads are not trivial."""
    views = HeadViews(local, ("",) * local.n_positions)
    numbers = [
        (part, number)
        for part in local.decompositions
        for number in torch.nonzero(part.features.row > 0)[:, 0].tolist()
    ]
    drawn: list[HeadView] = []
    for place in rng.permutation(len(numbers)):
        if len(drawn) == n_features:
            break
        view = views.of(*numbers[place])
        size_J = np.abs(view.contributions)
        if size_J[:-1].sum() >= NON_TRIVIAL * max(float(size_J.sum()), 1e-30):
            drawn.append(view)
    return drawn


def direct_removals(local: LocalReplacement, view: HeadView) -> np.ndarray:
    """float64[J - 1], a feature's activation when only its own read loses one head's contribution.

    The crosscoder's own activation function chooses anew among all features of the group, the others as they were.
    """
    part, group = _part(local, view), _group(local, view)
    crosscoder, position, index = part.crosscoder, view.feature.position, view.feature.index
    inputs = {site: local.frozen.activations[site][position : position + 1] for site in crosscoder.wiring.reads[group]}
    lost_J = torch.from_numpy(view.contributions[:-1]).to(part.pre_activation_S)
    pre_JF = crosscoder.pre_activations(inputs, group).repeat(len(lost_J), 1)
    pre_JF[:, index] = view.pre_activation - lost_J
    threshold_F = None if crosscoder.threshold is None else crosscoder.threshold[group]
    row_S, index_S = crosscoder.activation.select(pre_JF, threshold_F, group=group)
    threshold_S = None if threshold_F is None else threshold_F.expand(crosscoder.n_features)[index_S]
    acts_S = crosscoder.activation.values(pre_JF[row_S, index_S], threshold_S)
    mine_S = index_S == index
    return _by_row(row_S[mine_S], acts_S[mine_S], len(lost_J))


def _removed_runs(lm: LanguageModel, local: LocalReplacement, views: Sequence[HeadView]) -> dict[str, list[np.ndarray]]:
    """Rung -> per view its activations float64[J - 1] without each head: one copy of the prompt per (view, head)."""
    found: dict[str, list[np.ndarray]] = {"frozen": [], "live": []}
    heads = [(layer, head, view.feature.position) for view in views for layer, head in view.players]
    sites = {site for view in views for site in _part(local, view).crosscoder.wiring.reads[_group(local, view)]}
    if not heads:
        return found
    clean = lm.read_patterns(local.frozen.tokens_T[None])
    for rung, patterns in (("frozen", clean), ("live", None)):
        chunks = [
            run_without(lm, local, heads[begin : begin + max(1, TOKENS_AT_ONCE // local.n_positions)], sites, patterns)
            for begin in range(0, len(heads), max(1, TOKENS_AT_ONCE // local.n_positions))
        ]
        rows = {site: torch.cat([chunk[site] for chunk in chunks]) for site in sites}
        first = 0
        for view in views:
            own = slice(first, first + len(view.players))
            first = own.stop
            found[rung].append(_activations(local, view, {site: x_BD[own] for site, x_BD in rows.items()}))
    return found


def run_without(
    lm: LanguageModel,
    local: LocalReplacement,
    heads: Sequence[tuple[int, int, int]],
    sites: Iterable[Site],
    patterns: Sequence[Tensor] | None,
) -> dict[Site, Tensor]:
    """What sites show, `[B, D]`, in a copy of the prompt for each (layer, head, position), without that head there.

    Row b is the site at the b-th position; the other rows of a copy are not returned.

    Args:
        patterns: attention patterns `[1, H, T, T]` to hold, one per layer; None lets them react.
    """
    tokens_BT = local.frozen.tokens_T.expand(len(heads), -1)
    position_B = torch.tensor([position for *_, position in heads], device=tokens_BT.device)
    place_B = torch.arange(len(heads), device=tokens_BT.device)
    wanted, seen = set(sites), {}

    def hook_at(site: Site) -> Hook:
        def hook(x: Tensor) -> Tensor | None:
            changed = _without_heads(x, local, heads, site.layer) if site.kind == "attn_z" else None
            if site in wanted:
                seen[site] = (x if changed is None else changed).flatten(2)[place_B, position_B]
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
    """`attn_z` of one layer with the removed heads' entries at their constants, in any layout of heads."""
    mine = [(copy, head, position) for copy, (at, head, position) in enumerate(heads) if at == layer]
    if not mine:
        return None
    z_BTX, width = z.flatten(2).clone(), local.shape.d_head
    constant_TX = local.frozen.attentions[layer].constant_z_TX
    for copy, head, position in mine:
        own = slice(head * width, (head + 1) * width)
        z_BTX[copy, position, own] = constant_TX[position, own]
    return z_BTX.view_as(z)


def _activations(local: LocalReplacement, view: HeadView, inputs: dict[Site, Tensor]) -> np.ndarray:
    """float64[B], the view's feature as the crosscoder encodes the given rows."""
    crosscoder, group = _part(local, view).crosscoder, _group(local, view)
    rows = {site: inputs[site] for site in crosscoder.wiring.reads[group]}
    positions_B = torch.full((len(view.players),), view.feature.position, device=crosscoder.device)
    features = crosscoder.encode_group(group, rows, positions=positions_B)
    mine = features.select(features.index == view.feature.index)
    return _by_row(mine.row, mine.activation, len(view.players))


def _by_row(row_S: Tensor, acts_S: Tensor, n_rows: int) -> np.ndarray:
    acts_B = np.zeros(n_rows)
    acts_B[row_S.cpu().numpy()] = acts_S.double().cpu().numpy()
    return acts_B


def _part(local: LocalReplacement, view: HeadView) -> Decomposition:
    return local.decompositions[PARTS.index(view.feature.part)]


def _group(local: LocalReplacement, view: HeadView) -> int:
    wiring = _part(local, view).crosscoder.wiring
    return [wiring.group_layer(group) for group in range(wiring.n_groups)].index(view.feature.layer)
