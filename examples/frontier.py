"""How much of the MLPs do few features explain? Crosscoders and baselines at matched numbers of active features.

    python examples/frontier.py --out runs/frontier            # some 55 short runs for 39 results; about 2 minutes each
    python examples/frontier.py --out runs/frontier --plot     # draws docs/frontier.svg and .png from the results

All methods replace the demo model's four MLPs, read `mlp_in`, have 1024 features per layer and see the same tokens in the
same order; the seed decides the initial weights. A level is a total number of active features per token (L0): TopK and
BatchTopK keep a quarter of it in each layer. Baselines: a dictionary of frozen random decoder vectors (encoder and biases
trained), and the MLPs' own neurons, thresholded. The linear maps of the skip PLT are dense and not counted in its L0.

JumpReLU and ReLU have no such setting. Their penalty's coefficient is searched for, run by run, until the L0 on held-out rows
is within 5 % of the level (`penalty_search.py`); it is the total that is matched: layers share it as the penalty decides.

Rows go to OUT/results.json as runs finish, those of searches to OUT/searches.json as well. An interrupted series goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_activations import DemoActivations
from frontier_neurons import measure_neurons
from frontier_plot import draw
from penalty_search import search
from result_rows import append_row, find_row, read_rows

from replacement import Crosscoder, LanguageModel
from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.crosscoder.wiring import Wiring
from replacement.training.build import load_models
from replacement.training.config import TrainingConfig
from replacement.training.dead_features import Auxiliary, PreActivation
from replacement.training.losses import Loss
from replacement.training.penalties import L1OfNorms, Penalty, Tanh
from replacement.training.scaling import measure
from replacement.training.trainer import SCALE_BATCHES, Trainer
from replacement.validation.fidelity import measure_fidelity

LEVELS = (16, 32, 64)
N_FEATURES = 1024
BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Method:
    """A crosscoder of the comparison; the parameter of `activation` is the L0 per layer."""

    wiring: Callable[..., Wiring] = Wiring.strictly_causal
    activation: Callable[[int], Activation] = TopK
    losses: Sequence[Loss] = field(default_factory=lambda: (Auxiliary(),))
    tied: bool = False
    skip: bool = False
    frozen_decoder: bool = False
    seeds: int = 1
    """Seeds that are part of the comparison."""


METHODS: dict[str, Method] = {
    "CLT": Method(seeds=3),
    "PLT": Method(wiring=Wiring.per_layer, seeds=3),
    "tied CLT": Method(tied=True),
    "skip PLT": Method(wiring=Wiring.per_layer, skip=True),
    "CLT BatchTopK": Method(activation=BatchTopK),
    "CLT JumpReLU": Method(
        activation=lambda k: JumpReLU(threshold=1.0, bandwidth=1.0), losses=(Tanh(1e-3), PreActivation())
    ),
    "random CLT": Method(frozen_decoder=True),
    "CLT ReLU + L1": Method(activation=lambda k: ReLU(), losses=(L1OfNorms(3e-3),)),
}
NEURONS = "neurons"


def freeze_decoder(crosscoder: Crosscoder, seed: int) -> None:
    """Random decoder vectors of norm 1 to each site (sites are scaled to norm sqrt(D) in training), never trained."""
    generator = torch.Generator().manual_seed(seed)
    for weight_FWD in crosscoder.W_dec:
        random = torch.randn(weight_FWD.shape, generator=generator)
        weight_FWD.data.copy_(random / random.norm(dim=-1, keepdim=True))
        weight_FWD.requires_grad_(False)


def new_trainer(method: Method, lm: LanguageModel, data: DemoActivations, config: TrainingConfig, k: int) -> Trainer:
    """A fresh crosscoder with the scales of the first batches."""
    crosscoder = Crosscoder(
        method.wiring(lm, read="mlp_in"),
        n_features=N_FEATURES,
        activation=method.activation(k),
        tied=method.tied,
        skip=method.skip,
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
        seed=config.seed,
    )
    first = data.batches(min(SCALE_BATCHES, config.n_steps), batch_tokens=config.batch_tokens)
    trainer = Trainer(crosscoder, config, measure(crosscoder, first))
    if method.frozen_decoder:
        freeze_decoder(crosscoder, config.seed)
    return trainer


def train_and_measure(
    name: str,
    level: int,
    seed: int,
    n_tokens: int,
    lm: LanguageModel,
    data: DemoActivations,
    *,
    penalty: float = 1.0,
) -> dict[str, Any]:
    """One run, and what is plotted of it; coefficients of sparsity penalties are multiplied with `penalty`."""
    k = level // lm.shape.n_layers
    if name == NEURONS:
        return measure_neurons(lm, data.held_out_RT, k)
    method = METHODS[name]
    batch_tokens = min(BATCH_TOKENS, n_tokens)
    config = TrainingConfig(n_tokens=n_tokens, batch_tokens=batch_tokens, losses=_losses(method, penalty), seed=seed)
    trainer = new_trainer(method, lm, data, config, k)
    started = time.perf_counter()
    for batch in data.batches(config.n_steps, batch_tokens=batch_tokens):
        report = trainer.step(batch)
    seconds = time.perf_counter() - started
    fidelity = measure_fidelity(lm, trainer.finished(), data.held_out_RT)
    return {
        "l0": fidelity.total_l0,
        "l0_by_layer": fidelity.l0,
        "unexplained": fidelity.mean_unexplained,
        "unexplained_by_layer": fidelity.unexplained,
        "kl": fidelity.kl,
        "agreement": fidelity.agreement,
        "agreement_all": fidelity.agreement_all,
        "cross_entropy_recovered": fidelity.cross_entropy_recovered,
        "dead_fraction": report.n_dead / (N_FEATURES * lm.shape.n_layers),
        "seconds": round(seconds, 1),
    }


def _losses(method: Method, penalty: float) -> list[Loss]:
    return [
        dataclasses.replace(loss, coefficient=loss.coefficient * penalty) if isinstance(loss, Penalty) else loss
        for loss in method.losses
    ]


def search_and_measure(
    name: str, level: int, seed: int, n_tokens: int, lm: LanguageModel, data: DemoActivations, searches: Path
) -> dict[str, Any]:
    """The run whose L0 is nearest to the level, of those that a search for the penalty's coefficient makes."""
    key = {"name": name, "seed": seed, "tokens": n_tokens}

    def done() -> list[dict[str, Any]]:
        return [row for row in read_rows(searches) if all(row[each] == value for each, value in key.items())]

    def run(penalty: float) -> float:
        row = train_and_measure(name, level, seed, n_tokens, lm, data, penalty=penalty)
        append_row(searches, key | {"penalty": penalty} | row)
        print(f"{name:14} searching level {level}: penalty {penalty:.4f} gives L0 {row['l0']:.1f}", flush=True)
        return float(row["l0"])

    penalty = search(run, level=level, first=1.0, known=[(row["penalty"], row["l0"]) for row in done()])
    return next(row for row in done() if row["penalty"] == penalty)


def runs(only: Sequence[str] = (), levels: Sequence[int] = LEVELS, seeds: int = 3) -> list[tuple[str, int, int]]:
    """(name, level, seed) of every run, in the order they are worth having."""
    names = [name for name in (NEURONS, *METHODS) if not only or name in only]
    planned = [(name, level, 0) for name in names if name in ("CLT", "PLT", NEURONS) for level in levels]
    planned += [(name, level, 0) for name in names for level in levels if (name, level, 0) not in planned]
    several = {name: min(seeds, METHODS[name].seeds) for name in names if name != NEURONS}
    return planned + [(n, level, s) for s in range(1, seeds) for n in several if s < several[n] for level in levels]


def train_all(arguments: argparse.Namespace) -> None:
    """Every run that is not in the results yet."""
    lm = load_models("demo").first
    sites = sorted({*Wiring.per_layer(lm, read="mlp_in").read_sites, *Wiring.per_layer(lm).write_sites})
    data = DemoActivations(arguments.out, lm, sites, n_tokens=arguments.tokens)
    results = arguments.out / "results.json"
    for name, level, seed in runs(arguments.only, arguments.levels, arguments.seeds):
        key = {"name": name, "level": level, "seed": seed, "tokens": arguments.tokens}
        if find_row(results, **key):
            continue
        if name != NEURONS and any(isinstance(loss, Penalty) for loss in METHODS[name].losses):
            searches = arguments.out / "searches.json"
            row = search_and_measure(name, level, seed, arguments.tokens, lm, data, searches)
        else:
            row = train_and_measure(name, level, seed, arguments.tokens, lm, data)
        append_row(results, key | row)
        print(
            f"{name:14} level {level:3d} seed {seed}  L0 {row['l0']:6.1f}  unexplained {row['unexplained']:.4f}  "
            f"KL {row['kl']:.4f}  agreement {row['agreement_all']:.4f}  {row.get('seconds', 0):.0f} s",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for activations and results")
    parser.add_argument("--only", nargs="+", default=(), choices=(NEURONS, *METHODS), metavar="NAME", help="methods")
    parser.add_argument("--levels", nargs="+", type=int, default=LEVELS, help="total L0 levels, multiples of 4")
    parser.add_argument("--seeds", type=int, default=3, help="most seeds per method")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="training tokens of each run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", nargs="?", type=Path, const=Path("docs/frontier"), help="draw PLOT.svg and PLOT.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.plot is None:
        train_all(arguments)
    else:
        rows = [row for row in read_rows(arguments.out / "results.json") if row["tokens"] == arguments.tokens]
        # Two processes that share the work may both have done a run.
        draw(list({(row["name"], row["level"], row["seed"]): row for row in rows}.values()), arguments.plot)


if __name__ == "__main__":
    main()
