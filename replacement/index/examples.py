"""From what a pass has kept to the rows of the file: quantile examples chosen, examples and histograms packed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from replacement.index import packing
from replacement.index.keeping import Candidates, Evidence, Kept
from replacement.index.tables import Row


def feature_rows(evidence: Evidence, *, before: int, n_quantiles: int, per_quantile: int) -> Iterator[Row]:
    """Rows of the table `features`: number, n_active, max_activation, bin_width, histogram, examples.

    Args:
        before: tokens of an example's window in front of its peak.
        n_quantiles: quantiles of each feature's activations.
        per_quantile: most examples of each quantile.
    """
    histograms, n_features = evidence.histograms, len(evidence.n_active_F)
    top, top_windows_NW = evidence.top.of(np.arange(n_features))
    drawn, drawn_windows_NW, quantile_N = quantile_examples(evidence.sample, n_quantiles, per_quantile)
    both = Candidates(*(np.concatenate(pair) for pair in zip(top, drawn, strict=True)))
    quantile_N = np.concatenate([np.full(len(top.row), packing.TOP), quantile_N])
    order_N = np.lexsort((both.position, both.row, -both.activation, -quantile_N, both.feature))
    both, quantile_N = both.at(order_N), quantile_N[order_N]
    windows_NW = np.concatenate([top_windows_NW, drawn_windows_NW])[order_N].astype(np.float32)
    share_N = both.activation / histograms.largest_F[both.feature]
    heads_N = np.zeros(len(order_N), packing.EXAMPLE)
    heads_N["row"], heads_N["position"], heads_N["quantile"] = both.row, both.position, quantile_N
    examples = packing.pack_examples(
        both.feature, heads_N, windows_NW * share_N[:, None], before=before, n_features=n_features
    )
    columns = (evidence.n_active_F.tolist(), histograms.largest_F.tolist(), histograms.widths().tolist())
    packed = (packing.pack_counts(counts_B) for counts_B in histograms.counts_FB)
    return zip(range(n_features), *columns, packed, examples, strict=True)


def quantile_examples(sample: Kept, n_quantiles: int, per_quantile: int) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """Examples, windows and numbers of the quantiles: in each quantile, those of the sample with the largest random scores.

    A feature's sample of n, sorted by activation, is cut into quantiles of n / n_quantiles each.
    """
    drawn, windows_NW = sample.of(np.arange(len(sample.score_FK)))
    order_N = np.lexsort((drawn.position, drawn.row, drawn.activation, drawn.feature))
    rank_N, size_N = _ranks(drawn.feature[order_N])
    quantile_N = np.empty(len(order_N), np.int64)
    quantile_N[order_N] = rank_N * n_quantiles // size_N
    order_N = np.lexsort((drawn.position, drawn.row, -drawn.score, quantile_N, drawn.feature))
    rank_N, _ = _ranks(drawn.feature[order_N] * n_quantiles + quantile_N[order_N])
    chosen_N = order_N[rank_N < per_quantile]
    return drawn.at(chosen_N), windows_NW[chosen_N], quantile_N[chosen_N]


def _ranks(sorted_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every entry its place among those equal to it, and how many these are."""
    begin_N, end_N = (np.searchsorted(sorted_N, sorted_N, side=side) for side in ("left", "right"))
    return np.arange(len(sorted_N)) - begin_N, end_N - begin_N
