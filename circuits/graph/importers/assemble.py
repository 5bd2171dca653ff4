"""What all readers of others' graphs share: nodes in table order, shares of the output, facts of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from circuits.graph.nodes import NodeKind, NodeTable


def table_order(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """int64[N], the rows in the order of a `NodeTable`; logits stay in theirs.

    Args:
        columns: `kind`, `part`, `layer`, `position` and `index` of every node.
    """
    is_logit = columns["kind"] == NodeKind.LOGIT
    keys = [np.where(is_logit, 0, columns[name]) for name in ("index", "position", "layer", "part")]
    return np.lexsort([*keys, columns["kind"]])


def shares(weights: np.ndarray) -> np.ndarray:
    """float64[N], weights of the output's nodes divided by their sum.

    Raises:
        ValueError: a weight is negative, or their sum is not a positive number.
    """
    total = weights.astype(np.float64).sum()
    if not (weights >= 0).all() or not 0 < total < np.inf:
        raise ValueError(f"expected probabilities of the logits with a positive sum, given {total:.6g}")
    return weights / total


def facts(
    *,
    source: str,
    prompt: str,
    tokens: Sequence[str],
    token_ids: Sequence[int] | None,
    model: str,
    n_layers: int,
    nodes: NodeTable,
    unknown: Sequence[str],
    **others: Any,
) -> dict[str, Any]:
    """Metadata of a graph that another tool made.

    Args:
        source: what it was read from.
        unknown: what a graph traced here says, and this one does not.
        others: what else the file says, for `metadata["imported"]`.
    """
    return {
        "prompt": prompt,
        "tokens": list(tokens),
        **({} if token_ids is None else {"token_ids": list(token_ids)}),
        "model": model,
        "n_layers": n_layers,
        "identity_error": None,
        "targets": [
            {
                "token": nodes.label[row] or f"#{nodes.index[row]}",
                "token_id": int(nodes.index[row]),
                "position": int(nodes.position[row]),
                "probability": float(nodes.probability[row]),
            }
            for row in np.flatnonzero(nodes.mask(NodeKind.LOGIT)).tolist()
        ],
        "imported": {"format": source, "unknown": list(unknown), **others},
    }
