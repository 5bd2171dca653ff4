"""Does the graph of a sum tell whether the model's answer is wrong, beyond the probability of the answer?

    python examples/addition_errors.py

Three sets of sums, in order of their distance from what the demo was trained on:

    held out      two-digit numbers that were never added in training
    three digits  a number from 100 on and one below 100, never added in training (sums up to 198, the largest known number)
    three terms   three two-digit numbers, a form that training does not have

The set whose share of wrong answers among 100 sums (`CHOOSING`) is closest to one half is traced with other sums, `JUDGING` of
them if there are so many. This rule, the columns, the classifier and its settings were fixed before anything was measured.

A logistic regression on the columns of `circuits statistics` says which answers are wrong, judged on folds that it was not
fitted on, with and without the columns that only say what the model answers and how surely. Beside it stand the answer's
probability alone, and the same regression on the numbers that are added, alone and with the graph (added after the first
results). Intervals are percentiles of a bootstrap over sums; differences are paired.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import circuits
import replacement
from circuits.explain.statistics import TEXTS, graph_statistics
from replacement import ReplacementModel
from replacement.demo.corpus.addition import HELD_OUT_PAIRS, LARGEST

CHOOSING, JUDGING = 100, 400
FOLDS, RIDGE, RESAMPLES, SEED = 10, 1.0, 2000, 0
OF_ANSWER = ("answer_probability", "answer_margin", "answer_value", "outputs")
"""Columns that say what the model answers, not how."""
Terms = tuple[int, ...]


def sets_of_sums() -> dict[str, list[Terms]]:
    """The three sets, shuffled."""
    rng = np.random.default_rng(SEED)
    held_out = sorted({pair[::order] for pair in HELD_OUT_PAIRS for order in (1, -1)})
    three_digits = [(a, b) for a in range(100, LARGEST + 1) for b in range(100) if a + b <= LARGEST]
    three_digits += [(b, a) for a, b in three_digits]
    three_terms = [tuple(map(int, rng.integers(10, 100, size=3))) for _ in range(4 * JUDGING)]
    three_terms = list(dict.fromkeys(terms for terms in three_terms if sum(terms) <= LARGEST))
    sets: dict[str, list[Terms]] = {"held out": held_out, "three digits": three_digits, "three terms": three_terms}
    return {name: [sums[place] for place in rng.permutation(len(sums)).tolist()] for name, sums in sets.items()}


def prompt_of(terms: Terms) -> str:
    """The question for a sum."""
    return f"{' + '.join(map(str, terms))} ="


def are_wrong(model: ReplacementModel, sums: Sequence[Terms]) -> np.ndarray:
    """bool[n], whether the model's likeliest next token is not the sum."""
    lm, wrong = model.language_model, []
    for terms in sums:
        [answer] = lm.token_strings([int(lm(lm.tokenize(prompt_of(terms)))[-1].argmax())])
        wrong.append(answer.strip() != str(sum(terms)))
    return np.array(wrong)


def rows_of(model: ReplacementModel, sums: Sequence[Terms]) -> list[dict[str, Any]]:
    """The statistics of each sum's graph."""
    return [graph_statistics(circuits.trace(model, prompt_of(terms))) for terms in sums]


def features_of_terms(sums: Sequence[Terms]) -> np.ndarray:
    """float64[n, C]: the terms, their ones, the sum, its ones, and the carry from the ones."""
    terms = np.array(sums)
    ones, total = terms % 10, terms.sum(1)
    return np.column_stack([terms, ones, total, total % 10, ones.sum(1) // 10]).astype(np.float64)


def fitted(x_NC: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """float64[C + 1], coefficients of a ridge logistic regression with an intercept, by Newton's method."""
    x_NC = np.column_stack([x_NC, np.ones(len(x_NC))])
    penalty, w_C = np.diag([*np.full(x_NC.shape[1] - 1, RIDGE), 1e-9]), np.zeros(x_NC.shape[1])
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-np.clip(x_NC @ w_C, -30, 30)))
        gradient_C = x_NC.T @ (p_N - y_N) + penalty @ w_C
        step_C = np.linalg.solve((x_NC * (p_N * (1 - p_N))[:, None]).T @ x_NC + penalty, gradient_C)
        w_C = w_C - step_C
        if np.abs(step_C).max() < 1e-8:
            break
    return w_C


def out_of_fold(x_NC: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """float64[n], score of each row by a regression fitted and scaled on the other folds."""
    fold_N, scores_N = np.random.default_rng(SEED).permutation(len(y_N)) % FOLDS, np.zeros(len(y_N))
    for fold in range(FOLDS):
        inside = fold_N != fold
        mean_C, scale_C = x_NC[inside].mean(0), x_NC[inside].std(0)
        scaled_NC = (x_NC - mean_C) / np.where(scale_C > 1e-12, scale_C, np.inf)
        w_C = fitted(scaled_NC[inside], y_N[inside])
        scores_N[~inside] = scaled_NC[~inside] @ w_C[:-1] + w_C[-1]
    return scores_N


def auroc(scores_N: np.ndarray, y_N: np.ndarray) -> float:
    """Probability that a wrong answer has the higher score than a right one; ties count half."""
    order, ranks_N = np.argsort(scores_N, kind="stable"), np.empty(len(scores_N))
    _, inverse, counts = np.unique(scores_N[order], return_inverse=True, return_counts=True)
    ranks_N[order] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n_wrong = int(y_N.sum())
    return float((ranks_N[y_N].sum() - n_wrong * (n_wrong + 1) / 2) / (n_wrong * (len(y_N) - n_wrong)))


def with_intervals(scores: dict[str, np.ndarray], y_N: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """AUROC of each score, and its difference from those of the first two: estimate and ends of the 95 % interval."""
    rng, drawn, baselines = np.random.default_rng(SEED), {name: list[float]() for name in scores}, list(scores)[:2]
    while len(drawn[baselines[0]]) < RESAMPLES:
        rows = rng.integers(len(y_N), size=len(y_N))
        if 0 < y_N[rows].sum() < len(rows):
            for name, scores_N in scores.items():
                drawn[name].append(auroc(scores_N[rows], y_N[rows]))
    estimates = {name: auroc(scores_N, y_N) for name, scores_N in scores.items()}

    def interval(estimate: float, samples: np.ndarray) -> list[float]:
        return [estimate, *np.percentile(samples, [2.5, 97.5]).tolist()]

    drawn_of = {name: np.array(samples) for name, samples in drawn.items()}
    return {
        name: {
            "auroc": interval(estimates[name], drawn_of[name]),
            **{
                f"minus {base}": interval(estimates[name] - estimates[base], drawn_of[name] - drawn_of[base])
                for base in baselines
            },
        }
        for name in scores
    }


def measure(model: ReplacementModel, *, choosing: int = CHOOSING, judging: int = JUDGING) -> dict[str, Any]:
    """Choose the set, trace, classify."""
    sets = sets_of_sums()
    shares = {name: float(are_wrong(model, sums[:choosing]).mean()) for name, sums in sets.items()}
    name = min(shares, key=lambda name: abs(shares[name] - 0.5))
    sums = sets[name][choosing : choosing + judging]
    wrong_N = are_wrong(model, sums)
    facts = {"wrong_of_choosing": shares, "set": name, "sums": len(sums), "wrong": int(wrong_N.sum())}
    if not FOLDS <= facts["wrong"] <= len(sums) - FOLDS:
        return {**facts, "results": None}
    rows = rows_of(model, sums)
    columns = [column for column in rows[0] if column not in TEXTS]
    table = {column: np.array([row[column] for row in rows], dtype=np.float64) for column in columns}
    of_graph = np.column_stack([table[column] for column in columns if column not in OF_ANSWER])
    of_answer = np.column_stack([table[column] for column in OF_ANSWER])
    of_terms = features_of_terms(sums)
    scores = {
        "probability": -table["answer_probability"],
        "numbers": out_of_fold(of_terms, wrong_N),
        "answer: probability, margin, logit, outputs": out_of_fold(of_answer, wrong_N),
        "graph": out_of_fold(of_graph, wrong_N),
        "graph and answer": out_of_fold(np.column_stack([of_graph, of_answer]), wrong_N),
        "graph and numbers": out_of_fold(np.column_stack([of_graph, of_terms]), wrong_N),
    }
    alone = {column: auroc(table[column], wrong_N) for column in columns if np.ptp(table[column]) > 0}
    strongest = sorted(alone.items(), key=lambda item: -abs(item[1] - 0.5))[:8]
    return {**facts, "results": with_intervals(scores, wrong_N), "columns_alone": dict(strongest)}


def main() -> None:
    """Parse the options, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sums", type=int, default=JUDGING, help="sums that are traced, at most")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    facts = measure(replacement.load("demo"), judging=options.sums)
    if options.json is not None:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name, share in facts["wrong_of_choosing"].items():
        print(f"{name:14} {100 * share:5.1f} % of {CHOOSING} answers wrong")
    print(f"traced: {facts['sums']} sums of the set {facts['set']!r}, {facts['wrong']} answers wrong")
    if facts["results"] is None:
        print("too few answers of one kind for a classifier")
        return
    print(f"\n{'wrong against right':46}" + "".join(f"{head:28}" for head in next(iter(facts["results"].values()))))
    for name, row in facts["results"].items():
        cells = (f"{estimate:.3f} [{low:.3f}, {high:.3f}]" for estimate, low, high in row.values())
        print(f"{name:46}" + "".join(f"{cell:28}" for cell in cells))
    print("\ncolumns alone (chosen by these sums, so not a fair figure): above 0.5, larger in wrong answers")
    for name, figure in facts["columns_alone"].items():
        print(f"{name:46}{figure:8.3f}")


if __name__ == "__main__":
    main()
