"""How well predicted numbers agree with measured ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def agreement(predicted: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Predicted against measured numbers; NaN where one side does not vary (correlations) or is all zero (the others).

    Returns:
        Number of `pairs`; `spearman`, the correlation of the ranks, where equal numbers share their mean rank; `pearson`;
        `cosine`; and `nmse`, which is `sum (predicted - measured)^2 / sum measured^2`.
    """
    power = float((measured**2).sum())
    return {
        "pairs": len(predicted),
        "spearman": spearman(predicted, measured),
        "pearson": pearson(predicted, measured),
        "cosine": cosine(predicted, measured),
        "nmse": float(((predicted - measured) ** 2).sum()) / power if power else float("nan"),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN for fewer than two pairs, or where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks."""
    return pearson(ranks(x), ranks(y))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Cosine of two vectors; NaN where one is zero."""
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size else float("nan")


def mean_of_known(x: np.ndarray, mean: Callable[[np.ndarray], np.floating] = np.mean) -> float:
    """The mean (or median) of the finite numbers; NaN without any."""
    known = x[np.isfinite(x)]
    return float(mean(known)) if len(known) else float("nan")


def ranks(x: np.ndarray) -> np.ndarray:
    """float64[P], place in rising order; equal numbers share the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def area(x: np.ndarray, y: np.ndarray) -> float:
    """Area under a curve through points, by trapezoids."""
    return float(np.trapezoid(y, x))
