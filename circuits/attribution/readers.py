"""What targets read: a vector on the residual stream at a point of its timeline, or one on `attn_z` in front of a layer.

N targets, D d_model, X heads x d_head.

Points are numbered by depth: pre_l = 2 l, mid_l = 2 l + 1. Parallel models have no mid: their MLPs read at pre_l.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement import Decomposition, LocalReplacement, Site
from replacement.splicing.skip import read_depth, read_norm


@dataclass(frozen=True, slots=True)
class Targets:
    """N vectors, each read at a point of the residual stream and a position."""

    vectors_ND: Float[Tensor, "N D"]
    depth_N: Int[Tensor, " N"]
    position_N: Int[Tensor, " N"]


@dataclass(frozen=True, slots=True)
class HeadTargets:
    """N vectors, each read at the concatenated `attn_z` of one layer and at a position."""

    layer: int
    vectors_NX: Float[Tensor, "N X"]
    position_N: Int[Tensor, " N"]


def read_vectors(
    local: LocalReplacement, group: int, site: Site, index_N: Tensor, position_N: Tensor
) -> tuple[Tensor, Tensor]:
    """What features of a group of the MLPs' crosscoder read at one site: vectors `[N, D]` on the residual stream, and
    constants `[N]`.

    `encoder . x_site = vector . stream + constant`; a site behind a norm is pulled back through it, frozen.
    """
    vectors_ND = local.crosscoder.encoder_vectors(group, index_N, site)
    norm = read_norm(site, local.frozen.norms_mlp)
    if norm is None:
        return vectors_ND, vectors_ND.new_zeros(len(vectors_ND))
    return norm.pull_back(vectors_ND, position_N), vectors_ND @ norm.bias_D


def stream_reads(local: LocalReplacement, part: Decomposition, chosen_S: Tensor) -> tuple[Tensor, Targets, Tensor]:
    """What chosen features of the MLPs' crosscoder read on the residual stream.

    A feature that reads several sites is several targets; its pre-activation is the sum of their readings and a constant.

    Args:
        chosen_S: numbers into `part.features`.

    Returns:
        For every target the place of its feature in `chosen_S`, the targets, and the constants `[S]`.
    """
    features, crosscoder = part.features, part.crosscoder
    group_S = features.group[chosen_S]
    constant_S = torch.empty_like(part.pre_activation_S[chosen_S])
    readers: list[tuple[Tensor, Tensor, int]] = []  # features, their encoder vectors, depth they read at
    for group in torch.unique(group_S).tolist():
        own = torch.nonzero(group_S == group)[:, 0]
        index, position = features.index[chosen_S[own]], features.row[chosen_S[own]]
        constant_S[own] = crosscoder.b_enc[group][index]
        for site in crosscoder.wiring.reads[group]:
            vectors, constant = read_vectors(local, group, site, index, position)
            constant_S[own] += constant
            readers.append((own, vectors, read_depth(site, local.shape)))
    own_N = torch.cat([own for own, _, _ in readers])
    depth_N = torch.cat([torch.full_like(own, depth) for own, _, depth in readers])
    vectors_ND = torch.cat([vectors for _, vectors, _ in readers])
    return own_N, Targets(vectors_ND, depth_N, features.row[chosen_S[own_N]]), constant_S


def reading_sizes(local: LocalReplacement, part: Decomposition, chosen_S: Tensor) -> Float[Tensor, " S"]:
    """The size of the numbers that a pre-activation is summed from, `sum over read sites of |encoder| |activation|`.

    Rounding is relative to this and not to the pre-activation, which may be a small remainder: terms inside one inner product
    cancel too.
    """
    features, crosscoder = part.features, part.crosscoder
    group_S = features.group[chosen_S]
    size_S = torch.zeros_like(part.pre_activation_S[chosen_S])
    for group in torch.unique(group_S).tolist():
        places = torch.nonzero(group_S == group)[:, 0]
        index, position = features.index[chosen_S[places]], features.row[chosen_S[places]]
        for site in crosscoder.wiring.reads[group]:
            norm_T = local.frozen.activations[site].norm(dim=1)
            size_S[places] += crosscoder.encoder_vectors(group, index, site).norm(dim=1) * norm_T[position]
    return size_S


def head_reads(part: Decomposition, chosen_S: Tensor, group: int) -> HeadTargets:
    """What chosen features of one group of attention's crosscoder read at `attn_z`."""
    (site,) = part.crosscoder.wiring.reads[group]
    vectors_NX = part.crosscoder.encoder_vectors(group, part.features.index[chosen_S], site)
    return HeadTargets(site.layer, vectors_NX, part.features.row[chosen_S])


def logit_reads(local: LocalReplacement, direction_ND: Tensor, position_N: Tensor) -> tuple[Targets, Tensor]:
    """Logit directions as targets behind the last layer, and the final norm's constants `[N]`."""
    norm = local.frozen.norm_final
    depth_N = torch.full_like(position_N, 2 * local.shape.n_layers)
    return Targets(norm.pull_back(direction_ND, position_N), depth_N, position_N), direction_ND @ norm.bias_D
