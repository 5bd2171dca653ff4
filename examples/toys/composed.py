"""Composed features: does a dictionary find {blue, red} and {square, circle}, or the four coloured shapes?

    python examples/toys/composed.py --out runs/toys

Every row is a colour vector plus a shape vector, so four atoms (2 + 2) explain everything with two of them active. Four other
atoms (blue square, blue circle, ...) do it with one. An L1 penalty pays 1 + 1 for the first and sqrt(2) for the second, so it
should prefer the composed ones, and a layer of computation or a second layer to read changes nothing about that, unless the
computation itself is a conjunction. Anders et al. 2024, "Sparse autoencoders find composed features in small toy models",
report that autoencoders do so; Chughtai and Bushnaq 2025, "Activation space interpretability may be doomed", and its
discussion ask the question of transcoders and crosscoders.

Amplitudes are `fixed` (four points) or `varied` (colour and shape each between 0.5 and 1.5, independently: four cones, whose
edges are the true atoms, so that 2 + 2 of them, two at a time, reconstruct exactly). The second table is about a basis that
the data does not contain: two generating bases that give the same rows, so that every crosscoder has the same loss under both
and cannot be right about both.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from toy import Activations, Fit, firing_rates, fit, measure, orthonormal, shape  # first: it finds plot_style

# isort: split
from matplotlib import pyplot
from plot_style import STYLE, save

from replacement import Crosscoder
from replacement.crosscoder.activation import Activation, ReLU
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring
from replacement.training.dead_features import Auxiliary
from replacement.training.losses import Loss
from replacement.training.penalties import L1OfNorms

WIDTH = 8
N_STEPS = 400
KINDS = ("SAE", "transcoder of a sum", "transcoder of AND", "crosscoder")
SIZES = (4, 8)
PENALTIES: dict[str, tuple[Activation, list[Loss]]] = {
    "TopK 1": (TopK(1), [Auxiliary()]),
    "TopK 2": (TopK(2), [Auxiliary()]),
    **{f"L1 {c:g}": (ReLU(), [L1OfNorms(c), Auxiliary()]) for c in (0.003, 0.03, 0.1)},
}
FREQUENCIES = {"equal": (0.25, 0.25, 0.25, 0.25), "unequal": (0.4, 0.1, 0.1, 0.4)}
"""Of blue square, blue circle, red square, red circle."""
LIMIT = 0.95
"""Cosine from which an atom counts as found."""


class Toy(NamedTuple):
    """Activations and what they are made of; colours first, then shapes, then the four combinations."""

    wiring: Wiring
    data: Activations
    atoms_4D: Tensor
    """Blue, red, square and circle at the first written site."""

    @property
    def atom_axes(self) -> Tensor:
        """Unit vectors of the atoms, less what a bias can hold.

        Adding a vector to both colours and taking it from the bias changes no row, so a colour is known only up to the
        mean of the two; what is left of blue is (blue - red) / 2. Atoms so lie at multiples of 90 degrees in a plane.
        """
        parts = [pair_2D - pair_2D.mean(dim=0) for pair_2D in self.atoms_4D.split(2)]
        return torch.nn.functional.normalize(torch.cat(parts))

    @property
    def combination_axes(self) -> Tensor:
        """Unit vectors of the combinations in the same plane, between the atoms."""
        colours_2D, shapes_2D = self.atom_axes.split(2)
        return torch.nn.functional.normalize((colours_2D[:, None] + shapes_2D).flatten(0, 1))


class Found(NamedTuple):
    """What a trained dictionary consists of."""

    product: int
    """Of the 2 + 2 true atoms, how many are the direction of a living feature."""
    composed: int
    """Of the four combinations, how many are."""
    fit: Fit
    plane_F2: Tensor
    """Decoder directions in the plane of colour and shape (see `plane_of`)."""


def make(kind: str, *, varied: bool, frequencies: str = "equal", n_rows: int = 4096, seed: int = 0) -> Toy:
    """Synthetic activations of one kind of crosscoder."""
    generator = torch.Generator().manual_seed(seed)
    which_N = torch.multinomial(torch.tensor(FREQUENCIES[frequencies]), n_rows, replacement=True, generator=generator)
    low, high = (0.5, 1.5) if varied else (1.0, 1.0)
    amplitude_N2 = low + (high - low) * torch.rand(n_rows, 2, generator=generator)
    code_N4 = torch.zeros(n_rows, 4)
    code_N4.scatter_(1, torch.stack([which_N // 2, 2 + which_N % 2], dim=1), amplitude_N2)
    atoms_4D, later_4D = (orthonormal(4, WIDTH, generator) for _ in range(2))
    x_ND, sum_ND = code_N4 @ atoms_4D, code_N4 @ later_4D
    first, second = Site(0, "resid_post"), Site(1, "resid_post")
    layers = shape(WIDTH, n_layers=2)
    if kind == "SAE":
        return Toy(Wiring.autoencoder(layers, layers=0), {first: x_ND}, atoms_4D)
    if kind == "crosscoder":
        return Toy(Wiring.acausal(layers), {first: x_ND, second: sum_ND}, atoms_4D)
    wiring = Wiring.transcoder(layers, layer=0)
    read, write = wiring.read_sites[0], wiring.write_sites[0]
    if kind == "transcoder of a sum":
        return Toy(wiring, {read: x_ND, write: sum_ND}, later_4D)
    # One output direction for each combination, as strong as the weaker of its two inputs.
    pairs_N4 = torch.minimum(code_N4[:, [0, 0, 1, 1]], code_N4[:, [2, 3, 2, 3]])
    means_4D = later_4D[torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])].mean(dim=1)  # what blue writes on average, ...
    return Toy(wiring, {read: x_ND, write: pairs_N4 @ later_4D}, means_4D)


@torch.no_grad()
def plane_of(crosscoder: Crosscoder, toy: Toy) -> Tensor:
    """Coordinates `[F, 2]` (colour, shape) of the decoder directions of living features.

    A vector of length 1 lies in the plane of the differences between colours and between shapes; blue itself is sqrt(1/2).
    """
    decoder_FD = crosscoder.decoder(0, crosscoder.wiring.write_sites[0])
    alive_F = (firing_rates(crosscoder, toy.data) >= 1e-3) & (decoder_FD.norm(dim=1) > 1e-3)
    unit_FD = torch.nn.functional.normalize(decoder_FD[alive_F])
    return unit_FD @ toy.atom_axes[[0, 2]].T


def count(crosscoder: Crosscoder, toy: Toy) -> Found:
    """Count the atoms that a dictionary found; features mostly outside the plane count for nothing."""
    plane_F2 = plane_of(crosscoder, toy)
    mainly_S2 = torch.nn.functional.normalize(plane_F2[plane_F2.norm(dim=1) > 0.6])
    found = []
    for wanted_4D in (toy.atom_axes, toy.combination_axes):
        cosines_S4 = mainly_S2 @ (wanted_4D @ toy.atom_axes[[0, 2]].T).T
        found.append(int((cosines_S4 > LIMIT).any(dim=0).sum()))
    return Found(found[0], found[1], measure(crosscoder, toy.data), plane_F2)


def train_one(toy: Toy, penalty: str, n_features: int, *, seed: int, n_steps: int = N_STEPS) -> Crosscoder:
    """A dictionary of one size and penalty."""
    activation, losses = PENALTIES[penalty]
    return fit(
        toy.wiring, toy.data, n_features=n_features, activation=activation, losses=losses, n_steps=n_steps, seed=seed
    )


def sweep(
    kinds: Sequence[str], seeds: Sequence[int], *, varied: bool, frequencies: str = "equal", n_steps: int = N_STEPS
) -> dict[tuple[str, int, str], list[Found]]:
    """Train every kind, size and penalty and print what was found, one line each."""
    found: dict[tuple[str, int, str], list[Found]] = {}
    for kind, n_features, penalty in itertools.product(kinds, SIZES, PENALTIES):
        rows = found[kind, n_features, penalty] = []
        for seed in seeds:
            toy = make(kind, varied=varied, frequencies=frequencies, seed=seed)
            rows.append(count(train_one(toy, penalty, n_features, seed=seed, n_steps=n_steps), toy))
        print(f"{'varied' if varied else 'fixed':11}{kind:21}{n_features:4d}  {penalty:9}" + summary(rows))
    return found


def summary(found: Sequence[Found]) -> str:
    """Means over seeds, and in which share of the seeds all four were found."""
    n = len(found)
    shares = [
        f"{sum(numbers) / n:10.1f}{sum(number == 4 for number in numbers) / n:7.0%}"
        for numbers in ([one.product for one in found], [one.composed for one in found])
    ]
    l0, unexplained = sum(one.fit.l0 for one in found) / n, sum(one.fit.unexplained for one in found) / n
    return "".join(shares) + f"{l0:8.2f}{unexplained:13.4f}"


def same_rows_two_bases(n_rows: int = 4096, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two generating bases `[4, D]` (blue, red, square, circle) and the rows of each, where two combinations occur.

    In the second basis, a vector w is added to blue and taken from square, and the same with -w for red and circle. No
    sum that occurs changes; blue circle and red square would, but they do not occur.
    """
    generator = torch.Generator().manual_seed(seed)
    basis_4D = orthonormal(4, WIDTH, generator).double()
    w_D = 0.9 * (basis_4D[2] - basis_4D[0])  # blue is then nearly square
    v_D = 0.9 * (basis_4D[3] - basis_4D[1])
    other_4D = basis_4D + torch.stack([w_D, v_D, -w_D, -v_D])
    which_N = torch.randint(2, (n_rows,), generator=generator)
    rows = [(basis[which_N] + basis[2 + which_N]).float() for basis in (basis_4D, other_4D)]
    return basis_4D.float(), other_4D.float(), rows[0], rows[1]


def print_two_bases(seeds: Sequence[int], *, n_steps: int = N_STEPS) -> list[tuple[float, float]]:
    """Losses of equal crosscoders on the rows of both bases, and how near their features come to either."""
    wiring, losses = Wiring.autoencoder(shape(WIDTH), layers=0), []
    print("\nonly blue squares and red circles occur, made from two bases")
    print(f"{'':9}{'unexplained, rows of':>24}{'cosine with blue of':>23}")
    print(f"{'seed':9}{'basis A':>12}{'basis B':>12}{'basis A':>11}{'basis B':>12}")
    for seed in seeds:
        first_4D, second_4D, *both = same_rows_two_bases(seed=seed)
        fits, cosines = [], []
        for x_ND, basis_4D in zip(both, (first_4D, second_4D), strict=True):
            data = {wiring.read_sites[0]: x_ND}
            crosscoder = fit(wiring, data, n_features=4, activation=TopK(2), n_steps=n_steps, seed=seed)
            fits.append(measure(crosscoder, data).unexplained)
            decoder_FD = torch.nn.functional.normalize(crosscoder.decoder(0, wiring.write_sites[0]).detach())
            cosines.append(float((decoder_FD @ torch.nn.functional.normalize(basis_4D[0], dim=0)).max()))
        print(f"{seed:<9d}{fits[0]:12.2e}{fits[1]:12.2e}{cosines[0]:11.3f}{cosines[1]:12.3f}")
        losses.append((fits[0], fits[1]))
    return losses


def draw(rows: dict[str, dict[tuple[str, int, str], list[Found]]], target: Path, *, n_features: int = 8) -> None:
    """Decoder directions of autoencoders in the plane of colour and shape, as TARGET.svg and .png.

    Args:
        rows: results of `sweep` by the title of their amplitudes.
    """
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(rows), len(PENALTIES), figsize=(11, 4.9), sharex=True, sharey=True)
        for line, (title, found) in zip(axes, rows.items(), strict=True):
            for ax, penalty in zip(line, PENALTIES, strict=True):
                for place in range(8):  # atoms lie at multiples of 90 degrees, combinations between them
                    angle = math.pi * place / 4
                    colour, style = ("#0072b2", "-") if place % 2 == 0 else ("#d55e00", "--")
                    ends = ([0, 1.2 * math.cos(angle)], [0, 1.2 * math.sin(angle)])
                    ax.plot(*ends, color=colour, linestyle=style, linewidth=0.8, zorder=1)
                plane_S2 = torch.cat([one.plane_F2 for one in found["SAE", n_features, penalty]])
                ax.scatter(plane_S2[:, 0], plane_S2[:, 1], s=16, color="#222222", alpha=0.7, zorder=2)
                ax.set(aspect="equal", xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), xticks=[], yticks=[])
                if ax in axes[0]:
                    ax.set_title(penalty, fontweight="bold", fontsize=10)
            line[0].set_ylabel(f"{title} amplitudes\nsquare against circle")
        for ax in axes[-1]:
            ax.set_xlabel("blue against red")
        figure.suptitle(
            f"Decoder directions of autoencoders of {n_features} features (dots, all seeds). "
            "Solid blue: atoms; dashed orange: combinations",
            fontsize=10,
        )
        figure.tight_layout()
        save(figure, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the plot")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.seeds)
    print(f"means over {len(seeds)} seeds; all: share of the seeds in which all four were found")
    print(
        f"{'amplitudes':11}{'':21}size  {'penalty':9}{'2+2 atoms':>10}{'all':>7}{'composed':>10}{'all':>7}"
        f"{'L0':>8}{'unexplained':>13}"
    )
    rows = {"fixed": sweep(KINDS[:1], seeds, varied=False), "varied": sweep(KINDS, seeds, varied=True)}
    print("\nfrequencies 0.4, 0.1, 0.1, 0.4")
    sweep(KINDS[:1], seeds, varied=True, frequencies="unequal")
    print_two_bases(seeds)
    draw(rows, arguments.out / "composed")


if __name__ == "__main__":
    main()
