"""How much of the MLPs do few features explain? Crosscoders and baselines at matched numbers of active features.

    python examples/frontier.py --out runs/frontier            # trains 36 small crosscoders; about 2 minutes each
    python examples/frontier.py --out runs/frontier --plot     # draws docs/frontier.svg and .png from the results

All methods replace the demo model's four MLPs, read `mlp_in`, have 1024 features per layer and see the same tokens in the
same order; the seed decides the initial weights. A level is a total number of active features per token (L0): TopK and
BatchTopK keep a quarter of it in each layer. Baselines: a dictionary of frozen random decoder vectors (encoder and biases
trained), and the MLPs' own neurons, thresholded. The linear maps of the skip PLT are dense and not counted in its L0.

JumpReLU and ReLU have no such setting. Their penalty's coefficient c follows the L0 of the training batches: each step moves
`log c` by a fraction of `log(L0 / level)`. So c depends on nothing but the run; the L0 reached is measured on held-out rows
and plotted as measured. It is the total that is steered: layers share it as the penalty decides.

Rows go to OUT/results.json as runs finish. An interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_activations import DemoActivations
from frontier_neurons import measure_neurons
from frontier_plot import draw
from result_rows import append_row, find_row, read_rows

from replacement import Crosscoder, LanguageModel
from replacement.activation import Activation, BatchTopK, JumpReLU, ReLU, TopK
from replacement.fidelity import measure_fidelity
from replacement.training.build import load_models
from replacement.training.config import TrainingConfig
from replacement.training.losses import Auxiliary, L1OfNorms, Loss, Penalty, PreActivation, Tanh
from replacement.training.scaling import measure
from replacement.training.trainer import SCALE_BATCHES, Trainer
from replacement.wiring import Wiring

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
    first_bias: float = 0.0
    """Added to the encoder biases before training; below 0, few features are active in the first steps."""
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
    "CLT ReLU + L1": Method(activation=lambda k: ReLU(), losses=(L1OfNorms(5e-3),), first_bias=-1.0),
}
NEURONS = "neurons"


class PenaltyControl:
    """Moves the coefficient of a run's sparsity penalty until the L0 of its batches is the one wanted.

    The L0 aimed at falls from four times the level to the level over the first half of the steps: penalties push features
    out much faster than they let them back in.
    """

    RATE, GAIN, MEMORY = 0.02, 1.0, 0.9
    """Step of `log c` per unit of error, its immediate part, and the weight of the past in the running error."""

    def __init__(self, config: TrainingConfig, level: float) -> None:
        self.config, self.level, self.first = config, level, list(config.losses)
        self.sum, self.error = 0.0, 0.0

    def update(self, l0: float, step: int) -> None:
        """Take the L0 of a step, from 1, and set the coefficient of the next."""
        aim = self.level * 4 ** max(0.0, 1 - step / (0.5 * self.config.n_steps))
        new = max(-1.0, min(1.0, math.log(max(l0, 0.1) / aim)))
        self.error = self.MEMORY * self.error + (1 - self.MEMORY) * new
        self.sum += self.RATE * self.error
        factor = math.exp(self.sum + self.GAIN * self.error)
        self.config.losses = [
            dataclasses.replace(loss, coefficient=loss.coefficient * factor) if isinstance(loss, Penalty) else loss
            for loss in self.first
        ]


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
    with torch.no_grad():
        for bias_F in crosscoder.b_enc:
            bias_F.add_(method.first_bias)
    if method.frozen_decoder:
        freeze_decoder(crosscoder, config.seed)
    return trainer


def train_and_measure(
    name: str, level: int, seed: int, n_tokens: int, lm: LanguageModel, data: DemoActivations
) -> dict[str, Any]:
    """One run, and what is plotted of it."""
    k = level // lm.shape.n_layers
    if name == NEURONS:
        return measure_neurons(lm, data.held_out_RT, k)
    method = METHODS[name]
    batch_tokens = min(BATCH_TOKENS, n_tokens)
    config = TrainingConfig(
        n_tokens=n_tokens, batch_tokens=batch_tokens, losses=list(method.losses), seed=seed, sparsity_warmup=0.0
    )
    trainer = new_trainer(method, lm, data, config, k)
    control = PenaltyControl(config, level) if any(isinstance(loss, Penalty) for loss in method.losses) else None
    started = time.perf_counter()
    for batch in data.batches(config.n_steps, batch_tokens=batch_tokens):
        report = trainer.step(batch)
        if control is not None:
            control.update(report.l0, report.step)
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
