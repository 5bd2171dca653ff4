"""A network in superposition: more variables than dimensions, so that weights interfere between features that never meet.

Two hops as in `models.two_hop`, A -> B -> C, one family at a time. The variables of a family are orthonormal; those of
different families are random directions of the same space and overlap. Every neuron has a scale of its own (inputs times c,
outputs over c), which changes no output, but makes inner products of weights incomparable.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compiled import exact_crosscoder, language_model, random_rotation
from models import GroundTruth
from program import Layer, Neuron, Program

STRONG = 8.0
"""Weight of a gate's inputs; its bias is `1 - STRONG`, so that overlaps up to 7/8 leave a gate off."""


def superposed_two_hop(
    *, n_families: int = 8, n_middle: int = 2, n_first: int = 3, overlap: float = 0.8
) -> GroundTruth:
    """A network of which each prompt is one token, and each token turns on one A, its B and its C.

    Args:
        n_families: number of C's; every C has `n_middle` B's and every B `n_first` A's.
        overlap: dimensions that the variables share, as a share of their number.
    """
    scales = iter(torch.exp2(4 * torch.rand(4096, generator=torch.Generator().manual_seed(0)) - 2).tolist())

    def gate(reads: Mapping[str, float], name: str) -> Neuron:
        scale = next(scales)
        return Neuron({read: scale * STRONG for read in reads}, scale * (1 - STRONG), {name: 1 / scale}, name)

    families = [[f"B{c}{b}" for b in range(n_middle)] for c in range(n_families)]
    first = {f"A{b[1:]}{a}": b for family in families for b in family for a in range(n_first)}
    layers = (
        Layer(neurons=[gate({f"x{a}": 1.0}, a) for a in first]),
        Layer(neurons=[gate({a: 1.0 for a, of in first.items() if of == b}, b) for family in families for b in family]),
        Layer(neurons=[gate({b: 1.0 for b in family}, f"C{c}") for c, family in enumerate(families)]),
    )
    by_family = []
    for c, family in enumerate(families):
        of_family = [a for a, b in first.items() if b in family]
        by_family.append([*(f"x{a}" for a in of_family), *of_family, *family, f"C{c}"])
    variables = tuple(name for names in by_family for name in names)
    program = Program(
        variables=variables,
        tokens=tuple({f"x{a}": 1.0} for a in first),
        positions=({}, {}),
        layers=layers,
        outputs={c: {f"C{c}": 3.0} for c in range(n_families)},
    )
    n_shared = round(overlap * len(variables))
    frames = [random_rotation(n_shared, seed=1 + c)[: len(names)] for c, names in enumerate(by_family)]
    basis_ND = torch.cat(frames) @ random_rotation(len(variables), seed=0)[:n_shared]
    lm = language_model(program, name="ground-truth-superposed", basis_ND=basis_ND)
    crosscoder = exact_crosscoder(program, lm, basis_ND=basis_ND)
    prompts = tuple((token,) for token in range(len(program.tokens)))
    return GroundTruth("superposed", program, lm, crosscoder, prompts, ((),) * len(prompts))
