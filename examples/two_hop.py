"""Does the demo answer a two-hop question through the state? What its graphs say.

    python examples/two_hop.py
    python examples/two_hop.py --out replacement/demo/artifacts/circuits.json    writes what `replacement demo` prints
    python examples/two_hop.py --model MODEL --crosscoder FOLDER --probes choose

`the capital of the state containing Dallas is` needs two hops, and Dallas is a city the model never saw in such a sentence.
This script traces the questions about 40 such cities, and says which share of the influence that the city's tokens have on the
answer passes through the feature of its state at the city's last token. State features are those of `replacement demo`, chosen
on other sentences about other cities. What happens when they are swapped in the original model is measured there; here the
first MLP's whole output at the city is swapped, and it is said how much of its word on the state is that feature's. Then
the circuit of Dallas: its size, its scores and its strongest path.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import circuits
import replacement
from circuits.graph.paths import describe_path, strongest_path
from circuits.validation.hops import hop_fidelity
from replacement import ReplacementModel, Site
from replacement.demo.corpus import capital_of
from replacement.demo.families import FAMILIES
from replacement.demo.family_cases import CHOOSE, JUDGE, Case
from replacement.demo.feature_families import (
    ChosenFeatures,
    case_positions,
    choose_features,
    layer_and_index,
    read_firings,
)
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
        "first_mlp": first_mlp(model, chosen, [asking[i] for i in order]),
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


def first_mlp(model: ReplacementModel, chosen: ChosenFeatures, cases: Sequence[Case]) -> dict[str, float]:
    """What the first MLP writes of the state at the city, and how much of that is one feature's.

    `answer_follows`: share of cases whose answer becomes that of another case's state when the first MLP's whole output at the
    city becomes that case's. `share_of_feature`: along the direction from the mean of all cities to the mean of the city's
    state, the projection of what the state's best feature writes over that of the output; mean over cases, 0 where the feature
    is of a later layer.
    """
    lm, site, crosscoder = model.language_model, Site(0, "mlp_out"), model.crosscoder
    written_CD = torch.stack([_at_city(model, case, site) for case in STATE.of(CHOOSE)])
    concepts = np.array([case.concept for case in STATE.of(CHOOSE)])
    mean_D, follows, shares = written_CD.mean(0), [], []
    for case, other in zip(cases, [*cases[1:], cases[0]], strict=True):
        tokens_T, output_D = lm.tokenize(case.prompt), _at_city(model, case, site)
        if other.concept != case.concept:
            replacement_D, [position] = _at_city(model, other, site), case_positions(model, [case])

            def hook(x_BTD: Tensor, replacement_D: Tensor = replacement_D, position: int = position) -> Tensor:
                return x_BTD.index_copy(-2, torch.tensor([position]), replacement_D.expand_as(x_BTD[..., :1, :]))

            top = int(lm.run(tokens_T, {site: hook})[-1].argmax())
            follows.append(lm.token_strings([top]) == [capital_of(other.concept)])
        direction_D = written_CD[torch.from_numpy(concepts == case.concept)].mean(0) - mean_D
        layer, index = layer_and_index(model, chosen.best[case.concept])
        share = 0.0
        if layer == 0:
            features = model.localize(tokens_T).features
            [position] = case_positions(model, [case])
            active = (features.group == 0) & (features.row == position) & (features.index == index)
            vector_D = crosscoder.decoder_vectors(0, torch.tensor([index]), site)[0]
            share = float(features.activation[active].sum() * (vector_D @ direction_D))
            share /= float((output_D - mean_D) @ direction_D)
        shares.append(share)
    return {"pairs": len(follows), "answer_follows": fmean(follows), "share_of_feature": fmean(shares)}


def _at_city(model: ReplacementModel, case: Case, site: Site) -> Tensor:
    """The original model's activation at a site, at the city's last token."""
    [position] = case_positions(model, [case])
    return model.language_model.read(model.language_model.tokenize(case.prompt), {site})[site][position]


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
