"""y = |x| and one repeated point: does a transcoder compute, or remember?

    python examples/toys/absolute.py --out runs/toys

The model takes the absolute value of every coordinate. Features ReLU(x_i) and ReLU(-x_i) compute it exactly, for any input.
But where one point p with m equal coordinates comes up again and again, one more feature, which fires for p alone and writes
all of |p|, costs an L1 penalty sqrt(m) |p_i| in place of m |p_i|. Reconstruction cannot tell the two apart on the data; off it
they differ, and a circuit through the remembered point is not what the model does. Olah 2025, "A Toy Model of Mechanistic
(Un)Faithfulness", shows this and suggests to match Jacobians: that of a remembering feature has rank 1, that of the model m.

The transcoder is trained on sparse random inputs, a share of which is replaced by p, with and without
`replacement.training.model_losses`. With m = 1 there is nothing to gain by remembering: the control.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from toy import Activations, fit, measure, shape  # first: it finds plot_style

# isort: split
from matplotlib import pyplot
from plot_style import STYLE, save

from replacement import Crosscoder
from replacement.crosscoder.activation import ReLU
from replacement.crosscoder.wiring import Wiring
from replacement.training.dead_features import Auxiliary
from replacement.training.losses import Loss
from replacement.training.model_losses import JacobianMatching
from replacement.training.penalties import L1OfNorms

WIDTH, N_FEATURES = 6, 16
DENSITY, SHARE = 0.3, 0.25
"""Chance that a coordinate of a random input is not zero, and that an input is the repeated point."""
L1 = 0.03
WIRING = Wiring.transcoder(shape(WIDTH), layer=0)
READ, WRITE = WIRING.read_sites[0], WIRING.write_sites[0]
RAY = torch.linspace(-2, 2, 401)
"""Multiples of the repeated point at which features are looked at."""


class Memory(NamedTuple):
    """What a transcoder does at the repeated point."""

    unexplained: float
    """Fraction of variance unexplained on random inputs, without the repeated point."""
    remembered: float
    """Share of the output at the point written by features of several coordinates (see `remembered_parts`)."""
    jacobian_error: float
    """`||J_f - J_cc||^2 / ||J_f||^2` at the point, over the coordinates that are not zero there."""
    begin: float
    """Multiple of the point from which the strongest such feature fires (NaN if there is none)."""
    l1_ratio: float
    """L1 penalty at the point over that of exact features of one coordinate each; 1 / sqrt(m) if all is remembered.

    Features that lean a little towards each other's coordinates lower it too, without counting as remembered."""


def point(m: int) -> Tensor:
    """The repeated point: 1 in the first m coordinates."""
    return (torch.arange(WIDTH) < m).float()


def make(m: int, *, share: float = SHARE, n_rows: int = 8192, seed: int = 0) -> Activations:
    """Sparse random inputs, some replaced by the repeated point, and their absolute values."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = 2 * torch.rand(n_rows, WIDTH, generator=generator) - 1
    x_ND = x_ND * (torch.rand(n_rows, WIDTH, generator=generator) < DENSITY)
    x_ND[torch.rand(n_rows, generator=generator) < share] = point(m)
    return {READ: x_ND, WRITE: x_ND.abs()}


def train_one(m: int, *, jacobian: float = 0.0, share: float = SHARE, seed: int = 0, n_steps: int = 800) -> Crosscoder:
    """One transcoder, with Jacobian matching of this coefficient."""
    losses: list[Loss] = [L1OfNorms(L1), Auxiliary()]
    if jacobian:
        losses.append(JacobianMatching(jacobian, maps={(READ, WRITE): torch.abs}))
    data = make(m, share=share, seed=seed)
    return fit(
        WIRING,
        data,
        n_features=N_FEATURES,
        activation=ReLU(),
        losses=losses,
        n_steps=n_steps,
        batch_rows=128,
        seed=seed,
    )


@torch.no_grad()
def remembered_parts(crosscoder: Crosscoder, p_D: Tensor) -> tuple[Tensor, Tensor]:
    """Share of |p| that each feature writes at multiples of p, `[401, F]`, and which features write several coordinates.

    A feature of one coordinate has all of its decoder there (cosine above 0.9); the others, where they write at p, join
    what the model keeps apart.
    """
    acts_NF = crosscoder.encode({READ: RAY[:, None] * p_D}).dense(0)
    decoder_FD = crosscoder.decoder(0, WRITE)
    share_NF = acts_NF * (decoder_FD @ p_D.abs()) / p_D.square().sum()
    largest_F = torch.nn.functional.normalize(decoder_FD).abs().amax(dim=1)
    return share_NF, largest_F < 0.9


@torch.no_grad()
def measure_memory(crosscoder: Crosscoder, m: int) -> Memory:
    """What a trained transcoder remembers of the point, and what that does to its Jacobian."""
    p_D = point(m)
    share_NF, joins_F = remembered_parts(crosscoder, p_D)
    at_point = int((RAY - 1).abs().argmin())
    at_F = share_NF[at_point] * joins_F
    acts_F = crosscoder.encode({READ: p_D[None]}).dense(0)[0]
    decoder_FD, on_F = crosscoder.decoder(0, WRITE), (acts_F > 0).float()
    jacobian_DD = torch.einsum("fo,f,fi->oi", decoder_FD, on_F, crosscoder.encoder(0, READ))
    error = float((jacobian_DD - torch.diag(p_D.sign()))[:, :m].square().sum() / m)
    begin = math.nan
    if float(at_F.max()) > 0.1:
        begin = float(RAY[share_NF[:, at_F.argmax()] > 1e-4].min())
    cost = float((acts_F * decoder_FD.norm(dim=1)).sum()) / m
    fresh = make(m, share=0.0, seed=1000)
    return Memory(measure(crosscoder, fresh).unexplained, float(at_F.sum()), error, begin, cost)


SETTINGS = (
    ("m = 3, not repeated", 3, 0.0, 0.0),
    ("m = 1", 1, SHARE, 0.0),
    ("m = 3", 3, SHARE, 0.0),
    ("m = 3, Jacobian 0.03", 3, SHARE, 0.03),
    ("m = 3, Jacobian 0.3", 3, SHARE, 0.3),
)
"""Title, coordinates of the point, how often it is repeated, coefficient of Jacobian matching."""


def print_table(seeds: Sequence[int], *, n_steps: int = 800) -> dict[str, list[Memory]]:
    """Every setting, all seeds."""
    found = {}
    print(
        f"{'':22}{'seed':>5}{'unexplained':>13}{'remembered':>12}{'Jacobian error':>16}{'fires from':>12}{'L1 ratio':>10}"
    )
    for title, m, share, jacobian in SETTINGS:
        found[title] = [
            measure_memory(train_one(m, share=share, jacobian=jacobian, seed=seed, n_steps=n_steps), m)
            for seed in seeds
        ]
        for seed, row in zip(seeds, found[title], strict=True):
            begin = f"{row.begin:11.2f}p" if math.isfinite(row.begin) else f"{'-':>12}"
            print(
                f"{title:22}{seed:5d}{row.unexplained:13.4f}{row.remembered:12.0%}{row.jacobian_error:16.3f}"
                f"{begin}{row.l1_ratio:10.2f}"
            )
    return found


def draw(target: Path, *, seed: int = 0, n_steps: int = 800) -> None:
    """What features write along the ray through the point, as TARGET.svg and .png."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), sharex=True, sharey=True)
        for ax, (title, m, share, jacobian) in zip(axes, SETTINGS[2:], strict=True):
            crosscoder = train_one(m, share=share, jacobian=jacobian, seed=seed, n_steps=n_steps)
            share_NF, joins_F = remembered_parts(crosscoder, point(m))
            ax.plot(RAY, RAY.abs(), color="#bbbbbb", linewidth=4, label="|x|")
            for place in torch.nonzero(share_NF.amax(dim=0) > 0.02).flatten().tolist():
                joins = bool(joins_F[place])
                ax.plot(
                    RAY,
                    share_NF[:, place],
                    color="#d55e00" if joins else "#0072b2",
                    linewidth=1.8 if joins else 1.0,
                    label="feature of several coordinates" if joins else "feature of one coordinate",
                )
            ax.axvline(1, color="#555555", linewidth=0.8, linestyle=":")
            ax.set_title(title, loc="left", fontweight="bold", fontsize=10)
            ax.set_xlabel("multiple of the repeated point")
        axes[0].set_ylabel("written, share of |p|")
        entries = {text: line for ax in axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        axes[0].legend(entries.values(), entries.keys(), fontsize=8, frameon=False, loc="upper center")
        figure.tight_layout()
        save(figure, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the plot")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_table(range(arguments.seeds))
    draw(arguments.out / "absolute")


if __name__ == "__main__":
    main()
