"""Whose share of an activation: where do gate, path, Shapley and ablation agree, and where do they differ?

    python examples/head_credit.py

A head's part of a feature's PRE-activation is exact; its part of the ACTIVATION is a rule's choice (see
`circuits.heads.relu_credit`). On held-out prompts of every behaviour, for features drawn at random, this script shows

1. that inside one feature no rule changes the order of the heads: smallest rank correlation with the exact contributions;
2. what a rule's credits sum to, beside the activation: `gate` also hands out what the bias takes away;
3. that the rules do differ once credits are summed over features, for they weigh features differently: the heads in order of
   their summed credit, rule by rule, and how well the orders agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

import replacement
from circuits.heads.feature_heads import HeadView, HeadViews
from circuits.heads.relu_credit import RULES
from replacement import ReplacementModel
from replacement.demo.corpus import behaviours


def draw_views(model: ReplacementModel, prompts: Sequence[str], *, n_features: int, seed: int = 0) -> list[HeadView]:
    """Views of features drawn at random, `n_features` from the last half of every prompt."""
    rng, lm, drawn = np.random.default_rng(seed), model.language_model, []
    for prompt in prompts:
        local = model.localize(lm.tokenize(prompt))
        views = HeadViews(local, tuple(lm.token_strings(local.frozen.tokens_T.tolist())))
        late = np.flatnonzero(local.features.row.numpy() >= local.n_positions // 2)
        chosen = rng.choice(late, size=min(n_features, len(late)), replace=False)
        drawn += [views.of(local.mlp, int(number)) for number in chosen]
    return drawn


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of every value; equal ones share their mean."""
    below = (values[None, :] < values[:, None]).sum(1)
    return below + ((values[None, :] == values[:, None]).sum(1) - 1) / 2


def inversions(credits_J: np.ndarray, contributions_J: np.ndarray) -> int:
    """Pairs of players whose credits are in the other order than their contributions, beyond rounding."""
    slack = 1e-9 * max(1.0, float(np.abs(credits_J).max()))
    gap = np.subtract.outer(contributions_J, contributions_J)
    return int(((gap > 0) & (np.subtract.outer(credits_J, credits_J) < -slack)).sum())


def print_within(views: Sequence[HeadView]) -> None:
    """Order inside one feature, and what credits sum to."""
    print(f"{len(views)} features: means, and pairs of players (heads and direct stream) put in another order")
    print(f"{'rule':10}{'sum of credits':>16}{'f(h) - f(b)':>14}{'|residual|':>12}{'reordered':>11}")
    for rule in RULES:
        credits = [view.credit(rule) for view in views]
        sums = np.array([credit.credit_J.sum() for credit in credits])
        residual = np.array([credit.residual for credit in credits])
        wrong = sum(
            inversions(credit.credit_J, view.contributions) for credit, view in zip(credits, views, strict=True)
        )
        means = f"{sums.mean():16.3f}{(sums + residual).mean():14.3f}{np.abs(residual).mean():12.3f}"
        print(f"{rule:10}{means}{wrong:11d}")


def print_sums(views: Sequence[HeadView], n_layers: int, n_heads: int, *, most: int = 6) -> None:
    """Heads in order of their credit summed over features."""
    totals = {}
    for rule in RULES:
        total_LH = np.zeros((n_layers, n_heads))
        for view in views:
            for (layer, head), value in zip(view.players, view.credit(rule).credit_J, strict=False):
                total_LH[layer, head] += value
        totals[rule] = total_LH.ravel()
    print("\nHeads by their credit summed over all these features")
    for rule, total in totals.items():
        order = np.argsort(-total)[:most]
        names = "  ".join(f"L{place // n_heads}H{place % n_heads} {total[place]:6.1f}" for place in order.tolist())
        agreement = np.corrcoef(ranks(total), ranks(totals["gate"]))[0, 1]
        print(f"{rule:10}{names}   rank correlation with gate {agreement:.3f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Compare the rules for credit through the ReLU.")
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts of every behaviour")
    parser.add_argument("--features", type=int, default=4, help="features drawn from every prompt")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = replacement.load("demo")
    prompts = [probe.prompt for skill in behaviours() for probe in skill.probes[: options.prompts]]
    views = draw_views(model, prompts, n_features=options.features)
    print_within(views)
    print_sums(views, model.language_model.shape.n_layers, model.language_model.shape.n_heads)


if __name__ == "__main__":
    main()
