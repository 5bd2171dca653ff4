"""Which heads does induction run on? Name them from circuits, see why they attend, and take them away.

    python examples/induction_heads.py

In `A B C D A B C` the next word is `D`: the word that followed the last one before. On held-out sequences of random words this
script

1. traces each prompt and adds up which heads carry the edges of the pruned circuit from the position of `D` to the last one,
   weighted with the edges' influence;
2. divides the attention score of the first of them among pairs of nodes, minus the mean over the other keys: induction should
   match what the query reads of its own word with what the key says of the word BEFORE it. How much a key's feature owes to
   that word is measured, by the share of its inputs that comes from the position before;
3. removes the heads from the original model (their output is set to its mean over the prompts), first the one named first,
   then the first two and so on, beside as many heads drawn at random, and counts right answers: induction should go, other
   behaviours stay.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import circuits
import replacement
from circuits import FeatureTarget, NodeKind, QKAttributor
from circuits.graph.influence import edge_influence
from circuits.heads.qk_result import SourceNode
from replacement import LanguageModel, ReplacementModel, Site
from replacement.demo.accuracy import answer_probes, measure_accuracy
from replacement.demo.corpus import behaviours
from replacement.demo.corpus.sentences import Probe

Head = tuple[int, int]
"""Layer and head."""


def induction_probes(n: int, *, seed: int = 0) -> list[Probe]:
    """The first `n` held-out sequences."""
    (induction,) = (behaviour for behaviour in behaviours(seed) if behaviour.name == "induction")
    return list(induction.probes[:n])


def key_position(tokens: Sequence[int]) -> int:
    """Position behind the earlier occurrence of the last token: where the answer stands."""
    return tokens[:-1].index(tokens[-1]) + 1


def carrying_heads(model: ReplacementModel, probes: Iterable[Probe]) -> dict[Head, float]:
    """Share of the transport from the answer's earlier position to the last one that each head has; largest first."""
    total: defaultdict[Head, float] = defaultdict(float)
    for probe in probes:
        tokens = model.language_model.tokenize(probe.prompt)
        circuit = circuits.with_heads(model, circuits.trace(model, tokens).prune())
        assert circuit.heads is not None
        nodes, edges, last = circuit.nodes, circuit.edges, len(tokens) - 1
        from_key = (nodes.position[edges.source] == key_position(tokens.tolist())) & (
            nodes.position[edges.target] == last
        )
        influence = edge_influence(circuit)
        for edge in np.flatnonzero(from_key).tolist():
            parts = circuit.heads.of(edge)
            size = sum(abs(weight) for _, _, weight in parts) or 1.0
            for layer, head, weight in parts:
                total[layer, head] += influence[edge] * abs(weight) / size
    whole = sum(total.values())
    return {head: value / whole for head, value in sorted(total.items(), key=lambda item: -item[1])}


def mean_patterns(model: ReplacementModel, probes: Iterable[Probe], heads: Iterable[Head]) -> dict[Head, float]:
    """Attention from the last position to the answer's earlier one, mean over prompts."""
    attention: defaultdict[Head, list[float]] = defaultdict(list)
    for probe in probes:
        tokens = model.language_model.tokenize(probe.prompt)
        patterns, key = model.language_model.read_patterns(tokens[None]), key_position(tokens.tolist())
        for layer, head in heads:
            attention[layer, head].append(float(patterns[layer][0, head, -1, key]))
    return {head: float(np.mean(values)) for head, values in attention.items()}


def share_from(model: ReplacementModel, tokens: Tensor, feature: FeatureTarget, position: int) -> float:
    """Share of a feature's inputs (sum of |edges|) that comes from one position."""
    graph = circuits.trace(model, tokens, targets=feature, max_nodes=1)
    (row,) = np.flatnonzero(graph.nodes.is_target)
    into = graph.edges.into(np.array([row]))
    size = np.abs(graph.edges.weight[into])
    return float(size[graph.nodes.position[graph.edges.source[into]] == position].sum() / size.sum())


def print_pairs(model: ReplacementModel, probe: Probe, head: Head, *, n: int) -> None:
    """The top pairs of one head on one prompt, and what each key owes to the token before it."""
    tokens = model.language_model.tokenize(probe.prompt)
    key = key_position(tokens.tolist())
    attribution = QKAttributor(model, tokens).score(layer=head[0], head=head[1], query=-1, key=key, contrast="mean")
    words = probe.prompt.split()
    print(f"\nWhy does L{head[0]}H{head[1]} attend? `{probe.prompt}` -> {probe.answers[0]}")
    print(f"query: {words[-1]} at {len(tokens) - 1}; key: {words[key - 1]} at {key}, behind {words[key - 2]}", end="; ")
    print(
        f"pattern {attribution.pattern:.2f}; score above the mean of the other keys {attribution.value:.2f}", end=", "
    )
    print(f"identity error {attribution.identity_error:.0e}")
    print(f"{'part':>6}  {'of the key, from ' + words[key - 2]:>24}  query node x key node")
    for query_node, key_node, value in attribution.top(n):
        share = "-"
        if key_node.kind is NodeKind.FEATURE:
            feature = FeatureTarget(key_node.layer, key_node.index, key_node.position)
            share = f"{share_from(model, tokens, feature, key - 1):.0%}"
        print(f"{value:6.2f}  {share:>24}  {_name(query_node)} x {_name(key_node)}")


def _name(node: SourceNode) -> str:
    """A feature by number and what it reads, other nodes by their label."""
    if node.kind is not NodeKind.FEATURE:
        return node.label
    return f"{node.layer}/{node.index} (reads {node.label.removeprefix('~ ').partition(' → ')[0]})"


def without_heads(lm: LanguageModel, heads: Iterable[Head], means: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """The original model with some heads' outputs held at their means."""
    by_layer: defaultdict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)

    def hook(layer: int) -> Callable[[Tensor], Tensor]:
        def run(z_BTHK: Tensor) -> Tensor:
            z_BTHK = z_BTHK.clone()
            z_BTHK[:, :, by_layer[layer]] = means[layer][by_layer[layer]]
            return z_BTHK

        return run

    hooks = {Site(layer, "attn_z"): hook(layer) for layer in by_layer}
    return lambda tokens_BT: lm.run(tokens_BT, hooks)


def mean_outputs(lm: LanguageModel, probes: Iterable[Probe]) -> dict[int, Tensor]:
    """Mean of every head's `z` over prompts and positions: layer -> `[H, K]`."""
    sites = [Site(layer, "attn_z") for layer in range(lm.shape.n_layers)]
    read = [lm.read(lm.tokenize(probe.prompt), sites) for probe in probes]
    means = {site.layer: torch.cat([values[site] for values in read]).mean(0) for site in sites}
    return {layer: mean_X.view(lm.shape.n_heads, -1) for layer, mean_X in means.items()}


def print_ablations(model: ReplacementModel, ranking: Sequence[Head], probes: Sequence[Probe], *, most: int) -> None:
    """Right answers without the first heads of the ranking, and without as many at random."""
    lm, rng = model.language_model, np.random.default_rng(0)
    means = mean_outputs(lm, probes[:100])
    heads = [(layer, head) for layer in range(lm.shape.n_layers) for head in range(lm.shape.n_heads)]
    draws = 5
    print(f"\n{'removed':34}{'right answers':>14}{'as many at random':>20}  (mean and range of {draws} draws)")
    for count in range(most + 1):
        named = ranking[:count]
        text = " ".join(f"L{layer}H{head}" for layer, head in named) or "nothing"
        right = _right(without_heads(lm, named, means), lm, probes)
        others = [head for head in heads if head not in ranking[:most]]
        controls = [
            _right(without_heads(lm, [others[i] for i in rng.permutation(len(others))[:count]], means), lm, probes)
            for _ in range(draws if count else 1)
        ]
        print(f"{text:34}{right:14.0%}{np.mean(controls):12.0%}  {min(controls):.0%} to {max(controls):.0%}")
    removed = " ".join(f"L{layer}H{head}" for layer, head in ranking[:most])
    print(f"\n{'behaviour':28}{'original':>10}  without {removed}")
    skills = behaviours()
    before = measure_accuracy(lm, lm.tokenizer, skills)
    after = measure_accuracy(without_heads(lm, ranking[:most], means), lm.tokenizer, skills)
    for original, removed in zip(before, after, strict=True):
        print(f"{original.name:28}{original.top1:10.0%}{removed.top1:10.0%}")


def _right(logits_of: Callable[[Tensor], Tensor], lm: LanguageModel, probes: Iterable[Probe]) -> float:
    return float(np.mean([outcome.correct for outcome in answer_probes(logits_of, lm.tokenizer, probes)]))


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description="Name the induction heads, see why they attend, take them away.")
    parser.add_argument("--prompts", type=int, default=40, help="prompts that heads are named from")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of nodes shown")
    parser.add_argument("--remove", type=int, default=4, help="heads removed at most")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = replacement.load("demo")
    probes = induction_probes(300)
    shares = carrying_heads(model, probes[: options.prompts])
    ranking = list(shares)
    patterns = mean_patterns(model, probes[: options.prompts], ranking)
    print(f"Heads on the edges from the answer's earlier position to the last ({options.prompts} held-out prompts)")
    print(f"{'head':8}{'share':>8}{'attention':>12}")
    for layer, head in ranking[:8]:
        print(f"L{layer}H{head:<6}{shares[layer, head]:8.1%}{patterns[layer, head]:12.2f}")
    for head in ranking[:2]:
        print_pairs(model, probes[0], head, n=options.pairs)
    print_ablations(model, ranking, probes, most=options.remove)


if __name__ == "__main__":
    main()
