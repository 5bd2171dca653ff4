"""Validate a graph: does it predict interventions, and is its circuit enough and needed? The conductor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.influence import node_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.paths import average_path_length
from circuits.validation.agreement import agreement, cosine, mean_of_known, spearman
from circuits.validation.effects import NORMS, PATCHING, PATTERNS, Effects, Measured, sample_features
from circuits.validation.final_norm import with_final_norm
from circuits.validation.hops import hop_fidelity
from circuits.validation.perturbations import compare_perturbations
from circuits.validation.prediction import influence_among, predicted_changes, scaled_alone
from circuits.validation.report import page
from circuits.validation.robustness import robustness
from circuits.validation.sufficiency import sufficiency
from replacement import Crosscoder, ReplacementModel
from replacement.console import finite
from replacement.notebook import Report

SCALES = {"ablated": 0.0, "doubled": 2.0}
"""What a feature's activation is multiplied with."""

Facts = dict[str, Any]


def validate(
    model: ReplacementModel,
    graph: CircuitGraph,
    *,
    others: Sequence[Tensor] = (),
    prompts: Mapping[str, Sequence[str]] | None = None,
    other_crosscoder: Crosscoder | None = None,
    n_features: int = 64,
    seed: int = 0,
) -> Report:
    """Everything that `circuits validate` says about a graph, as one JSON object; figures that do not exist are None.

    Features are drawn uniformly among the graph's. Predictions are path sums through the graph's signed edges, with no
    threshold applied (`circuits.validation.prediction`); measurements are described in `circuits.validation.effects`.

    Args:
        model: the model the graph was traced in.
        graph: a graph; a pruned one predicts less, as what was removed counts as no effect.
        others: token ids of other prompts of the same length, for resampled ablation; without them it is left out.
        prompts, other_crosscoder: what the circuit is to survive, see `circuits.validation.robustness`.
        n_features: features drawn.
        seed: of the draw.

    Returns:
        `features`, `seed`, `sampling`; `self_check`; `effects`, one row per patching, attention patterns, norms, change and
        distance in layers (or `logits`); `one_layer_cosine`; `influence_against_ablation`; `influence_among_features`;
        `perturbations`; `circuit` by treatment of error terms; `robustness`; `average_path_length`, `hop_fidelity`.

    Raises:
        ValueError: a graph of another model or without features, other prompts of another length, or features that cannot be
            predicted from a graph or cannot react: scaled and shifted ones, and those chosen over all layers together.
    """
    grounding = Grounding.of(model, graph)
    changed = sample_features(grounding, n_features, seed=seed)
    effects = Effects(model, grounding)
    rows, one_layer, ablation = _compare(effects, changed)
    circuit = None
    if others and grounding.logits:
        treatments = ("keep", "resample")
        circuit = {errors: sufficiency(model, grounding, others, errors=errors, seed=seed) for errors in treatments}
    facts: Facts = {
        "prompt": graph.metadata["prompt"],
        "is_pruned": "pruning" in graph.metadata,
        "features": len(changed),
        "seed": seed,
        "sampling": "uniform over the features of the graph",
        "prediction": "path sums through signed edges, thresholds not applied",
        "self_check": _self_check(effects, changed),
        "influence_against_ablation": ablation,
        "influence_among_features": _among_features(effects, changed),
        "perturbations": compare_perturbations(model, grounding, changed, seed=seed),
        "one_layer_cosine": one_layer,
        "effects": rows,
        "circuit": circuit,
        "robustness": robustness(model, graph, prompts=prompts, other_crosscoder=other_crosscoder),
        "average_path_length": average_path_length(graph),
        "hop_fidelity": hop_fidelity(graph),
    }
    title = f"graph of {facts['prompt']!r:.80} against interventions"
    return Report({name: finite(value) for name, value in facts.items()}, title=title, page=page)


def _self_check(effects: Effects, changed: np.ndarray) -> Facts:
    predicted, measured = effects.self_check(changed)
    gap, size = float(np.linalg.norm(predicted - measured)), float(np.linalg.norm(measured))
    return {"edges": len(predicted), "relative_error": gap / size if size else 0.0}


def _compare(effects: Effects, changed: np.ndarray) -> tuple[list[Facts], list[Facts], list[Facts]]:
    """Predicted against measured effects, in every setting."""
    graph = effects.grounding.graph
    influence_B = node_influence(graph)[changed]
    rows, one_layer, ablation = [], [], []
    for change, scale in SCALES.items():
        changes = scaled_alone(changed, scale - 1)
        predictions = {total: predicted_changes(graph, changes, total=total) for total in (False, True)}
        live = {
            total: with_final_norm(effects.grounding, changes, predicted_BN, total=total)
            for total, predicted_BN in predictions.items()
        }
        for patching in PATCHING:
            predicted_BN = predictions[patching != "constrained"]
            for patterns in PATTERNS:
                runs = {norms: effects.measure(changed, scale, patching, patterns, norms=norms) for norms in NORMS}
                measured, setting = runs["live"], {"patching": patching, "patterns": patterns, "change": change}
                for norms, run in runs.items():
                    expected_BN = live[patching != "constrained"] if norms == "live" else predicted_BN
                    for distance, pairs in pairs_by_distance(graph, changed, expected_BN, run).items():
                        if norms != "final" or distance == "logits":  # features come before the final norm
                            rows.append({**setting, "norms": norms, "distance": distance, **agreement(*pairs)})
                    if patching == "constrained" and norms != "final":
                        # one layer downstream nothing else has reacted yet, whatever the patching
                        figures = one_layer_cosine(graph, changed, predicted_BN, run)
                        one_layer.append({"patterns": patterns, "norms": norms, "change": change, **figures})
                if change == "ablated" and effects.grounding.logits:
                    rho = spearman(influence_B, measured.kl_B)
                    ablation.append({"patching": patching, "patterns": patterns, "spearman": rho})
    return rows, one_layer, ablation


def _among_features(effects: Effects, changed: np.ndarray) -> list[Facts]:
    """Influence between pairs of features against the share of the second's activation that ablating the first moves.

    As published (Ameisen et al. 2025): absolute changes, as influence has no sign, with a window of layers held.
    """
    nodes = effects.grounding.graph.nodes
    influence_BN = influence_among(effects.grounding.graph, changed)
    target = nodes.mask(NodeKind.FEATURE) & nodes.expanded & (nodes.activation != 0)
    later_BN = nodes.layer[None, :] > nodes.layer[changed][:, None]
    pairs = target & later_BN & (nodes.position[None, :] >= nodes.position[changed][:, None])
    rows = []
    for patterns in PATTERNS:
        change_BN = np.abs(effects.measure(changed, 0.0, "window", patterns).change_BN)
        share_BN = np.divide(
            change_BN, np.abs(nodes.activation), out=np.zeros_like(change_BN), where=nodes.activation != 0
        )
        rho = spearman(influence_BN[pairs], share_BN[pairs])
        rows.append({"patterns": patterns, "pairs": int(pairs.sum()), "spearman": rho})
    return rows


def pairs_by_distance(
    graph: CircuitGraph, changed: np.ndarray, predicted_BN: np.ndarray, measured: Measured
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predicted and measured changes of all (changed feature, target) pairs, by layers between them; `logits` last.

    Targets are the expanded features of the graph in later layers, at the changed feature's position or later.
    """
    nodes = graph.nodes
    logits = nodes.mask(NodeKind.LOGIT)
    target = nodes.mask(NodeKind.FEATURE) & nodes.expanded
    distance_BN = nodes.layer[None, :] - nodes.layer[changed][:, None]
    after_BN = nodes.position[None, :] >= nodes.position[changed][:, None]
    by_distance = {}
    for distance in range(1, int(distance_BN[:, target].max(initial=0)) + 1):
        chosen = target & (distance_BN == distance) & after_BN
        if chosen.any():
            by_distance[str(distance)] = predicted_BN[chosen], measured.change_BN[chosen]
    if logits.any():
        chosen = logits & after_BN
        by_distance["logits"] = predicted_BN[chosen], measured.change_BN[chosen]
    return by_distance


def one_layer_cosine(graph: CircuitGraph, changed: np.ndarray, predicted_BN: np.ndarray, measured: Measured) -> Facts:
    """Mean, over changed features, of the cosine of predicted and measured changes of activations one layer downstream.

    `cosine` is over the graph's expanded features of that layer, and `larger_half` its mean over the changed features that are
    predicted to do more than the median one. `all_features` measures over every feature of the layer: what others do, those
    that were not active before among them, is predicted to be nothing.
    """
    nodes, figures = graph.nodes, []
    for number, node in enumerate(changed.tolist()):
        layer = int(nodes.layer[node]) + 1
        below = nodes.mask(NodeKind.FEATURE) & nodes.expanded & (nodes.layer == layer)
        predicted, change = predicted_BN[number, below], measured.change_BN[number, below]
        if not predicted.any():
            continue  # the graph has no edge from the feature into that layer
        size, size_of_layer = float(np.linalg.norm(predicted)), float(measured.size_BL[number, layer])
        of_layer = float(predicted @ change) / (size * size_of_layer) if size_of_layer else float("nan")
        figures.append((size, cosine(predicted, change), of_layer))
    sizes, cosines, of_layers = np.array(figures).reshape(-1, 3).T
    return {
        "features": len(figures),
        "cosine": mean_of_known(cosines),
        "median": mean_of_known(cosines, np.median),
        "larger_half": mean_of_known(cosines[sizes > np.median(sizes)] if figures else cosines),
        "all_features": mean_of_known(of_layers),
    }
