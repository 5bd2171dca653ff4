"""Edges between features of the demo that hold over its corpus, and how much of held-out prompts' graphs they explain.

    python examples/global_circuits.py

Reads rows of the demo's corpus once, then traces the first held-out probes of every behaviour (none is picked) and prints which
share of the influence that crosses their edges between features crosses global ones, those of the largest expected effects.
Beside them stand the largest of their effects along the residual stream alone (`direct paths`), and three controls, which have
for each target as many sources:

- `virtual weights`: of largest |inner product of encoder and decoders|, whatever is active when;
- `most active`: of each layer as the global ones, those that fire on most tokens;
- `shuffled`: of each layer, features that fire, at random.

Then the neighbours of the features that stand for the first states of the alphabet that have one.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import circuits
import replacement
from circuits import CircuitGraph, GlobalCircuits
from circuits.attribution.readers import read_vectors
from circuits.explain.global_command import labels_of
from replacement import ReplacementModel
from replacement.data.open_tokens import open_source
from replacement.data.token_sources import first_rows
from replacement.demo.corpus import behaviours
from replacement.demo.corpus.geography import states

SIZES = (4, 16, 64)
BOUNDED_TOKENS, BOUNDED_NEIGHBOURS, BOUNDED_MEMORY = 3_200, 16, "32MB"


def corpus(model: ReplacementModel, n_tokens: int) -> Iterator[Tensor]:
    """Rows of the demo's corpus."""
    source = open_source("demo", model.language_model)
    return (row_T for rows_RT in first_rows(source.one_pass(), n_tokens // source.context) for row_T in rows_RT)


@torch.no_grad()
def virtual_weights(model: ReplacementModel, found: GlobalCircuits, most: int) -> GlobalCircuits:
    """For each target the sources of largest |virtual weight|, up to the scale of its norm, in the form of global circuits."""
    crosscoder, F = model.crosscoder, found.numbers.n_features
    n, local = crosscoder.n_features, model.localize("the")
    index_N, position_N = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    targets, sources, weights = [], [], []
    for layer in range(1, crosscoder.n_groups):
        reads_ND = sum(
            read_vectors(local, layer, site, index_N, position_N)[0] for site in crosscoder.wiring.reads[layer]
        )
        columns = []
        for below in range(layer):
            sites = [site for site in crosscoder.wiring.writes[below] if site.layer < layer]
            columns.append(reads_ND @ sum(crosscoder.decoder_vectors(below, index_N, site) for site in sites).T)
        weights_NS = torch.cat(columns, 1)
        chosen_NK = weights_NS.abs().topk(min(most, weights_NS.shape[1])).indices.sort().values
        targets.append(np.repeat(layer * n + np.arange(n), chosen_NK.shape[1]))
        sources.append(chosen_NK.flatten().numpy())
        weights.append(weights_NS.gather(1, chosen_NK).flatten().numpy())
    target, ones = np.concatenate(targets), np.ones(sum(map(len, targets)))
    edges = {"direct": np.concatenate(weights), "attention": 0 * ones, "together": ones, "reach": ones}
    indptr = np.searchsorted(target, np.arange(F + 1))
    return GlobalCircuits(found.features, indptr, np.concatenate(sources), edges, found.metadata)


def direct_paths(found: GlobalCircuits) -> GlobalCircuits:
    """The edges along the residual stream alone, as if attention carried nothing."""
    direct = found.with_edges(np.flatnonzero(found.edges["direct"]))
    return replace(direct, edges={**direct.edges, "attention": np.zeros_like(direct.edges["attention"])})


def most_active(found: GlobalCircuits) -> GlobalCircuits:
    """For each target as many sources of each layer as in `found`, those that fire on most tokens."""
    (_, n) = found.numbers.parts[0]
    firings_LF = found.features["firings"].reshape(-1, n)
    order = (np.argsort(-firings_LF, axis=1, kind="stable") + n * np.arange(len(firings_LF))[:, None]).flatten()
    layer_E = found.source // n  # sources rise inside a target, so those of a layer lie side by side
    first = np.flatnonzero(np.diff(found.target * n + layer_E, prepend=-1))
    rank_E = np.arange(len(layer_E)) - np.repeat(first, np.diff(first, append=len(layer_E)))
    return found.with_edges(np.arange(len(layer_E)), order[layer_E * n + rank_E])


def print_explained(model: ReplacementModel, found: GlobalCircuits, graphs: list[CircuitGraph]) -> None:
    """Shares of the edges of graphs that are global, mean over the graphs."""
    print(
        f"\nheld-out graphs ({len(graphs)}): mean share of the edges between features that are global, of their influence,"
    )
    print("and correlation of their weights with a_s times the global slope (0 where there is no global edge)")
    print(f"{'edges into a feature':24}{'':>18}{'edges':>10}{'influence':>12}{'correlation':>14}")
    for most in SIZES:
        kept = found.strongest(most)
        rows = {
            "expected effects": kept,
            "direct paths": direct_paths(found).strongest(most),
            "virtual weights": virtual_weights(model, found, most),
            "most active": most_active(kept),
            "shuffled": kept.shuffled(0),
        }
        for name, edges in rows.items():
            facts = [edges.explained(graph) for graph in graphs]
            means = [
                np.mean([fact[key] or 0.0 for fact in facts if fact["edges"]])
                for key in ("share_of_edges", "share_of_influence", "correlation")
            ]
            print(
                f"{most if name == 'expected effects' else '':<24}{name:>18}{means[0]:10.3f}{means[1]:12.3f}{means[2]:14.3f}"
            )


def print_bounded(model: ReplacementModel) -> None:
    """What a table that is too small for all pairs gives, beside the exact one."""
    started = time.process_time()
    exact = circuits.global_circuits(model, corpus(model, BOUNDED_TOKENS), neighbours=BOUNDED_NEIGHBOURS)
    speed = BOUNDED_TOKENS / (time.process_time() - started)
    small = circuits.global_circuits(
        model, corpus(model, BOUNDED_TOKENS), neighbours=BOUNDED_NEIGHBOURS, memory=BOUNDED_MEMORY
    )
    place, both = small.find(exact.target, exact.source)
    off = np.abs(small.share[place] - exact.share)[both].max()
    bound = (small.features["error"] / np.maximum(small.features["inflow"], 1e-30))[np.unique(small.target)]
    print(f"\none pass over {BOUNDED_TOKENS:,} tokens: {speed:.0f} tokens per second of processor time")
    print(f"bounded memory: the same tokens, {BOUNDED_NEIGHBOURS} neighbours, a table of {BOUNDED_MEMORY}")
    print(f"  pairs seen {exact.metadata['n_pairs']:,}, held in the end {small.metadata['n_pairs']:,}")
    print(f"  exact neighbours that are found {both.mean():.4f}; their shares of inflow are off by at most {off:.1e}")
    print(f"  stated bound of that: {np.median(bound):.1e} (median feature), {bound.max():.1e} (largest)")


def print_states(found: GlobalCircuits, n_states: int) -> None:
    """Neighbours of the features whose label begins with a state: of each state, the feature that fires most."""
    fires = np.flatnonzero(found.features["firings"])
    labels = labels_of(found, [found.numbers.name(number) for number in fires.tolist()])
    by_state: dict[str, str] = {}
    for name in sorted(labels, key=lambda name: -found.features["firings"][found.numbers.named(name)]):
        by_state.setdefault(labels[name].partition(":")[0], name)
    for state in [state for state in states() if state in by_state][:n_states]:
        name = by_state[state]
        account = "  ".join(f"{part.replace('_', ' ')} {value:+.2f}" for part, value in found.account(name).items())
        print(f"\n{name}  {labels[name][:90]}\n  {account}")
        for title, side in (("driven by", found.upstream(name, top=4)), ("drives", found.downstream(name, top=4))):
            for row in side:
                figures = f"{row.share:+7.1%} of inflow, {row.direct / row.effect:6.0%} direct"
                print(f"  {title:10}{row.name:>8} {figures}  {labels.get(row.name, '(no clear label)')[:70]}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=25_600, help="of the corpus")
    parser.add_argument("--prompts", type=int, default=2, help="held-out probes of every behaviour")
    parser.add_argument("--states", type=int, default=3, help="states whose neighbours are shown")
    parser.add_argument("--file", type=Path, help="a file of `circuits global` to use instead of a pass")
    arguments = parser.parse_args()
    model = replacement.load("demo")
    if arguments.file is None:
        found = circuits.global_circuits(model, corpus(model, arguments.tokens), corpus="the demo corpus")
    else:
        found = GlobalCircuits.load(arguments.file)
    facts = found.metadata
    print(
        f"{found!r}: {facts['n_pairs']:,} pairs seen, exact: {facts['is_exact']}, identity error {facts['identity_error']:.1e}"
    )
    prompts = [probe.prompt for skill in behaviours() for probe in skill.probes[: arguments.prompts]]
    print_explained(model, found, [circuits.trace(model, prompt) for prompt in prompts])
    print_bounded(model)
    print_states(found, arguments.states)


if __name__ == "__main__":
    main()
