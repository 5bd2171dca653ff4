"""A curve in the plane and an MLP that only rotates it: what do features say about a linear map?

    python examples/toys/curve.py --out runs/toys

The inputs lie on a circle arc, and the model's MLP multiplies them by a rotation matrix: two numbers in, two numbers out, no
nonlinearity, and no knowledge that the data lie on a curve. A transcoder of the MLP and a crosscoder over the stream before
and after it still cut the arc into many features, each for one stretch of it: sparsity describes the data. A skip connection
(Paulo et al. 2025, "Transcoders beat sparse autoencoders for interpretability") holds the rotation, and the features are left
with nothing to do. The objection was raised in the discussion of Chughtai and Bushnaq 2025, "Activation space interpretability
may be doomed". The control is an MLP that doubles the angle instead, which no matrix can do: there features remain.

Two limits. The features fall silent only where a penalty makes them costly: TopK has no reason to stop using them. And the
crosscoder's skip maps each site it reads to each it writes, the identity included, so it leaves features nothing to do even
where the MLP doubles the angle: it explains by copying.
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
from toy import Activations, fit, shape  # first: it finds plot_style

# isort: split
from matplotlib import pyplot
from plot_style import STYLE, save
from result_rows import kept_row, spread

from replacement import Crosscoder
from replacement.crosscoder.activation import Activation, ReLU
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring
from replacement.training.dead_features import Auxiliary
from replacement.training.losses import Loss
from replacement.training.penalties import L1OfNorms

N_FEATURES = 32
N_STEPS = 500
TURN = math.pi / 3
"""Angle of the rotation, in radians."""
PENALTIES: dict[str, tuple[Activation, list[Loss]]] = {
    "TopK 2": (TopK(2), [Auxiliary()]),
    "L1 0.03": (ReLU(), [L1OfNorms(0.03), Auxiliary()]),
    "L1 0.1": (ReLU(), [L1OfNorms(0.1), Auxiliary()]),
}
MAPS = ("rotation", "doubled angle")
KINDS = ("transcoder", "crosscoder")


class Use(NamedTuple):
    """Reconstruction, and what the features have to do with it."""

    unexplained: float
    """Fraction of variance unexplained."""
    unexplained_by_skip: float
    """The same with the features' part replaced by its mean: 1 if there is no skip."""
    l0: float
    """Features per row whose part of the output is longer than 1 % of the output's mean norm."""
    used: int
    """Features with such a part on at least one row in a thousand."""


def make(kind: str, what: str, *, n_rows: int = 4096) -> tuple[Wiring, Activations]:
    """Points at equal distances on three quarters of the unit circle, and what the MLP makes of them."""
    angle_N = torch.linspace(0, 1.5 * math.pi, n_rows)
    later_N = angle_N + TURN if what == "rotation" else 2 * angle_N
    x_N2, y_N2 = (torch.stack([a_N.cos(), a_N.sin()], dim=1) for a_N in (angle_N, later_N))
    if kind == "transcoder":
        wiring = Wiring.transcoder(shape(2), layer=0)
        return wiring, {wiring.read_sites[0]: x_N2, wiring.write_sites[0]: y_N2}
    wiring = Wiring.acausal(shape(2, n_layers=2))
    return wiring, {Site(0, "resid_post"): x_N2, Site(1, "resid_post"): y_N2}


def train_one(kind: str, what: str, penalty: str, *, skip: bool, seed: int, n_steps: int = N_STEPS) -> Crosscoder:
    """One transcoder or crosscoder."""
    wiring, data = make(kind, what)
    activation, losses = PENALTIES[penalty]
    return fit(
        wiring,
        data,
        n_features=N_FEATURES,
        activation=activation,
        losses=losses,
        skip=skip,
        n_steps=n_steps,
        batch_rows=128,
        seed=seed,
    )


@torch.no_grad()
def parts(crosscoder: Crosscoder, data: Activations) -> Tensor:
    """Length of every feature's part of the output over that of the mean output, `[N, F]`; the largest over sites."""
    acts_NF = crosscoder.encode(data).dense(0)
    shares = [
        acts_NF * crosscoder.decoder(0, site).norm(dim=1) / data[site].norm(dim=1).mean()
        for site in crosscoder.wiring.write_sites
    ]
    return torch.stack(shares).amax(dim=0)


@torch.no_grad()
def measure_use(crosscoder: Crosscoder, data: Activations) -> Use:
    """What is reconstructed with and without features, and how many of them matter."""
    outputs, features = crosscoder(data)
    written = crosscoder.decode_contribution(features)
    both, alone = [], []
    for site, y_ND in outputs.items():
        total = (data[site] - data[site].mean(dim=0)).square().sum()
        both.append(float((data[site] - y_ND).square().sum() / total))
        skipped_ND = y_ND - written[site] + written[site].mean(dim=0)
        alone.append(float((data[site] - skipped_ND).square().sum() / total))
    matters_NF = parts(crosscoder, data) > 0.01
    rates_F = matters_NF.float().mean(dim=0)
    return Use(sum(both) / len(both), sum(alone) / len(alone), float(rates_F.sum()), int((rates_F >= 1e-3).sum()))


def _use(path: Path, how: Mapping[str, Any]) -> Use:
    """Train with these arguments of `train_one` and measure, or read the row of the file where that was done before."""

    def train_and_measure() -> dict[str, float]:
        return measure_use(train_one(**how), make(how["kind"], how["what"])[1])._asdict()

    row = kept_row(path, how, train_and_measure)
    return Use(*(row[name] for name in Use._fields))


def print_table(
    seeds: Sequence[int], path: Path, *, n_steps: int = N_STEPS
) -> dict[tuple[str, str, str, bool], list[Use]]:
    """Every map, kind and penalty, without and with skip.

    Args:
        path: file of rows; those that it holds are not trained again.
    """
    found: dict[tuple[str, str, str, bool], list[Use]] = {}
    print(
        f"mean and standard deviation of {len(seeds)} seeds, {N_FEATURES} features; used: part of the output above 1 %"
    )
    print(f"{'the MLP':15}{'':12}{'penalty':9}{'skip':6}{'unexplained':20}{'skip alone':20}{'L0':15}used")
    for what, kind, penalty, skip in itertools.product(MAPS, KINDS, PENALTIES, (False, True)):
        how = {"kind": kind, "what": what, "penalty": penalty, "skip": skip, "n_steps": n_steps}
        uses = found[what, kind, penalty, skip] = [_use(path, {**how, "seed": seed}) for seed in seeds]
        unexplained, alone, l0, used = zip(*uses, strict=True)
        print(
            f"{what:15}{kind:12}{penalty:9}{'yes' if skip else 'no':6}"
            f"{spread(unexplained, '.5f'):20}{spread(alone, '.5f'):20}{spread(l0):15}{spread(used, '.1f')}",
            flush=True,
        )
    return found


def draw(target: Path, *, penalty: str = "L1 0.1", seed: int = 0, n_steps: int = N_STEPS) -> None:
    """How strongly each feature of a transcoder fires along the arc, as TARGET.svg and .png."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 4.6), sharex=True, sharey=True)
        for row, what in zip(axes, MAPS, strict=True):
            for ax, skip in zip(row, (False, True), strict=True):
                crosscoder = train_one("transcoder", what, penalty, skip=skip, seed=seed, n_steps=n_steps)
                data = make("transcoder", what)[1]
                parts_NF, use = parts(crosscoder, data), measure_use(crosscoder, data)
                degrees_N = torch.linspace(0, 270, len(parts_NF))
                for place, part_N in enumerate(parts_NF.T):
                    ax.plot(degrees_N, part_N, linewidth=1.2, color=pyplot.get_cmap("tab20")(place % 20))
                ax.set_title(
                    f"{what}, {'with' if skip else 'no'} skip: {use.used} features, FVU {use.unexplained:.4f}",
                    loc="left",
                    fontsize=10,
                )
            row[0].set_ylabel("part of the output")
        for ax in axes[1]:
            ax.set_xlabel("place on the arc, degrees")
        figure.tight_layout()
        save(figure, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for rows, which are not trained again, and plot"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_table(range(arguments.seeds), arguments.out / "curve.json", n_steps=arguments.steps)
    draw(arguments.out / "curve", n_steps=arguments.steps)


if __name__ == "__main__":
    main()
