"""What targets read: a vector on the residual stream at a point of its timeline, or one on `attn_z` in front of a layer.

N targets, D d_model, X heads x d_head.

Points are numbered by depth: pre_l = 2 l, mid_l = 2 l + 1. Parallel models have no mid: their MLPs read at pre_l.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from replacement import LocalReplacement, ModelShape, Site


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


def read_depth(site: Site, shape: ModelShape) -> int:
    """Depth of the point of the residual stream that a site depends on.

    Raises:
        ValueError: the site is not a linear reading of the residual stream.
    """
    if site.kind in ("resid_mid", "mlp_in"):
        return 2 * site.layer + (not shape.parallel)
    if site.kind in ("resid_pre", "resid_post", "attn_z"):
        return 2 * (site.layer + (site.kind == "resid_post"))
    raise ValueError(f"cannot attribute to features that read {site}: expected a site on the residual stream")


def read_vectors(
    local: LocalReplacement, group: int, site: Site, index_N: Tensor, position_N: Tensor
) -> tuple[Tensor, Tensor]:
    """What features of a group of the MLPs' crosscoder read at one site: vectors `[N, D]` on the residual stream, and
    constants `[N]`.

    `encoder . x_site = vector . stream + constant`; a site behind a norm is pulled back through it, frozen.
    """
    vectors_ND = local.crosscoder.encoder(group, site)[index_N]
    if site.kind != "mlp_in":
        return vectors_ND, vectors_ND.new_zeros(len(vectors_ND))
    norm = local.frozen.norms_mlp[site.layer]
    return norm.pull_back(vectors_ND, position_N), vectors_ND @ norm.bias_D
