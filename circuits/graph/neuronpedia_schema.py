"""Words and numbers of the graph JSON that Neuronpedia and the circuit-tracer front ends share, for its reader and its writer.

The schema (version 1) requires the keys below and allows others everywhere.
"""

from __future__ import annotations

import math

VERSION = 1
FEATURE, ERROR, EMBEDDING, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
ATTENTION_FEATURE, ATTENTION_ERROR = "lorsa", "lorsa error"
"""Types of attention's nodes in graphs of other tools; ours have the types of MLP nodes, and ids that begin with `A`."""
UPLOAD_BYTES = 100_000_000
"""Largest file that Neuronpedia takes as an upload."""
REQUIRED = {
    "graph": ("metadata", "qParams", "nodes", "links"),
    "metadata": ("slug", "scan", "prompt_tokens", "prompt"),
    "node": ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"),
    "link": ("source", "target", "weight"),
}
QK_RESULTS = "qk_tracing_results"
"""Key of a node's attention score divided among pairs of nodes; also of all of them, by node id, in a graph's metadata."""
QK_LISTS = {"pair_wise_contributors": 3, "top_q_marginal_contributors": 2, "top_k_marginal_contributors": 2}
"""Lists in such a result -> length of their items: one or two node ids, then a number."""


def cantor_pair(layer: int, index: int) -> int:
    """The one whole number that stands for (layer, index): `(l + i)(l + i + 1) / 2 + i`."""
    return (layer + index) * (layer + index + 1) // 2 + index


def cantor_unpair(number: int) -> tuple[int, int]:
    """(layer, index) of a number >= 0; the inverse of `cantor_pair`."""
    total = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - total * (total + 1) // 2
    return total - index, index
