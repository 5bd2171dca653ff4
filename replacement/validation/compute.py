"""Compute-equivalent: the share of the original's training compute that a model as good as the replacement would have taken.

The loss of a replacement says little by itself. A training curve of the original, or smaller models of one family, turn it
into compute: the smallest amount whose loss is no larger than the original's final loss plus the replacement's increase
(Gao et al. 2024, "Scaling and evaluating sparse autoencoders", and Templeton et al. report it so). Between two points the
loss is taken to be linear in the logarithm of compute.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from replacement.files import read_text


def read_curve(path: str | Path) -> list[tuple[float, float]]:
    """(compute, loss) pairs of a JSON file, by rising compute; any unit of compute, as long as it is the same.

    The file holds a list of pairs, or an object with such a list under `curve`.

    Raises:
        ValueError: names the file: missing, not JSON, fewer than two points, or one that is not two finite numbers with
            compute above 0.
    """
    text = read_text(path, expected="a JSON file of [compute, loss] pairs")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    points = value.get("curve") if isinstance(value, dict) else value
    if not isinstance(points, list) or len(points) < 2:
        raise ValueError(
            f"{path}: expected a list of at least two [compute, loss] pairs, or an object with one as 'curve'"
        )
    curve = [_point(point) for point in points]
    if None in curve:
        number = curve.index(None)
        got = reprlib.repr(points[number])
        raise ValueError(f"{path}, point {number}: expected [compute above 0, loss], got {got}")
    return sorted(point for point in curve if point is not None)


def _point(point: object) -> tuple[float, float] | None:
    """A pair as numbers, or None if it is none."""
    if not isinstance(point, list) or len(point) != 2 or not all(type(x) in (int, float) for x in point):
        return None
    try:
        compute, loss = map(float, point)
    except OverflowError:
        return None
    return (compute, loss) if compute > 0 and math.isfinite(compute) and math.isfinite(loss) else None


def compute_equivalent(curve: list[tuple[float, float]], increase: float) -> dict[str, Any]:
    """The fraction of the curve's compute at which its loss first is within `increase` of its last.

    Args:
        curve: (compute, loss) pairs by rising compute, at least two; its last loss stands for the original's, so that a
            curve measured on other held-out text is as good.
        increase: of the replacement's cross-entropy over the original's, nats; below 0 counts as 0.

    Returns:
        `fraction`; None where even the first point is better than the replacement (`below_curve` is true then).
    """
    final_compute, final_loss = curve[-1]
    target = final_loss + max(0.0, increase)
    facts = {"target_loss": target, "final_loss": final_loss, "final_compute": final_compute, "below_curve": False}
    for (compute, loss), (next_compute, next_loss) in zip([(0.0, math.inf), *curve], curve, strict=False):
        if next_loss <= target:
            if compute == 0:
                return facts | {"fraction": None, "compute": None, "below_curve": True}
            share = (loss - target) / (loss - next_loss)
            reached = compute * (next_compute / compute) ** share
            return facts | {"fraction": reached / final_compute, "compute": reached}
    raise AssertionError("the last point has the target loss or less")
