"""Shared and exclusive features of two models: which claims of exclusiveness are true?

    python examples/toys/diffing.py --out runs/toys                 # 1/8 of the size; --scale 1 for all of it

Two models' activations are sums of known features. Some features are exclusive to one model (half of them to each); the
others are shared, as strong in both or weaker in the first. A crosscoder over both models is trained with L1 and with
BatchTopK, and a feature is claimed as the second model's own if its relative decoder norm is above 0.9. The L1 of decoder
norms favours features that write to one model only (Lindsey et al. 2024, "Sparse Crosscoders"; Mishra-Sharma et al. 2025,
"Insights on Crosscoder Model Diffing"), so it claims shared features too; latent scaling (Minder et al. 2025) is to take the
false claims back. Here the truth is known, so claims have a precision and a recall.

Two regimes: 450 of 4096 features exclusive, and 700 of 1024. `--scale` divides the numbers of features and the width alike.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from toy import Activations, Fit, fit, measure, shape  # first: it finds plot_style

# isort: split
from matplotlib import pyplot
from plot_style import STYLE, save
from result_rows import kept_row, spread

from replacement import Crosscoder
from replacement.crosscoder.activation import Activation, ReLU
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import BatchTopK
from replacement.crosscoder.wiring import Wiring
from replacement.training.dead_features import Auxiliary
from replacement.training.losses import Loss
from replacement.training.penalties import L1OfNorms
from replacement.validation.latent_scaling import latent_scaling, relative_decoder_norms

CLAIM = 0.9
"""Relative decoder norm above which a feature is claimed as the second model's own."""
MATCH = 0.7
"""Correlation of activations from which a crosscoder's feature counts as a true one."""
REGIMES = {"450 of 4096": (4096, 450, 1024), "700 of 1024": (1024, 700, 512)}
"""Features, how many of them are exclusive, width of the activations."""
ACTIVE = 12
"""True features active per token, on average."""
N_STEPS = 1000
METHODS: dict[str, tuple[Activation, list[Loss]]] = {
    "L1 0.01": (ReLU(), [L1OfNorms(0.01), Auxiliary()]),
    "L1 0.03": (ReLU(), [L1OfNorms(0.03), Auxiliary()]),
    "BatchTopK 12": (BatchTopK(ACTIVE), [Auxiliary()]),
}
"""The first L1 leaves about as much unexplained as BatchTopK does, the second has about as many active features."""
SHARED, FIRST, SECOND, NOBODY = 0, 1, 2, 3


class Truth(NamedTuple):
    """The features two models are made of."""

    owner_F: Tensor
    """`SHARED`, `FIRST` or `SECOND`."""
    vectors_FMD: Tensor
    """Vector of every feature in both models, zero in a model that lacks it."""
    chance_F: Tensor
    """Chance to be active."""


class Claims(NamedTuple):
    """Features claimed as the second model's own, and what is true of them."""

    claimed: int
    shared: int
    """Claimed features that are really shared."""
    unmatched: int
    """Claimed features that are like no true feature of the second model, or the first model's."""
    precision: float
    """Share of the claims that are true; NaN without claims."""
    recall: float
    """Share of the second model's own features that some true claim is about."""


class Result(NamedTuple):
    """One trained crosscoder."""

    fit: Fit
    by_norm: Claims
    """By the relative decoder norm alone."""
    by_scaling: Claims
    """Those that latent scaling confirms."""
    norms_S: Tensor
    """Relative decoder norms of living features that match a true one."""
    owner_S: Tensor
    """Whose features these are."""

    def to_row(self) -> dict[str, list[float]]:
        """Plain JSON value; `from_row` is the inverse."""
        return {name: list(part) if isinstance(part, tuple) else part.tolist() for name, part in self._asdict().items()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Result:
        """Read what `to_row` wrote."""
        claims = (Claims(*row[name]) for name in ("by_norm", "by_scaling"))
        return cls(Fit(*row["fit"]), *claims, torch.tensor(row["norms_S"]), torch.tensor(row["owner_S"]))


def make_truth(n_features: int, n_exclusive: int, width: int, *, seed: int) -> Truth:
    """Random features; half of the shared ones are weaker in the first model, by a factor between 0.2 and 1.

    A shared feature is thus above what latent scaling calls absent (a ratio of 0.2).
    """
    generator = torch.Generator().manual_seed(seed)
    owner_F = torch.zeros(n_features, dtype=torch.int64)
    exclusive_S = torch.randperm(n_features, generator=generator)[:n_exclusive]
    owner_F[exclusive_S] = torch.where(torch.arange(n_exclusive) % 2 == 0, FIRST, SECOND)
    common_FD, own_FD = (torch.randn(n_features, width, generator=generator) for _ in range(2))
    common_FD, turned_FD = (torch.nn.functional.normalize(x) for x in (common_FD, common_FD + 0.3 * own_FD))
    ratio_F = torch.where(
        torch.rand(n_features, generator=generator) < 0.5,
        torch.ones(n_features),
        0.2 + 0.8 * torch.rand(n_features, generator=generator),
    )
    strength_FM = torch.stack([ratio_F * (owner_F != SECOND), (owner_F != FIRST).float()], dim=1)
    strength_FM[owner_F == FIRST, 0] = 1
    chance_F = (1 + torch.arange(n_features)[torch.randperm(n_features, generator=generator)]) ** -0.5
    vectors_FMD = torch.stack([common_FD, turned_FD], dim=1) * strength_FM[..., None]
    return Truth(owner_F, vectors_FMD, ACTIVE * chance_F / chance_F.sum())


def sample(truth: Truth, n_rows: int, *, seed: int) -> tuple[Tensor, dict[Site, Tensor]]:
    """True activations `[N, F]` (0.5 to 1.5 where active) and the activations of both models."""
    generator = torch.Generator().manual_seed(seed)
    on_NF = torch.rand(n_rows, len(truth.chance_F), generator=generator) < truth.chance_F
    acts_NF = on_NF * (0.5 + torch.rand(on_NF.shape, generator=generator))
    sites = wiring_of(truth).read_sites
    return acts_NF, {site: acts_NF @ truth.vectors_FMD[:, model] for model, site in enumerate(sites)}


def wiring_of(truth: Truth) -> Wiring:
    """A crosscoder over one site of both models."""
    return Wiring.model_diffing(shape(truth.vectors_FMD.shape[2]), layer=0)


def train_one(truth: Truth, method: str, *, n_steps: int = N_STEPS, seed: int = 0) -> Crosscoder:
    """A crosscoder with as many features as there are true ones."""
    activation, losses = METHODS[method]
    return fit(
        wiring_of(truth),
        sample(truth, 16384, seed=seed + 1000)[1],
        n_features=len(truth.owner_F),
        activation=activation,
        losses=losses,
        n_steps=n_steps,
        batch_rows=256,
        seed=seed,
    )


@torch.no_grad()
def match(crosscoder: Crosscoder, acts_NF: Tensor, data: Activations) -> tuple[Tensor, Tensor]:
    """For each of the crosscoder's features the true one whose activations are most alike, and their correlation."""
    pair = [x_NF - x_NF.mean(dim=0) for x_NF in (crosscoder.encode(data).dense(0), acts_NF)]
    found_NF, true_NF = (torch.nn.functional.normalize(x_NF, dim=0) for x_NF in pair)
    best_F = (found_NF.T @ true_NF).max(dim=1)
    return best_F.indices, best_F.values


def judge(crosscoder: Crosscoder, truth: Truth, *, n_rows: int = 8192, seed: int = 0) -> Result:
    """Hold the crosscoder's claims against the truth, on rows it was not trained on."""
    acts_NF, data = sample(truth, n_rows, seed=seed + 2000)
    scaling = latent_scaling(crosscoder, [data])
    norms_F, fires_F = relative_decoder_norms(crosscoder), scaling.fired >= 5
    true_F, alike_F = match(crosscoder, acts_NF, data)
    owner_F = torch.where(alike_F > MATCH, truth.owner_F[true_F], NOBODY)
    claimed_F = fires_F & (norms_F > CLAIM)

    def claims(chosen_F: Tensor) -> Claims:
        n, right_F = int(chosen_F.sum()), chosen_F & (owner_F == SECOND)
        shared = int((chosen_F & (owner_F == SHARED)).sum())
        covered = len(true_F[right_F].unique()) / int((truth.owner_F == SECOND).sum())
        n_right = int(right_F.sum())
        return Claims(n, shared, n - n_right - shared, n_right / n if n else math.nan, covered)

    matched_F = fires_F & (owner_F != NOBODY)
    both = claims(claimed_F), claims(claimed_F & scaling.is_exclusive())
    return Result(measure(crosscoder, data), *both, norms_F[matched_F], owner_F[matched_F])


def results(
    scale: int, seeds: Sequence[int], path: Path, *, n_steps: int = N_STEPS
) -> dict[tuple[str, str], list[Result]]:
    """Train and judge every method in both regimes.

    Args:
        path: file of rows; those that it holds are not trained again.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    for (regime, sizes), seed, method in itertools.product(REGIMES.items(), seeds, METHODS):

        def train_and_judge(sizes: Sequence[int] = sizes, method: str = method, seed: int = seed) -> dict[str, Any]:
            truth = make_truth(*(size // scale for size in sizes), seed=seed)
            return judge(train_one(truth, method, n_steps=n_steps, seed=seed), truth, seed=seed).to_row()

        key = {"regime": regime, "method": method, "scale": scale, "steps": n_steps, "seed": seed}
        row = kept_row(path, key, train_and_judge)
        found.setdefault((regime, method), []).append(Result.from_row(row))
    return found


def print_table(found: dict[tuple[str, str], list[Result]]) -> None:
    """Claims by norm, and after latent scaling: mean and standard deviation over seeds."""
    columns = ("FVU", "L0", "claims by", "claimed", "shared", "no match", "precision", "recall")
    print(f"{'exclusive':14}{'method':14}" + "".join(f"{column:16}" for column in columns).rstrip())
    for (regime, method), rows in found.items():
        fits = [row.fit for row in rows]
        reconstruction = [spread((f.unexplained for f in fits), ".3f"), spread((f.l0 for f in fits), ".1f")]
        for title in ("norm", "norm + scaling"):
            claims = [row.by_norm if title == "norm" else row.by_scaling for row in rows]
            *counts, precision, recall = zip(*claims, strict=True)
            cells = [
                *reconstruction,
                title,
                *(spread(count, ".1f") for count in counts),
                spread(precision),
                spread(recall),
            ]
            print(f"{regime:14}{method:14}" + "".join(f"{cell:16}" for cell in cells).rstrip())


def draw(found: dict[tuple[str, str], list[Result]], target: Path) -> None:
    """Relative decoder norms of features that match a true one, by its owner, as TARGET.svg and .png."""
    looks = {
        FIRST: ("first model's own", "#009e73"),
        SHARED: ("shared", "#0072b2"),
        SECOND: ("second model's own", "#d55e00"),
    }
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(REGIMES), len(METHODS), figsize=(10.5, 5), sharex=True, sharey="row")
        for ax, ((regime, method), rows) in zip(axes.flat, found.items(), strict=True):
            norms_S, owner_S = (torch.cat(column) for column in list(zip(*rows, strict=True))[3:])
            parts = [norms_S[owner_S == owner].numpy() for owner in looks]
            ax.hist(
                parts,
                bins=40,
                range=(0, 1),
                stacked=True,
                color=[c for _, c in looks.values()],
                label=[n for n, _ in looks.values()],
            )
            ax.set_yscale("symlog", linthresh=1)
            ax.axvline(CLAIM, color="#555555", linewidth=0.8, linestyle=":")
            ax.set_title(f"{method}, {regime} exclusive", loc="left", fontweight="bold", fontsize=10)
        axes[0, 0].legend(fontsize=8, frameon=False)
        for ax in axes[:, 0]:
            ax.set_ylabel("features")
        for ax in axes[-1]:
            ax.set_xlabel("relative decoder norm (1: second model only)")
        figure.tight_layout()
        save(figure, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for rows, which are not trained again, and plot"
    )
    parser.add_argument("--scale", type=int, default=8, help="divides numbers of features and width")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"numbers of features divided by {arguments.scale}; mean and standard deviation of {arguments.seeds} seeds")
    rows = arguments.out / "diffing.json"
    found = results(arguments.scale, range(arguments.seeds), rows, n_steps=arguments.steps)
    print_table(found)
    draw(found, arguments.out / "diffing")


if __name__ == "__main__":
    main()
