"""One dictionary over all layers, or one per layer? An acausal crosscoder against sparse autoencoders at equal loss.

    python examples/acausal_against_saes.py --out runs/acausal     # trains 14 small dictionaries; about a minute each

Both read and write the demo model's residual stream after every block. A feature that persists over layers is one feature of
the crosscoder and one in each layer's autoencoder, so the crosscoder should need fewer features, and fewer active ones, for
the same reconstruction (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"). Two sweeps:
dictionary size with 32 active features per token, and active features with 2048 features, all layers together. How many the
autoencoders would need is interpolated between their points (log-log).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_activations import DemoActivations
from result_rows import append_row, find_row

from replacement import Crosscoder, LanguageModel
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring
from replacement.training import TrainingConfig, train
from replacement.training.build import load_models
from replacement.validation.fidelity import measure_fidelity

SAES, CROSSCODER = "SAEs", "crosscoder"
SIZES = {SAES: (512, 1024, 2048, 4096), CROSSCODER: (256, 512, 1024, 2048)}
"""Features of all layers together, in the sweep of dictionary sizes."""
ACTIVE = {SAES: (16, 32, 64, 128), CROSSCODER: (8, 16, 32, 64)}
"""Active features of all layers together, in the sweep of sparsity."""
FIXED_ACTIVE, FIXED_SIZE = 32, 2048
BATCH_TOKENS = 2048

Run = tuple[str, int, int]
"""Kind, features and active features, both of all layers together."""


def size_sweep(kind: str) -> list[Run]:
    """Dictionaries of all sizes."""
    return [(kind, size, FIXED_ACTIVE) for size in SIZES[kind]]


def sparsity_sweep(kind: str) -> list[Run]:
    """One dictionary size, more or less sparse."""
    return [(kind, FIXED_SIZE, active) for active in ACTIVE[kind]]


def train_and_measure(run: Run, n_tokens: int, lm: LanguageModel, data: DemoActivations) -> dict[str, Any]:
    """Train one dictionary (or one per layer) and measure it on held-out rows."""
    kind, size, active = run
    wiring = Wiring.acausal(lm) if kind == CROSSCODER else Wiring.autoencoder(lm)
    if size % wiring.n_groups or active % wiring.n_groups:
        raise ValueError(f"{size} features and {active} active ones do not divide into {wiring.n_groups} layers")
    crosscoder = Crosscoder(
        wiring,
        n_features=size // wiring.n_groups,
        activation=TopK(active // wiring.n_groups),
        model_name=lm.name,
        model_fingerprint=lm.fingerprint,
        seed=0,
    )
    config = TrainingConfig(n_tokens=n_tokens, batch_tokens=min(BATCH_TOKENS, n_tokens))
    trained = train(crosscoder, data.batches(config.n_steps, batch_tokens=config.batch_tokens), config)
    fidelity = measure_fidelity(lm, trained, data.held_out_RT)
    return {
        "l0": fidelity.total_l0,
        "unexplained": fidelity.mean_unexplained,
        "unexplained_by_layer": fidelity.unexplained,
    }


def needed(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The size at which a curve reaches a loss, by linear interpolation between logarithms.

    None outside its range, or where the curve does not fall.

    Args:
        points: (size, loss).
    """
    sizes, losses = (np.log(values) for values in zip(*sorted(points), strict=True))
    if (np.diff(losses) >= 0).any() or not losses[-1] <= math.log(loss) <= losses[0]:
        return None
    return float(np.exp(np.interp(math.log(loss), losses[::-1], sizes[::-1])))


def print_sweep(title: str, entry: str, found: dict[Run, dict[str, Any]], sweeps: dict[str, list[Run]]) -> list[float]:
    """Both curves, what the autoencoders need for each of the crosscoder's losses, and the factors."""
    place = 1 if entry == "features" else 2
    points = [(float(run[place]), found[run]["unexplained"]) for run in sweeps[SAES]]
    print(f"\n{title}\n{'':12}{'features':>10}{'active':>8}{'unexplained':>13}   SAEs' {entry} at this loss")
    for run in sweeps[SAES]:
        print(f"{SAES:12}{run[1]:10d}{run[2]:8d}{found[run]['unexplained']:13.4f}")
    factors = []
    largest, least = max(size for size, _ in points), min(loss for _, loss in points)
    for run in sweeps[CROSSCODER]:
        loss = found[run]["unexplained"]
        number = needed(points, loss)
        text = "not between their points"
        if number is not None:
            text = f"{number:.0f}: {number / run[place]:.2f} times as many"
            factors.append(number / run[place])
        elif loss < least:
            text = f"above {largest:.0f}: more than {largest / run[place]:.1f} times as many"
        print(f"{CROSSCODER:12}{run[1]:10d}{run[2]:8d}{loss:13.4f}   {text}")
    if factors:
        mean = math.exp(sum(map(math.log, factors)) / len(factors))
        print(f"{entry}: the autoencoders need {mean:.2f} times as many, geometric mean over {len(factors)} losses")
    return factors


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for activations and results")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="training tokens of each run")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = load_models("demo").first
    data = DemoActivations(arguments.out, lm, Wiring.acausal(lm).read_sites, n_tokens=arguments.tokens)
    results = arguments.out / "results.json"
    sizes, sparsities = ({kind: sweep(kind) for kind in (SAES, CROSSCODER)} for sweep in (size_sweep, sparsity_sweep))
    found: dict[Run, dict[str, Any]] = {}
    for run in dict.fromkeys(run for sweep in (sizes, sparsities) for runs in sweep.values() for run in runs):
        key = dict(zip(("kind", "features", "active"), run, strict=True)) | {"tokens": arguments.tokens}
        row = find_row(results, **key)
        if row is None:
            row = key | train_and_measure(run, arguments.tokens, lm, data)
            append_row(results, row)
        found[run] = row
    print_sweep(f"dictionary size, {FIXED_ACTIVE} active features per token", "features", found, sizes)
    print_sweep(f"active features, {FIXED_SIZE} features", "active", found, sparsities)


if __name__ == "__main__":
    main()
