"""Skip connections on a frozen prompt: linear maps from a point of the residual stream to the MLP output of a layer.

A crosscoder with skip connections (Paulo et al. 2025, skip transcoders) writes `x_read W_skip[read, write]^T` in addition to
its features. With norm scales frozen, every read site is an affine reading of one point of the residual stream, so

    apply       what skip connections that read a point write, given the stream at that point     (linear part)
    pull_back   the transpose: vectors that read an MLP output, as vectors on the points it depends on
    bias        what skip connections write for a zero stream: the norm's offset through `W_skip`

and `v . sum apply(x) = sum pull_back(v) . x` for every v and x. Everything that walks the residual stream, upwards or
downwards, uses these three.

Points of the stream are numbered by depth: `pre_l = 2 l`, `mid_l = 2 l + 1`, and `2 L` behind the last layer. Parallel models
have no mid: their MLPs read `pre_l`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import ModelShape, Site
from replacement.language_model.frozen_layers import FrozenNorm

BEHIND_THE_NORM = ("mlp_normalized", "mlp_in")
"""Kinds of sites that read the stream through the norm in front of the MLP."""


def read_depth(site: Site, shape: ModelShape) -> int:
    """Depth of the point of the residual stream that a site reads, `2 l` or `2 l + 1`.

    Raises:
        ValueError: the site is not an affine reading of one point of the residual stream.
    """
    if site.kind in ("resid_mid", *BEHIND_THE_NORM):
        return 2 * site.layer + (not shape.parallel)
    if site.kind in ("resid_pre", "resid_post"):
        return 2 * (site.layer + (site.kind == "resid_post"))
    raise ValueError(
        f"{site} is no reading of the residual stream: expected resid_pre, resid_mid, resid_post, mlp_in or mlp_normalized"
    )


def read_norm(site: Site, norms_mlp: Sequence[FrozenNorm]) -> FrozenNorm | None:
    """The frozen norm between the stream and a site; None for the stream itself.

    Args:
        norms_mlp: the norm in front of each MLP.
    """
    if site.kind not in BEHIND_THE_NORM:
        return None
    norm = norms_mlp[site.layer]
    return norm if site.kind == "mlp_in" else norm.without_gain


@dataclass(frozen=True, slots=True)
class SkipTerms:
    """The skip connections of an MLP crosscoder on one frozen prompt; false where the crosscoder has none."""

    crosscoder: Crosscoder
    norms_mlp: tuple[FrozenNorm, ...]
    """The frozen norm in front of each MLP."""
    shape: ModelShape

    def __bool__(self) -> bool:
        return self.crosscoder.skip

    def apply(
        self, stream: Float[Tensor, "*N T D"], depth: int, positions_T: Int[Tensor, " T"]
    ) -> Iterator[tuple[int, Float[Tensor, "*N T D"]]]:
        """(layer, what is written to its MLP output) for every skip connection that reads the point at `depth`.

        Args:
            stream: vectors at that point; the last axis but one runs over positions.
            positions_T: position of each of its rows.
        """
        for group, reads in enumerate(self.crosscoder.wiring.reads) if self else ():
            for read in reads:
                if read_depth(read, self.shape) != depth:
                    continue
                inputs = stream
                if (norm := read_norm(read, self.norms_mlp)) is not None:
                    centred = stream - stream.mean(-1, keepdim=True) if norm.centred else stream
                    inputs = centred * norm.gain_TD[positions_T]
                for write in self.crosscoder.wiring.writes[group]:
                    yield write.layer, inputs @ self.crosscoder.skip_matrix(group, read, write).T

    def pull_back(
        self, vectors: Float[Tensor, "*N T D"], layer: int, positions_T: Int[Tensor, " T"]
    ) -> Iterator[tuple[int, Float[Tensor, "*N T D"]]]:
        """(depth, vectors on the stream there) for every skip connection that writes the MLP output of a layer.

        Args:
            vectors: what is read of that output; the last axis but one runs over positions.
            positions_T: position of each of its rows.
        """
        write = Site(layer, "mlp_out")
        for group in self.crosscoder.wiring.writers(write) if self else ():
            for read in self.crosscoder.wiring.reads[group]:
                pulled = vectors @ self.crosscoder.skip_matrix(group, read, write)
                if (norm := read_norm(read, self.norms_mlp)) is not None:
                    pulled = norm.pull_back(pulled, positions_T)
                yield read_depth(read, self.shape), pulled

    def bias(self, layer: int) -> Float[Tensor, " D"] | float:
        """What skip connections write to the MLP output of a layer when the stream is zero; 0.0 where that is nothing."""
        write, total = Site(layer, "mlp_out"), 0.0  # type: tuple[Site, Tensor | float]
        for group in self.crosscoder.wiring.writers(write) if self else ():
            for read in self.crosscoder.wiring.reads[group]:
                if (norm := read_norm(read, self.norms_mlp)) is not None:
                    total = total + norm.bias_D @ self.crosscoder.skip_matrix(group, read, write).T
        return total


def add_terms(sums: dict[int, Tensor], terms: Iterable[tuple[int, Tensor]]) -> None:
    """Add every (key, tensor) to `sums[key]`, which may not exist yet."""
    for key, tensor in terms:
        sums[key] = sums[key] + tensor if key in sums else tensor
