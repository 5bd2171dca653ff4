"""Does the demo answer a two-hop question through the state? What its graphs say.

    python examples/two_hop.py
    python examples/two_hop.py --out replacement/demo/artifacts/circuits.json    writes what `replacement demo` prints
    python examples/two_hop.py --model MODEL --crosscoder FOLDER --probes choose

`the capital of the state containing Dallas is` needs two hops, and Dallas is a city the model never saw in such a sentence.
This script traces the questions about 40 such cities, and says which share of the influence that the city's tokens have on the
answer passes through the feature of its state at the city's last token. State features are those of `replacement demo`, chosen
on other sentences about other cities. What happens when they are swapped in the original model is measured there. Then the
circuit of Dallas: its size, its scores and its strongest path.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import circuits
import replacement
from circuits.graph.paths import describe_path, strongest_path
from circuits.validation.hops import hop_fidelity
from replacement import ReplacementModel
from replacement.demo.corpus import capital_of
from replacement.demo.families import CHOOSE, FAMILIES, JUDGE, Case
from replacement.demo.feature_families import case_positions, choose_features, layer_and_index, read_firings
from replacement.files import write_atomic

STATE = FAMILIES[0]
PROMPT = "the capital of the state containing {city} is"
SEED = 14


def measure(model: ReplacementModel, *, probes: str = JUDGE, n_prompts: int = 40) -> dict[str, Any]:
    """Shares of the influence that pass through state features, mean over prompts, and the Dallas circuit, as JSON values."""
    choosing = STATE.of(CHOOSE)
    chosen = choose_features(read_firings(model, choosing), choosing)
    asking = [case for case in STATE.of(probes) if case.asks]
    order = np.random.default_rng(SEED).permutation(len(asking))[:n_prompts].tolist()
    shares: dict[str, list[float]] = {"best_feature": [], "good_features": []}
    for case in (asking[i] for i in order):
        graph = circuits.trace(model, case.prompt, targets=capital_of(case.concept))
        sources = city_mask(model, graph, case)
        for name, features in (
            ("best_feature", [chosen.best[case.concept]]),
            ("good_features", chosen.good[case.concept]),
        ):
            share = hop_fidelity(graph, sources=sources, via=feature_mask(model, graph, case, features))
            if np.isfinite(share):  # a city without any influence on the answer has no share
                shares[name].append(share)
    return {
        "crosscoder": model.crosscoder.fingerprint,
        "probes": probes,
        "prompts": len(shares["best_feature"]),
        "through_state_features": {name: fmean(values) for name, values in shares.items()},
        "dallas": dallas(model),
    }


def city_mask(model: ReplacementModel, graph: circuits.CircuitGraph, case: Case) -> np.ndarray:
    """bool[N], the token nodes of the city's pieces."""
    before = case.beginning.removesuffix(case.detail)
    first, last = case_positions(model, [case._replace(beginning=before), case])
    nodes = graph.nodes
    return nodes.mask(circuits.NodeKind.TOKEN) & (nodes.position > first) & (nodes.position <= last)


def feature_mask(
    model: ReplacementModel, graph: circuits.CircuitGraph, case: Case, features: Collection[int]
) -> np.ndarray:
    """bool[N], nodes at the city's last token of some features, numbered over all layers."""
    nodes, wanted = graph.nodes, {layer_and_index(model, feature) for feature in features}
    [last] = case_positions(model, [case])
    named = zip(nodes.layer.tolist(), nodes.index.tolist(), strict=True)
    is_wanted = np.array([name in wanted for name in named])
    return nodes.mask(circuits.NodeKind.FEATURE) & (nodes.position == last) & is_wanted


def dallas(model: ReplacementModel) -> dict[str, Any]:
    """The pruned circuit of the Dallas question."""
    circuit = circuits.trace(model, PROMPT.format(city="Dallas")).prune()
    scores = circuit.scores()
    return {
        "nodes": len(circuit.nodes),
        "edges": len(circuit.edges),
        "replacement": scores.replacement,
        "completeness": scores.completeness,
        "strongest_path": describe_path(circuit, strongest_path(circuit)),
    }


def main() -> None:
    """Parse the options, measure, and print or write."""
    parser = argparse.ArgumentParser(description="Trace two-hop questions of the demo.")
    parser.add_argument("--model", default="demo", help="`demo` or a folder")
    parser.add_argument("--crosscoder", help="folder; the demo's for the demo")
    parser.add_argument("--probes", choices=(JUDGE, CHOOSE), default=JUDGE)
    parser.add_argument("--prompts", type=int, default=40, help="questions traced")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = replacement.load(options.model, crosscoder=options.crosscoder)
    facts = measure(model, probes=options.probes, n_prompts=options.prompts)
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    if options.out is not None:
        write_atomic(options.out, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
