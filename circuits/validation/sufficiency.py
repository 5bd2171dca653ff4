"""Is a circuit sufficient, and is it necessary? Features outside it, or inside it, are resampled from other prompts.

    faithfulness(C) = (m(C) - m(none)) / (m(all) - m(none))              1: the circuit alone does what the model does
    necessity(C)    = 1 - (m(all but C) - m(none)) / (m(all) - m(none))  1: without the circuit nothing is left

`m` is the output the graph explains: its logits above the mean logit (or differences), weighted with their output weights,
averaged over runs of the prompt, each with the features of one other prompt (see `circuits.validation.resampling`). KL is that
of the next token at the last target's position, from the clean run to a run with the circuit alone, averaged likewise.

Circuits of every size hold the first K of the prompt's active features, in each of several orders:

| order                     | by                                                                          |
|---------------------------|-----------------------------------------------------------------------------|
| `influence`               | influence in the graph                                                      |
| `activation`              | size of the activation                                                      |
| `gradient x activation`   | size of the output's gradient (attention and norms live) times activation   |
| `random`                  | a random permutation                                                        |

Over shares of the features kept (Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", whose circuits are of
edges; these are of features):

    CPR = area under faithfulness(k)           CMD = area under |1 - faithfulness(k)|        0.001 <= k <= 1

S active features, P circuits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.influence import node_influence
from circuits.validation.agreement import area
from circuits.validation.resampling import Resampler
from replacement import ReplacementModel

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
COUNTS = (10, 20, 50, 100, 200, 500, 1000)
"""Numbers of features that are kept, besides the shares."""

Facts = dict[str, Any]


def sufficiency(
    model: ReplacementModel, grounding: Grounding, others: Sequence[Tensor], *, errors: str, seed: int = 0
) -> Facts:
    """KL, faithfulness and necessity of the graph's circuit, of the pruned one, and of the first K features in every order.

    Args:
        others: token ids of other prompts, each as long as the graph's.
        errors: `keep` or `resample` the error terms, see `Resampler`.
        seed: of the random order.

    Returns:
        Plain JSON values: `other_prompts` (their number), `clean` and `resampled` (m(all) and m(none)); `graph`, all features
        that are in the graph, and `pruned`, those of `graph.prune()`; and `orders`, by name: `cpr` (circuit performance ratio:
        larger is better, 0.999 if the circuit is enough at every size), `cmd` (circuit-model distance: smaller is better) and
        `sizes`, the circuits of every size of `SHARES` and `COUNTS`. A circuit is its number of `features`, `share` of the
        active ones, `kl`, `faithfulness` and `necessity`.

    Raises:
        ValueError: see `Resampler`.
    """
    resampler = Resampler(model, grounding, others, errors=errors)
    graph, n_features = grounding.graph, resampler.n_features
    none, clean = float(resampler.measure(np.zeros((1, n_features), dtype=bool))[0][0]), clean_output(resampler)
    counts = sorted({int(np.ceil(share * n_features)) for share in SHARES} | {k for k in COUNTS if k < n_features})
    orders = {}
    for name, score_S in scores(resampler, seed=seed).items():
        sizes = _figures(resampler, first_of(score_S, counts), none=none, clean=clean)
        orders[name] = {**_areas(sizes), "sizes": sizes}
    named = {"graph": graph.nodes.ids(), "pruned": graph.prune().nodes.ids()}
    kept_PS = np.stack([over_features(grounding, np.isin(graph.nodes.ids(), ids)) > 0 for ids in named.values()])
    figures = _figures(resampler, kept_PS, none=none, clean=clean)
    return {
        "other_prompts": len(others),
        "clean": clean,
        "resampled": none,
        **dict(zip(named, figures, strict=True)),
        "orders": orders,
    }


def scores(resampler: Resampler, *, seed: int = 0) -> dict[str, np.ndarray]:
    """float64[S] by order: what its features are sorted by, the largest first."""
    grounding, n_features = resampler.grounding, resampler.n_features
    activation_S = torch.cat([part.features.activation for part in grounding.local.decompositions])
    return {
        "influence": over_features(grounding, node_influence(grounding.graph)),
        "activation": activation_S.abs().double().cpu().numpy(),
        "gradient x activation": np.abs(resampler.gradient(np.ones(n_features))),
        "random": np.random.default_rng(seed).permutation(n_features).astype(np.float64),
    }


def first_of(score_S: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """bool[P, S], the features with the largest scores, for every number of them; equal scores in order of number."""
    rank_S = np.empty(len(score_S), dtype=np.int64)
    rank_S[np.argsort(-score_S, kind="stable")] = np.arange(len(score_S))
    return rank_S < np.array(counts)[:, None]


def over_features(grounding: Grounding, value_N: np.ndarray) -> np.ndarray:
    """float64[S], values of nodes at every active feature; 0 for features that are not in the graph."""
    columns, column_N = grounding.columns, grounding.column_N
    value_C = np.zeros(columns.n_columns)
    value_C[column_N[column_N >= 0]] = value_N[column_N >= 0]
    return value_C[columns.features]


def clean_output(resampler: Resampler) -> float:
    """m(all)."""
    return float(resampler.output(resampler.clean.logits)[0])


def _figures(resampler: Resampler, kept_PS: np.ndarray, *, none: float, clean: float) -> list[Facts]:
    alone_P, kl_P = resampler.measure(kept_PS)
    # Error terms belong to no circuit: they stay when the circuit is resampled.
    without_P, _ = resampler.measure(~kept_PS, keep_errors=True)
    scale = clean - none or np.nan
    return [
        {
            "features": int(kept_S.sum()),
            "share": float(kept_S.mean()),
            "kl": float(kl),
            "faithfulness": float((alone - none) / scale),
            "necessity": float(1 - (without - none) / scale),
        }
        for kept_S, alone, without, kl in zip(kept_PS, alone_P, without_P, kl_P, strict=True)
    ]


def _areas(sizes: Sequence[Facts]) -> dict[str, float]:
    """CPR and CMD: a share k stands for the smallest circuit that holds it."""
    by_count = {row["features"]: row["faithfulness"] for row in sizes}
    n_features = max(by_count)
    faithfulness_P = np.array([by_count[int(np.ceil(share * n_features))] for share in SHARES])
    shares = np.array(SHARES)
    return {"cpr": area(shares, faithfulness_P), "cmd": area(shares, np.abs(1 - faithfulness_P))}
