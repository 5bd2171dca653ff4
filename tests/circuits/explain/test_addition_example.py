"""The example's figures: AUROC against counting pairs, the regression against its gradient, sums against the corpus."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replacement.demo.corpus.addition import is_held_out

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def example() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("addition_errors")


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(example, rows) -> None:
    scores, wrong = np.array([score for score, _ in rows], dtype=float), np.array([answer for _, answer in rows])
    if wrong.all() or not wrong.any():
        return
    pairs = scores[wrong][:, None] - scores[~wrong][None]
    assert example.auroc(scores, wrong) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_the_regression_is_where_its_penalised_gradient_is_zero(example) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    y = rng.random(60) < 1 / (1 + np.exp(-x[:, 0]))
    w = example.fitted(x, y)
    p = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    np.testing.assert_allclose(x.T @ (p - y) + example.RIDGE * w[:-1], 0, atol=1e-7)
    assert (p - y).sum() == pytest.approx(0, abs=1e-6)


def test_a_score_is_not_fitted_on_its_own_row(example) -> None:
    """Columns of noise, more than rows: fitted on all rows they would tell every answer apart."""
    rng = np.random.default_rng(0)
    wrong = rng.random(80) < 0.5
    assert 0.2 < example.auroc(example.out_of_fold(rng.normal(size=(80, 100)), wrong), wrong) < 0.8
    assert example.auroc(example.out_of_fold(wrong[:, None] + rng.normal(size=(80, 1)) / 10, wrong), wrong) == 1.0


def test_the_baseline_differs_from_itself_by_nothing(example) -> None:
    rng = np.random.default_rng(0)
    wrong, scores = rng.random(50) < 0.5, {"a": rng.normal(size=50), "b": rng.normal(size=50)}
    found = example.with_intervals(scores, wrong)
    assert found["a"]["minus a"] == found["b"]["minus b"] == [0.0, 0.0, 0.0]
    assert found["a"]["minus b"][0] == -found["b"]["minus a"][0]
    low, high = found["b"]["auroc"][1:]
    assert low < found["b"]["auroc"][0] < high


def test_no_sum_of_the_sets_was_seen_in_training(example) -> None:
    sets = example.sets_of_sums()
    assert all(is_held_out(*terms) for terms in sets["held out"])
    assert all(max(terms) >= 100 and sum(terms) <= 198 for terms in sets["three digits"])
    assert all(len(terms) == 3 and min(terms) >= 10 and sum(terms) <= 198 for terms in sets["three terms"])
    for sums in sets.values():
        assert len(set(sums)) == len(sums) >= example.CHOOSING + example.JUDGING
    assert example.prompt_of((12, 30, 45)) == "12 + 30 + 45 ="
