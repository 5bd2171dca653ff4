"""Do trained dictionaries take the true intermediate step, or go around it?

    python examples/ground_truth/hop_fidelity.py --out runs/hops

Two networks whose circuit is known compute C from B and B from A, in three layers (see `models.py`), behind a random rotation.
A cross-layer transcoder (CLT) and a per-layer one (PLT) are trained on each, with BatchTopK and with JumpReLU and the tanh
penalty, at the same number of active features: what the truth has in each layer, rounded up. BatchTopK has it by construction;
the penalty is searched for with a seed that no row uses. For prompts on which a C is on, the graph of its logit is traced, and
the table says per dictionary

- L0 (active features per token, all layers) and FVU (fraction of the MLP outputs' variance unexplained);
- `B found`: share of the true B's that some feature of a layer up to B's computes (correlation of at least 0.8);
- hop fidelity: share of the influence on C that passes through such features, 1 in the truth (`hops.py` defines it); `(loose)`,
  the same with a correlation of 0.6 as enough; `(any)`, through any feature of B's layer whatever it computes;
- `errors`: share of the influence that ends in error terms before it met any, which hop fidelity leaves aside;
- AUROC of edge recovery: influence that crosses from one true variable to another, against the true edges.

Means over seeds, and the standard deviation after `+-`. The row `truth` is the exact dictionary under the same measurement.
Finished dictionaries are rows of a file in `--out` and are not trained again. `hop_remedies.py` asks what would help.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hops import EdgeScores, Hop, gate_edges, hop, mean_hop, middle_nodes, node_variables
from models import GroundTruth, and_or, two_hop
from trained import Activations, Trained, Variables, identify, measure, token_probability, train_dictionary

sys.path.append(str(Path(__file__).parent.parent))  # for `result_rows`, which all examples share

# isort: split
from result_rows import kept_row, spread

from circuits import NodeKind, trace
from replacement import ReplacementModel, Wiring
from replacement.crosscoder.activation import Activation, JumpReLU
from replacement.crosscoder.topk import BatchTopK
from replacement.training.dead_features import Auxiliary
from replacement.training.losses import Loss
from replacement.training.penalties import Tanh

NETWORKS: dict[str, Callable[..., GroundTruth]] = {"two-hop": two_hop, "and-or": and_or}
WIRINGS = {"CLT": Wiring.strictly_causal, "PLT": Wiring.per_layer}
MIDDLE_LAYER = 1
STRICT, LOOSE = 0.8, 0.6
"""Correlation with a true variable that counts as computing it."""
COLUMNS = ("L0", "FVU", "B found", "hop fidelity", "(loose)", "(any)", "errors", "edge AUROC")
WIDTH = 18
SEARCH_SEED = 100
"""Seed of the runs that search for a penalty."""


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

    def columns(self) -> dict[str, float]:
        """The row by the headings of the table."""
        fidelities = (one.fidelity for one in (self.strict, self.loose, self.any_of_layer))
        values = (self.l0, self.unexplained, self.found, *fidelities, self.strict.errors, self.auroc)
        return dict(zip(COLUMNS, values, strict=True))


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


def true_counts(truth: GroundTruth) -> tuple[int, ...]:
    """Active features per token of each layer in the exact dictionary, rounded up."""
    exact = measure(truth.crosscoder, Activations.of(truth, truth.crosscoder.wiring))
    counts_G = (exact.activations_GVF > 1e-6).float().sum(2) @ token_probability(truth).float()
    return tuple(math.ceil(count) for count in counts_G.tolist())


class Dictionaries:
    """Trained dictionaries of one network, measured; each is a row of a file and is trained where that row is missing.

    Args:
        path: file of the rows.
    """

    def __init__(self, network: str, path: Path, *, n_steps: int, n_prompts: int) -> None:
        self.truth = NETWORKS[network](rotation=0)
        self.variables = Variables.of(self.truth)
        self.path, self.n_steps, self.n_prompts = path, n_steps, n_prompts
        self._sizes = {"network": network, "steps": n_steps, "prompts": n_prompts}

    def measure(self, trained: Trained) -> dict[str, float]:
        """The columns of the table for a dictionary."""
        return measure_hops(self.truth, self.variables, trained, n_prompts=self.n_prompts).columns()

    def rows(self, seeds: Iterable[int], how: HowTrained, **key: object) -> list[dict[str, Any]]:
        """One row for each seed.

        Args:
            key: what else tells these rows from others in the file.
        """

        def make(seed: int) -> dict[str, float]:
            return self.measure(train_dictionary(self.truth, **how._asdict(), seed=seed, n_steps=self.n_steps))

        return [self._kept({**key, "seed": seed}, partial(make, seed)) for seed in seeds]

    def matched_penalty(self, wiring: Wiring, l0: float, **key: object) -> float:
        """The coefficient of the tanh penalty that leaves about `l0` features active per token.

        By bisection of its logarithm, which stops within 3 %, or after 7 runs.
        """

        def search() -> dict[str, float]:
            low, high, penalty = math.log(0.003), math.log(10.0), math.nan
            for _ in range(7):
                penalty = math.exp((low + high) / 2)
                how = with_penalty(wiring, penalty)
                found = train_dictionary(self.truth, **how._asdict(), seed=SEARCH_SEED, n_steps=self.n_steps).l0
                if abs(found / l0 - 1) < 0.03:
                    break
                low, high = (math.log(penalty), high) if found > l0 else (low, math.log(penalty))
            return {"penalty": penalty}

        return self._kept({**key, "seed": SEARCH_SEED}, search)["penalty"]

    def _kept(self, key: Mapping[str, object], make: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
        return kept_row(self.path, {**self._sizes, **key}, make)


class HowTrained(NamedTuple):
    """Arguments of `train_dictionary`."""

    wiring: Wiring
    activation: Activation
    losses: Sequence[Loss]


def with_penalty(wiring: Wiring, penalty: float) -> HowTrained:
    """As published CLTs are trained: JumpReLU with the tanh penalty."""
    return HowTrained(wiring, JumpReLU(), [Tanh(penalty), Auxiliary()])


def print_row(label: str, rows: Sequence[Mapping[str, float]]) -> None:
    """One line of the table: means and standard deviations over seeds."""
    forms = {"FVU": ".5f"}
    cells = "".join(f"{spread((row[name] for row in rows), forms.get(name, '.2f')):{WIDTH}}" for name in COLUMNS)
    print(f"{label:<28}{cells.rstrip()}", flush=True)


def print_heading(title: str) -> None:
    """The headings of the table."""
    print(f"\n{title}\n{'dictionary':<28}" + "".join(f"{name:{WIDTH}}" for name in COLUMNS).rstrip())


def print_network(network: str, options: argparse.Namespace) -> None:
    """The table of one network."""
    path = options.out / "hop_fidelity.json"
    dictionaries = Dictionaries(network, path, n_steps=options.steps, n_prompts=options.prompts)
    truth = dictionaries.truth
    print_heading(network)
    print_row(
        "truth", [dictionaries.measure(measure(truth.crosscoder, Activations.of(truth, truth.crosscoder.wiring)))]
    )
    k = true_counts(truth)
    for short, wired in WIRINGS.items():
        wiring = wired(truth.language_model)
        for method in ("BatchTopK", "JumpReLU"):
            key = {"dictionary": short, "method": method, "k": list(k)}
            if method == "BatchTopK":
                how = HowTrained(wiring, BatchTopK(k), [Auxiliary()])
            else:
                how = with_penalty(wiring, dictionaries.matched_penalty(wiring, sum(k), **key))
            print_row(f"{short}  {method}", dictionaries.rows(range(options.seeds), how, **key))


def main() -> None:
    """Print one table per network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows; finished ones are not made again")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="training steps of 256 tokens")
    parser.add_argument("--prompts", type=int, default=60, help="prompts traced per dictionary")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for network in options.networks:
        print_network(network, options)


if __name__ == "__main__":
    main()
