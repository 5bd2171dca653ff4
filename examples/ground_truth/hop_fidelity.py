"""Do trained dictionaries take the true intermediate step, or go around it?

    python examples/ground_truth/hop_fidelity.py

Two networks whose circuit is known compute C from B and B from A, in three layers (see `models.py`), behind a random rotation.
A cross-layer transcoder (CLT) and a per-layer one (PLT) are trained on each, at several strengths of the sparsity penalty and
with several seeds; both are given the same data, steps, features and penalties. For prompts on which a C is on, the graph of
its logit is traced, and the table says per dictionary

- L0 (active features per token, all layers) and FVU (fraction of the MLP outputs' variance unexplained);
- `B found`: share of the true B's that some feature of a layer up to B's computes (correlation of at least 0.8);
- hop fidelity: share of the influence on C that passes through such features, 1 in the truth (`hops.py` defines it); `(loose)`,
  the same with a correlation of 0.6 as enough; `(any)`, through any feature of B's layer whatever it computes;
- `errors`: share of the influence that ends in error terms before it met any, which hop fidelity leaves aside;
- AUROC of edge recovery: influence that crosses from one true variable to another, against the true edges.

Means over seeds, and the standard deviation after `+-`. The row `truth` is the exact dictionary under the same measurement.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from hops import EdgeScores, Hop, gate_edges, hop, mean_hop, middle_nodes, node_variables
from models import GroundTruth, and_or, two_hop
from trained import Activations, Trained, Variables, identify, measure, train_dictionary

from circuits import NodeKind, trace
from replacement import ReplacementModel

NETWORKS = {"two-hop": two_hop, "and-or": and_or}
PENALTIES = {"two-hop": (0.1, 0.25, 0.5, 1.0), "and-or": (0.03, 0.1, 0.3, 1.0)}
WIRINGS = {"CLT": "strictly_causal", "PLT": "per_layer"}
MIDDLE_LAYER = 1
STRICT, LOOSE = 0.8, 0.6
"""Correlation with a true variable that counts as computing it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One dictionary's measurements."""

    l0: float
    unexplained: float
    found: float
    """Share of the B's that are computed by some feature."""
    strict: Hop
    loose: Hop
    any_of_layer: Hop
    """Through any feature of B's layer."""
    auroc: float


def measure_hops(truth: GroundTruth, variables: Variables, trained: Trained, *, n_prompts: int) -> Row:
    """Trace the first prompts and measure how their influence runs."""
    model = ReplacementModel(truth.language_model, trained.crosscoder)
    identified = {least: identify(trained, variables, least=least) for least in (STRICT, LOOSE)}
    layer_of, _ = gate_edges(truth.program)
    scores, hops, any_of_layer = EdgeScores(truth), {least: [] for least in identified}, []
    for number in range(min(n_prompts, len(truth.prompts))):
        graph = trace(model, torch.tensor(truth.prompts[number]), targets=truth.logit_targets(number), coverage=1.0)
        targets = [next(iter(truth.program.outputs[plus])) for plus, _ in truth.targets[number]]
        any_of_layer.append(hop(graph, graph.nodes.mask(NodeKind.FEATURE) & (graph.nodes.layer == MIDDLE_LAYER)))
        for least, features in identified.items():
            names = node_variables(graph, features, targets)
            hops[least].append(hop(graph, middle_nodes(graph, names, layer_of, MIDDLE_LAYER)))
            if least == STRICT:
                scores.add(graph, names)
    middle = {name for name, layer in layer_of.items() if layer == MIDDLE_LAYER}
    found = {name for group in identified[STRICT][: MIDDLE_LAYER + 1] for name in group} & middle
    return Row(
        l0=trained.l0,
        unexplained=trained.unexplained,
        found=len(found) / len(middle),
        strict=mean_hop(hops[STRICT]),
        loose=mean_hop(hops[LOOSE]),
        any_of_layer=mean_hop(any_of_layer),
        auroc=scores.auroc,
    )


def print_row(label: str, rows: list[Row]) -> None:
    """One line of the table: means and standard deviations over seeds."""
    columns = np.array(
        [
            [row.l0, row.unexplained, row.found]
            + [one.fidelity for one in (row.strict, row.loose, row.any_of_layer)]
            + [row.strict.errors, row.auroc]
            for row in rows
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN: everything ended in errors
        mean, spread = np.nanmean(columns, 0), np.nanstd(columns, 0)
    cells = "  ".join(f"{m:5.2f} +-{s:4.2f}" for m, s in zip(mean, spread, strict=True))
    print(f"{label:<22}{cells}", flush=True)


def main() -> None:
    """Print one table per network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--penalties", type=float, nargs="+", help="strengths of the penalty instead of the usual four")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="training steps of 256 tokens")
    parser.add_argument("--prompts", type=int, default=60, help="prompts traced per dictionary")
    options = parser.parse_args()
    headings = ("L0", "FVU", "B found", "hop fidelity", "(loose)", "(any)", "errors", "edge AUROC")
    for network in options.networks:
        truth = NETWORKS[network](rotation=0)
        print(f"\n{network}\n{'dictionary  penalty':<22}" + "".join(f"{heading:<14}" for heading in headings))
        table = Activations.of(truth, truth.crosscoder.wiring)
        measured = functools.partial(measure_hops, truth, Variables.of(truth), n_prompts=options.prompts)
        print_row("truth", [measured(measure(truth.crosscoder, table))])
        for short, wiring in WIRINGS.items():
            for penalty in options.penalties or PENALTIES[network]:
                runs = (
                    train_dictionary(truth, wiring=wiring, penalty=penalty, seed=seed, n_steps=options.steps)
                    for seed in range(options.seeds)
                )
                print_row(f"{short:<12}{penalty:g}", [measured(one) for one in runs])


if __name__ == "__main__":
    main()
