"""Is a circuit sufficient, and is it necessary? Features outside it, or inside it, are resampled from other prompts.

    faithfulness(C) = (m(C) - m(none)) / (m(all) - m(none))              1: the circuit alone does what the model does
    necessity(C)    = 1 - (m(all but C) - m(none)) / (m(all) - m(none))  1: without the circuit nothing is left

`m` is the output the graph explains: its logits above the mean logit (or differences), weighted with their output weights,
averaged over runs of the prompt, each with the features of one other prompt. In `m(C)` only the features of C follow the
stream. The features left out are replaced by features of the other prompt at the same layer and position, with the activations
they have there: the largest ones, and as large a share of the other prompt's features as was left out. So `m(none)` writes what
the other prompt's features write, and `m(all)` is the clean run. Features are resampled and not set to zero, because zero would
show the model streams that it never sees. Attention and norms are live; embeddings are the prompt's own, as tokens belong to
every circuit.

A circuit of share k holds that share of the prompt's active features, the most influential in the graph first. Over shares
(Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", whose circuits are of edges; these are of features):

    CPR = area under faithfulness(k)           CMD = area under |1 - faithfulness(k)|        0.001 <= k <= 1

B other prompts, P circuit sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.influence import node_influence
from circuits.graph.nodes import NodeKind
from circuits.validation.agreement import area
from replacement import Features, ReplacementModel
from replacement.splicing.clean_run import CleanRun, Conditions
from replacement.splicing.feature_changes import Change

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Resampler:
    """Runs of one graph's prompt with features of other prompts put in."""

    def __init__(
        self, model: ReplacementModel, grounding: Grounding, others: Sequence[Tensor], *, errors: str = "keep"
    ) -> None:
        """Run the prompt and all others.

        Args:
            others: token ids of other prompts, each as long as the graph's.
            errors: `keep` the prompt's own error terms in every run, or `resample` those too, as part of no circuit.

        Raises:
            ValueError: no other prompts, one of another length, or another choice for errors.
        """
        if errors not in ("keep", "resample"):
            raise ValueError(f"errors must be 'keep' or 'resample', got {errors!r}")
        tokens_T = grounding.local.frozen.tokens_T
        if not others or any(len(other) != len(tokens_T) for other in others):
            lengths = sorted({len(other) for other in others})
            raise ValueError(f"expected other prompts of {len(tokens_T)} tokens, given {lengths or 'none'}")
        self.model, self.grounding, self.n_others = model, grounding, len(others)
        lm = model.language_model
        self.clean = CleanRun(lm, model.crosscoders, tokens_T[None])
        other_runs = CleanRun(lm, model.crosscoders, lm.batch(torch.stack([lm.tokens(other) for other in others])))
        self.other_features = other_runs.features
        self.errors = other_runs.errors if errors == "resample" else None

    def logits(self, kept_S: np.ndarray, *, keep_errors: bool = False) -> Tensor:
        """`[B, T, V]`, one run per other prompt in which only some features follow the stream.

        Args:
            kept_S: mask over the active features of all parts.
            keep_errors: keep the prompt's own error terms, whatever `errors` said.
        """
        by_part = self.grounding.columns.split(np.flatnonzero(kept_S))
        changes = {
            part: self._change(part, decomposition.features, torch.from_numpy(numbers))
            for part, decomposition, numbers in zip(
                self.model.crosscoders, self.grounding.local.decompositions, by_part, strict=True
            )
        }
        errors = None if keep_errors else self.errors
        return self.clean.run(Conditions(), changes, n_copies=self.n_others, errors=errors).logits_BTV

    def output(self, logits_BTV: Tensor) -> float:
        """m, averaged over the runs."""
        total, nodes = 0.0, self.grounding.graph.nodes
        logits_BTV = self.model.language_model.parts.before_soft_cap(logits_BTV)  # as the graph explains them
        weights = nodes.output_weight[nodes.mask(NodeKind.LOGIT)]
        for weight, target in zip(weights.tolist(), self.grounding.logits, strict=True):
            total += weight * float(target.read(logits_BTV[:, target.position].double()).mean())
        return total

    def _change(self, part: str, active: Features, kept: Tensor) -> Change:
        T, F = self.clean.tokens_BT.shape[1], active.n_features
        inside = torch.zeros(len(active), dtype=torch.bool, device=active.row.device)
        inside[kept.to(inside.device)] = True
        removed = 1 - float(inside.double().mean()) if len(active) else 1.0

        def change(group: int, features: Features, current: Features) -> Features:
            in_group = active.group == group
            kept_keys = (active.row * F + active.index)[in_group & inside]
            n_active, n_kept = (torch.bincount(active.row[mask], minlength=T) for mask in (in_group, in_group & inside))
            # Positions without active features take the share that is resampled on average.
            share_T = torch.where(n_active > 0, 1 - n_kept / n_active.clamp(min=1), removed)
            other = self.other_features[part].of(group)
            resampled = _largest(other, share_T) & ~torch.isin(other.row % T * F + other.index, kept_keys)
            kept_features = features.select(torch.isin(features.row % T * F + features.index, kept_keys))
            return _join(kept_features, other.select(resampled))

        return change


def sufficiency(
    model: ReplacementModel, grounding: Grounding, others: Sequence[Tensor], *, errors: str
) -> dict[str, Any]:
    """Faithfulness and necessity of circuits of every size, and of the pruned graph; see `Resampler`.

    Returns:
        Plain JSON values: `other_prompts` (their number), `cpr` (circuit performance ratio: larger is better, 0.999 if the
        circuit is enough at every size), `cmd` (circuit-model distance: smaller is better), `clean` and `resampled`
        (m(all) and m(none)); `pruned` and, in `sizes`, every share of `SHARES`: number of `features`, `faithfulness` and
        `necessity`.

    Raises:
        ValueError: the graph explains no logits, or see `Resampler`.
    """
    if not grounding.logits:
        raise ValueError("the graph explains features, not logits: there is no output to be faithful to")
    resampler = Resampler(model, grounding, others, errors=errors)
    graph = grounding.graph
    ranked = np.argsort(-_over_features(grounding, node_influence(graph)), kind="stable")
    nothing = np.zeros(len(ranked), dtype=bool)
    none = resampler.output(resampler.logits(nothing))
    clean = resampler.output(resampler.clean.logits)
    scale = clean - none

    def figures(kept_S: np.ndarray) -> dict[str, Any]:
        alone = resampler.output(resampler.logits(kept_S))
        # Error terms belong to no circuit: they stay when the circuit is resampled.
        without = resampler.output(resampler.logits(~kept_S, keep_errors=True))
        faithfulness, necessity = ((alone - none) / scale, 1 - (without - none) / scale) if scale else (np.nan, np.nan)
        return {"features": int(kept_S.sum()), "faithfulness": faithfulness, "necessity": necessity}

    counts = [int(np.ceil(share * len(ranked))) for share in SHARES]
    by_count = {}
    for count in sorted(set(counts)):
        kept_S = nothing.copy()
        kept_S[ranked[:count]] = True
        by_count[count] = figures(kept_S)
    faithfulness_P = np.array([by_count[count]["faithfulness"] for count in counts])
    return {
        "other_prompts": len(others),
        "cpr": area(np.array(SHARES), faithfulness_P),
        "cmd": area(np.array(SHARES), np.abs(1 - faithfulness_P)),
        "clean": clean,
        "resampled": none,
        "pruned": figures(_over_features(grounding, np.isin(graph.nodes.ids(), graph.prune().nodes.ids())) > 0),
        "sizes": [{"share": share, **by_count[count]} for share, count in zip(SHARES, counts, strict=True)],
    }


def _over_features(grounding: Grounding, value_N: np.ndarray) -> np.ndarray:
    """float64[S], values of nodes at every active feature; 0 for features that are not in the graph."""
    columns, column_N = grounding.columns, grounding.column_N
    value_C = np.zeros(columns.n_columns)
    value_C[column_N[column_N >= 0]] = value_N[column_N >= 0]
    return value_C[columns.features]


def _largest(features: Features, share_T: Tensor) -> Tensor:
    """Mask of the features of one group that are among their row's largest, up to a share of them given by position."""
    by_size = features.activation.abs().argsort(descending=True, stable=True)
    order = by_size[features.row[by_size].argsort(stable=True)]
    row = features.row[order]
    counts = torch.bincount(row, minlength=features.n_rows)
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    wanted = (share_T[row % len(share_T)] * counts[row]).round()
    mask = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    mask[order] = rank < wanted
    return mask


def _join(kept: Features, other: Features) -> Features:
    """Two tables without a common entry."""
    return Features.from_unsorted(
        torch.cat([kept.group, other.group]),
        torch.cat([kept.row, other.row]),
        torch.cat([kept.index, other.index]),
        torch.cat([kept.activation, other.activation]),
        n_rows=kept.n_rows,
        n_groups=kept.n_groups,
        n_features=kept.n_features,
    )
