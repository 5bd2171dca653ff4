"""Does a feature say what the MLP does? Edges as weights times activations, and features beside the MLP's own Jacobian.

    python examples/mlp_linearisation.py
    python examples/mlp_linearisation.py --prompt "the opposite of hot is"
    python examples/mlp_linearisation.py --model FOLDER --crosscoder FOLDER --prompt TEXT

Dunefsky, Chlenski and Nanda ("Transcoders Find Interpretable LLM Feature Circuits", 2024) split an edge between two features
of a transcoder at one position into a factor of weights alone, the same for every input, and a factor of the input:

    edge(s -> t) = F[s, t] (a_s / norm_t)       F[s, t] = sum_w W_dec[s, w] . gain W_enc[t]

with w the MLP outputs that s writes below t, a_s the activation of s and norm_t the scale of the norm in front of t. (Edges
from other positions are the same with the OV matrices of heads in F and attention patterns beside a_s.) The original MLP
permits no such split: its linearisation is another one at every input. For the most influential features of a circuit this
script prints, for the prompt at hand,

1. the strongest direct edges in these two factors; they are compared with the edges that `circuits.trace` found;
2. de-embeddings: the tokens a feature reads and those it promotes;
3. what happens to the MLP's output when the input moves along the feature's input vector u = W_enc / |W_enc|^2, which raises
   its pre-activation by 1: J u with the Jacobian J of the original MLP there, beside what the feature alone writes (W_dec),
   and beside the sum of all features that are active there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import circuits
import replacement
from circuits import CircuitGraph, NodeKind
from replacement import LocalReplacement, ReplacementModel, Site
from replacement.index.token_effects import FeatureWeights
from replacement.splicing.skip import read_depth, read_norm

PROMPT = "the capital of the state containing Dallas is"
TOLERANCE = 1e-4
"""Of identities, relative to the size of the numbers that are summed."""
AGREES = 0.9
"""Cosine from which two directions count as the same in the summary."""


@dataclass(frozen=True)
class Feature:
    """A feature of the circuit, and its weights."""

    node: int
    """Number in the full graph."""
    group: int
    index: int
    position: int
    name: str
    """`2/345@7`."""
    label: str
    site: Site
    """What it reads."""
    W_enc_D: Tensor


@dataclass(frozen=True)
class DirectEdge:
    """An edge between two features at one position, in two factors."""

    source: str
    target: str
    factor: float
    """F: weights alone."""
    activation: float
    """a_s / norm_t: the input."""
    traced: float
    """The direct part of the edge in the graph."""


@dataclass(frozen=True)
class Comparison:
    """A feature's input vector through the original MLP, beside what features write."""

    feature: Feature
    alone: tuple[float, float]
    """Cosine of J u with the feature's decoder vector of that layer, and |J u| / |W_dec|."""
    together: tuple[float, float]
    """The same with the sum over all active features."""
    promoted: tuple[str, str]
    """Tokens that J u promotes, and those that the decoder vector does."""


def by_influence(model: ReplacementModel, graph: CircuitGraph) -> list[Feature]:
    """The features of the MLPs in the pruned circuit, the most influential first; every table takes the first of them."""
    wiring, chosen = model.crosscoder.wiring, []
    numbers = {name: number for number, name in enumerate(graph.nodes.ids())}
    for row in (row for row in graph.prune().features() if row.part == "mlp"):
        group = [wiring.group_layer(g) for g in range(len(wiring.reads))].index(row.layer)
        if len(wiring.reads[group]) != 1 or model.crosscoder.skip:
            raise ValueError("expected a crosscoder without skip connections whose features read one site")
        (site,) = wiring.reads[group]
        W_enc_D = model.crosscoder.encoder_vectors(group, torch.tensor([row.index]), site)[0]
        name = f"{row.layer}/{row.index}@{row.position}"
        chosen.append(Feature(numbers[row.id], group, row.index, row.position, name, row.label, site, W_enc_D))
    return chosen


def invariant_factors(model: ReplacementModel, target: Feature, groups: np.ndarray, indices: np.ndarray) -> Tensor:
    """F of features at the target's position, `[N]`: decoder vectors of MLPs below it times its encoder vector, the norm's gain
    and centring between them."""
    lm, crosscoder = model.language_model, model.crosscoder
    one = torch.ones(1, dtype=lm.parts.exact_dtype, device=lm.device)
    paths = [lm.parts.norm_before(layer, "mlp") for layer in range(lm.shape.n_layers)]
    norm = read_norm(target.site, [lm.parts.norm_weights(path).freeze(one) for path in paths])
    v_D = target.W_enc_D if norm is None else norm.pull_back(target.W_enc_D[None], torch.zeros(1, dtype=torch.long))[0]
    factors = torch.zeros(len(groups), dtype=v_D.dtype)
    for group in np.unique(groups).tolist():
        here = np.flatnonzero(groups == group)
        for site in crosscoder.wiring.writes[group]:
            if site.layer < read_depth(target.site, lm.shape) // 2:  # MLPs below the point where the target reads
                vectors_ND = crosscoder.decoder_vectors(group, torch.from_numpy(indices[here]), site)
                factors[here] += vectors_ND @ v_D
    return factors


def direct_edges(
    model: ReplacementModel, local: LocalReplacement, graph: CircuitGraph, target: Feature
) -> list[DirectEdge]:
    """The edges into a feature from features at its position, strongest first, checked against the traced ones.

    Args:
        graph: the full graph, split by heads: the direct part of an edge is the one that no head carries.
    """
    nodes, edges, heads = graph.nodes, graph.edges, graph.heads
    assert heads is not None, "the graph is split by heads"
    row = slice(edges.indptr[target.node], edges.indptr[target.node + 1])
    source, traced = edges.source[row], heads.direct[row]
    same = (nodes.kind[source] == NodeKind.FEATURE) & (nodes.position[source] == target.position)
    source, traced = source[same & ~nodes.of_attention[source]], traced[same & ~nodes.of_attention[source]]
    group_of = {model.crosscoder.wiring.group_layer(g): g for g in range(model.crosscoder.n_groups)}
    groups = np.array([group_of[layer] for layer in nodes.layer[source].tolist()], dtype=np.int64)
    factors = invariant_factors(model, target, groups, nodes.index[source]).numpy()
    norm = read_norm(target.site, local.frozen.norms_mlp)
    scale = 1.0 if norm is None else float(norm.scale_T[target.position])
    activation = nodes.activation[source] / scale
    gap = np.abs(factors * activation - traced)
    assert (gap <= TOLERANCE * nodes.inflow[target.node]).all(), f"{target.name}: an edge is not F a / norm"
    names = [f"{nodes.layer[s]}/{nodes.index[s]}@{nodes.position[s]}" for s in source.tolist()]
    result = [
        DirectEdge(name, target.name, *map(float, numbers))
        for name, *numbers in zip(names, factors, activation, traced, strict=True)
    ]
    return sorted(result, key=lambda edge: -abs(edge.traced))


def compare_with_mlp(
    model: ReplacementModel, local: LocalReplacement, weights: FeatureWeights, feature: Feature
) -> Comparison:
    """One feature's input vector through the original MLP's Jacobian, its decoder vector, and all active features."""
    layer, crosscoder = feature.site.layer, model.crosscoder
    out = Site(layer, "mlp_out")
    x_1D = local.frozen.activations[feature.site][feature.position, None]
    u_1D = (feature.W_enc_D / feature.W_enc_D.square().sum())[None]
    mlp = model.language_model.parts.mlp_map(layer, feature.site.kind)
    y_1D, pull_back = torch.func.vjp(mlp, x_1D)  # w -> J^T w
    _, push_forward = torch.func.vjp(lambda w_1D: pull_back(w_1D)[0], torch.zeros_like(y_1D))  # u -> J u
    (Ju_1D,) = push_forward(u_1D)
    size = float(Ju_1D.norm()) ** 2
    assert torch.allclose(y_1D[0], local.frozen.activations[out][feature.position], rtol=TOLERANCE, atol=TOLERANCE)
    assert abs(float((pull_back(Ju_1D)[0] * u_1D).sum()) - size) <= TOLERANCE * size, "forward and backward J agree"
    features = local.features
    active = torch.nonzero((features.row == feature.position) & (features.group == feature.group))[:, 0]
    W_dec_ND = crosscoder.decoder_vectors(feature.group, features.index[active], out)
    W_enc_ND = crosscoder.encoder_vectors(feature.group, features.index[active], feature.site)
    (own,) = torch.nonzero(features.index[active] == feature.index)[:, 0].tolist()
    rises_N = W_enc_ND @ u_1D[0]
    assert abs(float(rises_N[own]) - 1.0) <= TOLERANCE, "u raises the feature's own pre-activation by 1"
    vectors_2D = torch.stack([Ju_1D[0], W_dec_ND[own]])
    tokens = weights.vocabulary.strongest(weights.vocabulary.promoted(vectors_2D), 3)
    first, second = (", ".join(text.strip() for text, _ in row) for row in tokens)
    alone, together = (_cosine_and_ratio(Ju_1D[0], v_D) for v_D in (W_dec_ND[own], rises_N @ W_dec_ND))
    return Comparison(feature, alone, together, (first, second))


def _cosine_and_ratio(a_D: Tensor, b_D: Tensor) -> tuple[float, float]:
    cosine = torch.nn.functional.cosine_similarity(a_D, b_D, dim=0)
    return float(cosine), float(a_D.norm() / b_D.norm().clamp(min=1e-12))


def print_edges(edges: Sequence[DirectEdge]) -> None:
    """Table 1."""
    print("Direct edges: weights alone (F) times the input (activation / norm)")
    print(f"{'source':>14}  {'target':>14}{'F':>10}{'input':>10}{'product':>10}{'traced':>10}")
    for edge in edges:
        product = edge.factor * edge.activation
        print(
            f"{edge.source:>14}  {edge.target:>14}{edge.factor:10.4f}{edge.activation:10.4f}{product:10.4f}{edge.traced:10.4f}"
        )


def print_tokens(features: Sequence[Feature], weights: FeatureWeights) -> None:
    """Table 2."""
    print("\nDe-embeddings: tokens a feature reads at its position, reads through a head, and promotes")
    for feature in features:
        (effects,) = weights.effects(feature.group, torch.tensor([feature.index]))
        head = "" if effects.head is None else " L{}H{}".format(*effects.head)
        sides = [(effects.read, ""), (effects.read_through_heads, head), (effects.promoted, "")]
        words = [", ".join(text.strip() for text, _ in tokens[:3]) + after for tokens, after in sides]
        print(f"{feature.name:>14}  {words[0]:34.33}{words[1]:40.39}{words[2]:.34}")


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Table 3, and what it says."""
    print(
        "\nAlong the feature's input vector: the original MLP's Jacobian, beside the feature alone and all active features"
    )
    print(f"{'':16}{'feature alone':>18}{'all features':>18}")
    print(f"{'feature':>14}  {'cosine':>9}{'ratio':>9}{'cosine':>9}{'ratio':>9}   MLP promotes / feature promotes")
    for row in comparisons:
        figures = "".join(f"{cosine:9.3f}{ratio:9.2f}" for cosine, ratio in (row.alone, row.together))
        print(f"{row.feature.name:>14}  {figures}   {row.promoted[0]} / {row.promoted[1]}")
    agreeing = [row for row in comparisons if row.alone[0] >= AGREES]
    cosines = [np.mean([getattr(row, name)[0] for row in comparisons]) for name in ("alone", "together")]
    print(
        f"\n{len(agreeing)} of {len(comparisons)} features write in the direction (cosine >= {AGREES}) in which the MLP moves "
        f"along their input vector; mean cosine {cosines[0]:.2f}, with all active features together {cosines[1]:.2f}."
    )
    larger = sum(row.alone[1] > 1 for row in comparisons)
    print(f"There the MLP moves by more than the feature writes in {larger} of {len(comparisons)} cases.")
    best, worst = (choose(comparisons, key=lambda row: row.alone[0]) for choose in (max, min))
    for words, row in (("Closest", best), ("Furthest", worst)):
        label = f" ({row.feature.label})" if row.feature.label else ""
        print(
            f"{words}: {row.feature.name}{label}, cosine {row.alone[0]:.2f}: "
            f"the MLP promotes {row.promoted[0]}; the feature {row.promoted[1]}."
        )
    print(
        "A small step tells what the MLP does around this input; a feature tells what it contributes between being off and its "
        "activation here. Where the two differ, the MLP bends in between, or several features share the direction."
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="`demo`, a hub name or a folder")
    parser.add_argument("--crosscoder", help="folder; the demo's for the demo")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--features", type=int, default=12, help="rows of each table: the most influential")
    parser.add_argument("--edges", type=int, default=2, help="strongest direct edges into each that are shown")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = replacement.load(options.model, crosscoder=options.crosscoder)
    graph = circuits.trace(model, options.prompt)
    ranked = by_influence(model, graph)
    if not ranked:
        raise ValueError("expected a prompt whose circuit holds features of MLPs, got one without any")
    graph, local = circuits.with_heads(model, graph), model.localize(model.language_model.tokenize(options.prompt))
    weights = FeatureWeights(model.language_model, model.crosscoder)
    expanded = [feature for feature in ranked if graph.nodes.expanded[feature.node]]
    edges = [into for feature in expanded if (into := direct_edges(model, local, graph, feature))]
    n_checked, chosen = sum(map(len, edges)), ranked[: options.features]
    print_edges([edge for into in edges[: options.features] for edge in into[: options.edges]])
    print(f"all {n_checked} direct edges into features of the circuit agree with the traced ones")
    print_tokens(chosen, weights)
    print_comparisons([compare_with_mlp(model, local, weights, feature) for feature in chosen])


if __name__ == "__main__":
    main()
