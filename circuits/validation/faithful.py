"""A pruning that keeps what faithfulness needs: features are added until the circuit alone does what the model does.

Influence follows paths with attention patterns and norms held still, so it does not see the features that patterns depend on.
Here features are added in a few rounds by integrated gradients, as in attribution patching (Hanna et al. 2024):

    score_i = mean over a of  d m / d share_i   at   share = 1 for what is kept already, a for all others       0 < a < 1

with attention and norms live and other prompts' features in the place of what is left out (`circuits.validation.resampling`). A
score counts what a feature writes, what it does to later features and to attention patterns, and what it keeps others from
writing. Within a round the circuits of every size are measured, and the first that is faithful enough is taken. A round costs
five passes forwards and backwards over the other prompts, and one pass for every feature added.

Select with other prompts than those that the faithfulness reported is measured with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.nodes import NodeKind
from circuits.graph.pruning import always_kept, check_threshold, edges_among
from circuits.validation.resampling import Resampler
from circuits.validation.sufficiency import clean_output, first_of, over_features
from replacement import ReplacementModel
from replacement.number_checks import whole_number

ROUNDS = 4
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Points `a` on the path from resampled to clean features."""
MOST_NODES = 60


def prune_faithfully(
    model: ReplacementModel,
    graph: CircuitGraph,
    others: Sequence[Tensor],
    *,
    faithfulness: float | None = 0.7,
    most_nodes: int = MOST_NODES,
    edges: float = 0.98,
) -> CircuitGraph:
    """The features that the output needs, with attention live, and the graph's edges among them.

    Tokens, targets, and the errors and positions that `graph.prune()` keeps stay and count. A feature that only attention
    patterns need may have no edge.

    Args:
        model: the model the graph was traced in.
        others: token ids of other prompts of the graph's length, to resample from in the search.
        faithfulness: stop once the circuit's is as large, on these prompts; None to go on to the budget.
        most_nodes: most nodes of the circuit.
        edges: share of the influence of the edges among kept nodes that is kept.

    Returns:
        The circuit. `metadata["pruning"]` holds `nodes`, the share of node influence that it kept, `edges`, and under
        `faithful` what was asked for and what the search measured: `faithfulness`, `kl`, `other_prompts`, and whether the
        target was `reached`.

    Raises:
        ValueError: a graph of features, other prompts of another length, a target or share outside 0 to 1, or fewer nodes than
            stay anyway.
    """
    check_threshold("edges", edges)
    if faithfulness is not None:
        check_threshold("faithfulness", faithfulness, what="faithfulness")
    resampler = Resampler(model, Grounding.of(model, graph), others)
    stays_N = _always_stays(graph)
    n_features = whole_number("most_nodes", most_nodes, least=1) - int(stays_N.sum())
    if n_features < 1:
        raise ValueError(f"most_nodes: expected more than the {int(stays_N.sum())} that stay, given {most_nodes}")
    kept_S, facts = _search(resampler, n_features, target=faithfulness)
    column_N, first = resampler.grounding.column_N, resampler.grounding.columns.features.start
    is_feature = graph.nodes.mask(NodeKind.FEATURE)
    nodes_N = stays_N.copy()
    nodes_N[is_feature] |= kept_S[column_N[is_feature] - first]
    kept = edges_among(graph, nodes_N, share=edges)
    influence_N = np.where(always_kept(graph.nodes), 0.0, graph.influence())
    held = float(influence_N[nodes_N].sum() / influence_N.sum()) if influence_N.any() else 1.0
    asked = {"target": faithfulness, "most_nodes": most_nodes}
    pruning = {"nodes": min(held, 1.0), "edges": float(edges), "faithful": {**asked, **facts}}
    return replace(graph.select(kept.nodes, kept.edges), metadata={**graph.metadata, "pruning": pruning})


def rounds(resampler: Resampler, n_features: int) -> Iterator[np.ndarray]:
    """bool[P, S] in every round: the circuits after each of the features that it adds."""
    in_graph_S = over_features(resampler.grounding, np.ones(len(resampler.grounding.graph.nodes))) > 0
    n_features = min(n_features, int(in_graph_S.sum()))
    kept_S = np.zeros(resampler.n_features, dtype=bool)
    for end in dict.fromkeys(-(-n_features * number // ROUNDS) for number in range(1, ROUNDS + 1)):
        score_S = sum(resampler.gradient(np.where(kept_S, 1.0, share)) for share in SHARES) / len(SHARES)
        score_S = np.where(kept_S, np.inf, np.where(in_graph_S, score_S, -np.inf))
        kept_PS = first_of(score_S, range(int(kept_S.sum()) + 1, end + 1))
        if len(kept_PS):
            yield kept_PS
            kept_S = kept_PS[-1]


def _search(resampler: Resampler, n_features: int, *, target: float | None) -> tuple[np.ndarray, dict[str, Any]]:
    none = resampler.measure(np.zeros((1, resampler.n_features), dtype=bool))[0][0]
    scale = clean_output(resampler) - none or np.nan
    kept_S, facts = np.zeros(resampler.n_features, dtype=bool), {"faithfulness": 0.0, "kl": None, "reached": False}
    for kept_PS in rounds(resampler, n_features):
        measured = kept_PS if target is not None else kept_PS[-1:]
        output_P, kl_P = resampler.measure(measured)
        faithfulness_P = (output_P - none) / scale
        reached_P = np.zeros(len(measured), dtype=bool) if target is None else faithfulness_P >= target
        chosen = int(reached_P.argmax()) if reached_P.any() else -1
        kept_S, reached = measured[chosen], bool(reached_P.any())
        facts = {"faithfulness": float(faithfulness_P[chosen]), "kl": float(kl_P[chosen]), "reached": reached}
        if reached:
            break
    return kept_S, {**facts, "other_prompts": resampler.n_others}


def _always_stays(graph: CircuitGraph) -> np.ndarray:
    """bool[N], tokens, targets, and the errors and positions of the graph pruned by influence."""
    nodes = graph.nodes
    pruned_N = np.isin(nodes.ids(), graph.prune().nodes.ids())
    return always_kept(nodes) | (pruned_N & nodes.mask(NodeKind.ERROR, NodeKind.POSITION))
