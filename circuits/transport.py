"""Transport: pull target vectors back through the frozen transformer and meet every source on the way, without
autograd.

T tokens, N targets of one chunk, D d_model, C source columns. Targets ride in the middle axis (`v_TND`).

A target is a vector at a point of the residual timeline, at one position. Walking down,

    v at post_l   meets what the MLP position of layer l writes: features, error, decoder bias
    v at mid_l    meets the constant that attention l writes, then is pulled back through attention l
    v at pre_0    meets token and position embeddings

Parallel models have no mid: attention l is pulled back from post_l, and MLP readers sit at pre_l. A skip matrix adds
`W_skip^T v` at the point it reads. One chunk holds targets that read at the same point, sorted by position, so that
only positions up to the last target's are carried and every product is one plain matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuits.sources import Sources
from replacement import LocalReplacement, ModelShape, Site

ROWS_PER_CHUNK = 1024
"""Positions x targets carried at once: enough for full-speed matrix products, small enough to stay in the cache."""


@dataclass(frozen=True, order=True, slots=True)
class Point:
    """A place on the residual timeline: in front of a layer's attention, or between it and the MLP (`mid`)."""

    layer: int
    mid: bool = False

    @classmethod
    def of_read(cls, site: Site, shape: ModelShape) -> Point:
        """The point at which a site reads the residual stream.

        Raises:
            ValueError: the site is not a linear reading of the residual stream.
        """
        if site.kind in ("resid_mid", "mlp_in"):
            return cls(site.layer, mid=not shape.parallel)
        if site.kind in ("resid_pre", "resid_post"):
            return cls(site.layer + (site.kind == "resid_post"))
        raise ValueError(f"cannot attribute to features that read {site}: expected a site on the residual stream")


@dataclass(frozen=True, slots=True)
class Targets:
    """N vectors read at one point of the timeline, each at its own position."""

    point: Point
    vectors_ND: Tensor
    position_N: Tensor


class Transport:
    """The frozen linear maps of one prompt, ready to attribute any target to every source below it."""

    def __init__(self, local: LocalReplacement) -> None:
        self.local = local
        self.sources = Sources.of(local)

    def attribute(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Direct effects `A [N, C]` of every source on every target, and the constant part `bias [N]`.

        For a target that reads `v . x` at its point, `v . x = sum_c A[n, c] + bias[n]` exactly.

        Cost: `(position + 1) x layers below x (4 D^2 + 2 T D)` flops per target, plus decoder products.
        """
        n_targets = len(targets.vectors_ND)
        effects_NC = targets.vectors_ND.new_zeros(n_targets, self.sources.n_columns)
        bias_N = targets.vectors_ND.new_zeros(n_targets)
        order_N = torch.argsort(targets.position_N, stable=True)
        for chunk in _chunks(targets.position_N[order_N].tolist()):
            chosen_N = order_N[chunk]
            walk = _Walk(self, targets.vectors_ND[chosen_N], targets.position_N[chosen_N])
            walk.down_from(targets.point)
            effects_NC[chosen_N], bias_N[chosen_N] = walk.effects_NC, walk.bias_N
        return effects_NC, bias_N


def _chunks(position_N: list[int]) -> Iterator[slice]:
    """Cut targets, sorted by position, into runs of about `ROWS_PER_CHUNK` carried rows."""
    start = 0
    for stop in range(1, len(position_N) + 1):
        if stop == len(position_N) or (position_N[stop] + 1) * (stop + 1 - start) > ROWS_PER_CHUNK:
            yield slice(start, stop)
            start = stop


@dataclass(slots=True)
class _Walk:
    """One chunk of targets on its way down."""

    transport: Transport
    vectors_ND: Tensor
    position_N: Tensor
    v_TND: Tensor = field(init=False)
    effects_NC: Tensor = field(init=False)
    bias_N: Tensor = field(init=False)
    _pending: dict[Point, Tensor] = field(init=False, default_factory=dict)
    """Vectors that skip matrices add when the walk reaches a point."""

    def __post_init__(self) -> None:
        n_targets, D = self.vectors_ND.shape
        self.v_TND = self.vectors_ND.new_zeros(int(self.position_N.max()) + 1, n_targets, D)
        self.v_TND[self.position_N, torch.arange(n_targets)] = self.vectors_ND
        self.effects_NC = self.vectors_ND.new_zeros(n_targets, self.transport.sources.n_columns)
        self.bias_N = self.vectors_ND.new_zeros(n_targets)

    def down_from(self, point: Point) -> None:
        """Walk to the embeddings and fill `effects_NC` and `bias_N`."""
        if point.mid:
            self._pass_attention(point.layer)
        for layer in reversed(range(point.layer)):
            self._meet_mlp(layer)
            self._pass_attention(layer)
        self._meet_embeddings()

    def _meet_mlp(self, layer: int) -> None:
        sources = self.transport.sources
        written = sources.layers[layer]
        for v_ND, begin, end in zip(self.v_TND, written.offsets, written.offsets[1:], strict=False):
            effects_NS = v_ND @ written.vectors_SD[begin:end].T
            self.effects_NC.index_add_(1, written.columns_S[begin:end], effects_NS)
        self.bias_N += self.v_TND.sum(0) @ sources.bias_LD[layer]
        if self.transport.local.crosscoder.skip:
            self._branch_into_skips(Site(layer, "mlp_out"))

    def _pass_attention(self, layer: int) -> None:
        attention = self.transport.local.frozen.attentions[layer]
        self._add_pending(Point(layer, mid=True))
        constant_TD = attention.constant_TD[: len(self.v_TND)]
        self.bias_N += torch.einsum("tnd,td->n", self.v_TND, constant_TD)
        attention.add_pull_back_(self.v_TND)
        self._add_pending(Point(layer))

    def _meet_embeddings(self) -> None:
        frozen = self.transport.local.frozen
        T = len(self.v_TND)
        self.effects_NC[:, :T] = torch.einsum("tnd,td->nt", self.v_TND, frozen.token_embedding_TD[:T])
        if frozen.position_embedding_TD is not None:
            n_tokens = len(frozen.tokens_T)
            effects_NT = torch.einsum("tnd,td->nt", self.v_TND, frozen.position_embedding_TD[:T])
            self.effects_NC[:, n_tokens : n_tokens + T] = effects_NT

    def _add_pending(self, point: Point) -> None:
        if point in self._pending:
            self.v_TND += self._pending.pop(point)

    def _branch_into_skips(self, write: Site) -> None:
        """Send `W_skip^T v` to the points that the skip matrices of one written site read."""
        local = self.transport.local
        crosscoder = local.crosscoder
        for group, writes in enumerate(crosscoder.wiring.writes):
            for read in crosscoder.wiring.reads[group] if write in writes else ():
                u_TND = self.v_TND @ crosscoder.skip_matrix(group, read, write)
                if read.kind == "mlp_in":
                    norm = local.frozen.norms_mlp[read.layer]
                    self.bias_N += (u_TND @ norm.bias_D).sum(0)
                    u_TND = norm.pull_back(u_TND, torch.arange(len(u_TND))[:, None])
                point = Point.of_read(read, local.shape)
                self._pending[point] = self._pending[point] + u_TND if point in self._pending else u_TND
