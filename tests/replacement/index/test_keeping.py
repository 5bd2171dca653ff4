"""What a pass keeps, against dense references; whatever the batches, their order, and how parts are put together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replacement.index.examples import quantile_examples
from replacement.index.firings import Firings
from replacement.index.histogram import N_BINS, Histograms
from replacement.index.keeping import SAME_CONTEXT, Evidence, Kept, Window

N_FEATURES, CONTEXT, N_TOP, N_SAMPLED = 4, 12, 3, 5
WINDOW = Window(3, 2)


def dense_text(seed: int, n_rows: int, *, n_words: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [R, T] that repeat often, and activations [R, T, F], one in three above 0, many of them equal."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, n_words, (n_rows, CONTEXT))
    acts = generator.integers(1, 40, (n_rows, CONTEXT, N_FEATURES)) * np.float32(0.25)
    return tokens, (acts * (generator.random(acts.shape) < 1 / 3)).astype(np.float32)


def firings(tokens: np.ndarray, acts: np.ndarray) -> Firings:
    row, position, index = np.nonzero(acts)
    counted = np.ones(tokens.shape, dtype=bool)
    return Firings(tokens, counted, np.zeros_like(row), index, row, position, acts[row, position, index])


def gathered(tokens: np.ndarray, acts: np.ndarray, bounds: list[int]) -> Evidence:
    """Evidence of some rows, batch by batch."""
    evidence = Evidence.empty(N_FEATURES, window=WINDOW, n_top=N_TOP, n_sampled=N_SAMPLED)
    for begin, end in pairwise(bounds):
        batch = firings(tokens[begin:end], acts[begin:end])
        evidence.add(batch, batch.index, first_row=begin, window=WINDOW)
    return evidence


def kept(examples: Kept, feature: int) -> list[tuple[int, int]]:
    """(row, position) of a feature's examples, the best first."""
    there = examples.score_FK[feature] > -np.inf
    return list(
        zip(examples.row_FK[feature, there].tolist(), examples.position_FK[feature, there].tolist(), strict=True)
    )


def best_by_hand(tokens: np.ndarray, acts: np.ndarray, feature: int) -> list[tuple[int, int]]:
    """The top examples of a feature, slowly."""
    peaks = []
    for row in range(len(tokens)):
        position = int(acts[row, :, feature].argmax())
        if acts[row, position, feature] > 0:
            peaks.append((-float(acts[row, position, feature]), row, position))
    seen, best = set(), []
    for _, row, position in sorted(peaks):
        context = tuple(tokens[row, max(0, position + 1 - SAME_CONTEXT) : position + 1].tolist())
        if context not in seen:
            seen.add(context)
            best.append((row, position))
    return best[:N_TOP]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 30), max_size=4), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_whatever_the_batches_the_same_is_kept(seed: int, cuts: list[int], split: int) -> None:
    tokens, acts = dense_text(seed, 30)
    bounds = sorted({0, 30, *cuts})
    whole = gathered(tokens, acts, [0, 30])
    first = [bound for bound in (*bounds, split) if bound <= split]
    second = [bound for bound in (*bounds, split) if bound >= split]
    parts = [gathered(tokens, acts, sorted(set(part))) for part in (first, second)]
    parts[1].merge(Evidence.from_arrays(parts[0].arrays()))
    for evidence in (gathered(tokens, acts, bounds), parts[1]):
        arrays, expected = evidence.arrays(), whole.arrays()
        assert arrays.keys() == expected.keys()
        for name, values in expected.items():
            if name.startswith(("top.", "sample.")):  # places without an example may hold anything
                there = (expected[f"{name.partition('.')[0]}.score_FK"] > -np.inf).nonzero()
                np.testing.assert_array_equal(arrays[name][there], values[there], err_msg=name)
            else:
                np.testing.assert_array_equal(arrays[name], values, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_everything_against_a_dense_reference(seed: int) -> None:
    tokens, acts = dense_text(seed, 40)
    evidence = gathered(tokens, acts, [0, 7, 8, 40])
    assert evidence.n_tokens == tokens.size
    assert np.array_equal(evidence.n_active_F, (acts > 0).sum((0, 1)))
    used = set()
    for feature in range(N_FEATURES):
        assert kept(evidence.top, feature) == best_by_hand(tokens, acts, feature)
        drawn = kept(evidence.sample, feature)
        assert len(set(drawn)) == N_SAMPLED
        assert all(acts[row, position, feature] > 0 for row, position in drawn)
        used |= {row for row, _ in (*drawn, *kept(evidence.top, feature))}
    evidence.drop_rows()
    assert set(evidence.rows) == used
    assert all(np.array_equal(evidence.rows[row], tokens[row]) for row in used)


def test_windows_hold_the_activations_around_the_peak() -> None:
    tokens, acts = dense_text(5, 20)
    evidence = gathered(tokens, acts, [0, 20])
    padded = np.pad(acts, ((0, 0), (WINDOW.before, WINDOW.after), (0, 0)))
    n_seen = 0
    for examples in (evidence.top, evidence.sample):
        found, windows = examples.of(np.arange(N_FEATURES))
        for feature, peak, row, position, window in zip(
            found.feature, found.activation, found.row, found.position, windows, strict=True
        ):
            assert peak == acts[row, position, feature]
            around = padded[row, position : position + WINDOW.width, feature]
            np.testing.assert_allclose(window * peak, around, rtol=1e-3)
            n_seen += 1
    assert n_seen == N_FEATURES * (N_TOP + N_SAMPLED)


def test_features_that_fire_seldom_keep_every_firing() -> None:
    tokens, acts = dense_text(0, 6)
    acts[...] = 0
    acts[1, [2, 5], 0] = [1.0, 3.0]
    acts[4, 0, 0] = 2.0
    evidence = gathered(tokens, acts, [0, 3, 6])
    drawn, _, quantile = quantile_examples(evidence.sample, 3, 2)
    assert list(zip(drawn.row, drawn.position, quantile, strict=True)) == [(1, 2, 0), (4, 0, 1), (1, 5, 2)]
    assert kept(evidence.top, 1) == []


def test_the_sample_is_uniform() -> None:
    """Every firing is drawn equally often: ranks over many features are spread as chance would."""
    n_features, n_rows, n_drawn = 2000, 40, 5
    generator = np.random.default_rng(0)
    acts = generator.permuted(np.tile(np.arange(1.0, n_rows + 1, dtype=np.float32), (n_features, 1)), axis=1)
    evidence = Evidence.empty(n_features, window=Window(0, 0), n_top=1, n_sampled=n_drawn)
    batch = firings(np.zeros((n_rows, 1), dtype=np.int64), acts.T[:, None])
    evidence.add(batch, batch.index, first_row=0, window=Window(0, 0))
    counts = np.bincount(evidence.sample.activation_FK.ravel().astype(int) - 1, minlength=n_rows)
    expected = n_features * n_drawn / n_rows
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < n_rows + 6 * np.sqrt(2 * n_rows)
    drawn, _, quantile = quantile_examples(evidence.sample, 5, 1)
    assert len(drawn.row) == n_features * 5
    lower = np.array([drawn.activation[quantile == number].mean() for number in range(5)]) / n_rows
    np.testing.assert_allclose(lower, (np.arange(5) + 1) / 6, atol=0.03)  # means of order statistics


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(2**-20, 2**20, width=32)), max_size=60), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_histograms_count_as_if_the_range_were_known(values: list[tuple[int, float]], split: int) -> None:
    histograms, other = Histograms.empty(3), Histograms.empty(3)
    for target, part in ((histograms, values[:split]), (other, values[split:])):
        for begin in range(0, len(part), 7):
            chunk = sorted(part[begin : begin + 7])
            feature, activation = (np.array(column) for column in zip(*chunk, strict=True))
            target.add(feature, activation.astype(np.float32))
    histograms.merge(other)
    for feature in range(3):
        own = np.array([activation for number, activation in values if number == feature], dtype=np.float32)
        width = histograms.widths()[feature]
        assert histograms.largest_F[feature] == own.max(initial=0)
        if not len(own):
            assert width == 0
            assert not histograms.counts_FB[feature].any()
            continue
        assert N_BINS / 2 * width <= own.max() < N_BINS * width
        expected, _ = np.histogram(own.astype(np.float64), bins=np.arange(N_BINS + 1) * width)
        assert np.array_equal(histograms.counts_FB[feature], expected)
