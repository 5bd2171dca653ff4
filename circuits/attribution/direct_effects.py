"""Transport: pull target vectors back through the frozen transformer and meet every source on the way, without autograd.

T tokens, N targets of one chunk, D d_model, C source columns.

A target is a vector `v` read at a point of the residual timeline, at one position. Walking down,

    v at post_l   meets what the MLP position of layer l writes: features and error
    v at mid_l    is pulled back through attention l, first to its value vectors, then to its input
    v at mid_0    meets token and position embeddings, pushed up through attention 0 once (long prompts: at pre_0)

Parallel models have no mid: attention l is pulled back from post_l, and MLP readers sit at pre_l. A skip matrix adds
`W_skip^T v` at the point it reads. Constants (biases of attention and decoders) need no walk: the model is affine, so their
part of a target is its inner product with the stream that a run without any source produces.

Points are numbered by depth: pre_l = 2 l, mid_l = 2 l + 1. One chunk holds targets of similar position and any depth,
deepest first, so those under way are always a prefix and every product is one plain matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.readers import Targets
from circuits.attribution.sources import Sources
from replacement import LocalReplacement
from replacement.language_model.frozen_layers import FrozenAttention, Scratch
from replacement.splicing.skip import add_terms, read_depth

LEAST_TARGETS = 16
"""Targets of a chunk however long the prompt is: each source row that is read from memory is then used this often."""
PUSHED_NUMBERS = 2**25
"""Most numbers that embeddings pushed through attention 0 may take (128 MiB in float32)."""
HELD_BYTES = 2**29
"""Most memory that folded attention weights take while a prompt is traced; those of further layers are folded when needed."""
PADDING = 1.1
"""Largest ratio of carried rows to rows inside a causal cone, for chunks that are not small."""


def rows_per_chunk(device: torch.device) -> int:
    """Targets x positions carried at once: enough for fast matrix products, and on CPUs small enough to stay near the cache."""
    return 2048 if device.type == "cpu" else 2**16


class Transport:
    """The frozen linear maps of one prompt, ready to attribute any target to every source below it."""

    def __init__(self, local: LocalReplacement) -> None:
        self.local = local
        self.sources = Sources(local)
        self.constants = constant_stream(local, self.sources)
        self.pushed = _push_embeddings(local)
        self.attentions = _with_held_weights(local.frozen.attentions)
        self.scratch = Scratch()

    def attribute(self, targets: Targets) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
        """Direct effects `A [N, C]` of every source on every target, and the constant part `bias [N]`.

        For a target that reads `v . x` at its point, `v . x = sum_c A[n, c] + bias[n]` exactly.

        Cost: `(position + 1) x layers below x (4 D^2 + 2 T D)` flops per target, plus decoder products.
        """
        vectors_ND, depth_N, position_N = targets.vectors_ND, targets.depth_N, targets.position_N
        bias_N = (vectors_ND * self.constants[depth_N, position_N]).sum(-1)
        effects_NC = vectors_ND.new_empty(len(vectors_ND), self.sources.columns.n_columns)
        order_N = torch.argsort(position_N, stable=True)
        for chunk in _chunks(position_N[order_N].tolist(), rows_per_chunk(vectors_ND.device)):
            chosen = order_N[chunk]
            chosen = chosen[torch.argsort(depth_N[chosen], descending=True, stable=True)]
            walk = _Walk(self, vectors_ND[chosen], depth_N[chosen].tolist(), position_N[chosen])
            effects_NC[chosen] = walk.down().T
        return effects_NC, bias_N


def _with_held_weights(attentions: Sequence[FrozenAttention]) -> list[FrozenAttention]:
    room, held = HELD_BYTES, []
    for attention in attentions:
        room -= 2 * attention.weights.W_O.numel() * attention.kernel_HTT.element_size()
        held.append(replace(attention, weights=attention.weights.hold()) if room >= 0 else attention)
    return held


def _chunks(position_N: list[int], rows: int) -> Iterator[slice]:
    """Cut targets, sorted by position, into runs of similar position and about `rows` carried rows."""
    start, cone = 0, 0
    for n, position in enumerate(position_N):
        carried = (n + 1 - start) * (position + 1)
        padded = carried > PADDING * (cone + position + 1) and carried > rows / 4
        if n >= start + LEAST_TARGETS and (carried > rows or padded):
            yield slice(start, n)
            start, cone = n, 0
        cone += position + 1
    yield slice(start, len(position_N))


@dataclass(slots=True)
class _Walk:
    """One chunk of targets, deepest first, on its way down."""

    transport: Transport
    vectors_ND: Tensor
    depths: list[int]
    position_N: Tensor
    v_NTD: Tensor = field(init=False)
    effects_CN: Tensor = field(init=False)
    """Sources first: adding a source's effects on all targets then moves contiguous memory."""
    _pending: dict[int, Tensor] = field(init=False, default_factory=dict)
    """Vectors that skip matrices add when the walk reaches a depth."""

    def __post_init__(self) -> None:
        n_targets, D = self.vectors_ND.shape
        self.v_NTD = self.vectors_ND.new_zeros(n_targets, int(self.position_N.max()) + 1, D)
        self.v_NTD[torch.arange(n_targets, device=self.v_NTD.device), self.position_N] = self.vectors_ND
        self.effects_CN = self.vectors_ND.new_zeros(self.transport.sources.columns.n_columns, n_targets)

    def down(self) -> Tensor:
        """Walk to the embeddings; return the effects `[C, N]`."""
        pushed = self.transport.pushed
        for layer in reversed(range(min(self.transport.local.shape.n_layers, self.depths[0] // 2 + 1))):
            self._meet_mlp(layer, self._under_way(2 * layer + 2))
            self._add_pending(2 * layer + 1)
            if layer == 0 and pushed is not None:
                reached = self._under_way(1)
                self._meet_pushed(pushed, reached)
                self._meet_embeddings(slice(reached, None))
                return self.effects_CN
            self._pull_back(layer)
            self._add_pending(2 * layer)
        self._meet_embeddings(slice(None))
        return self.effects_CN

    def _pull_back(self, layer: int) -> None:
        """Pull the targets under way back through the attention of one layer.

        Targets that meet their first attention layer here are still at one position, which saves most of its cost.
        """
        attention = self.transport.attentions[layer]
        spread, reached = self._under_way(2 * layer + 3), self._under_way(2 * layer + 1)
        if spread:
            v_NTD = self.v_NTD[:spread]
            attention.add_values_back_(attention.mix_back(v_NTD, self.transport.scratch), v_NTD)
        if reached > spread:
            attention.add_pull_back_from_(self.v_NTD[spread:reached], self.position_N[spread:reached])

    def _under_way(self, depth: int) -> int:
        """Number of targets that read at this depth or deeper; they are a prefix."""
        return sum(target_depth >= depth for target_depth in self.depths)

    def _meet_mlp(self, layer: int, reached: int) -> None:
        if not reached:
            return
        written, v_NTD = self.transport.sources.written(0, layer), self.v_NTD[:reached]
        for block in written.blocks:
            positions_P = block.positions_P[block.positions_P < v_NTD.shape[1]]
            everywhere = len(positions_P) == v_NTD.shape[1]  # a view then, not a copy
            v_PND = (v_NTD if everywhere else v_NTD[:, positions_P]).transpose(0, 1)
            effects_PSN, columns_PS = written.products(block, v_PND)
            self.effects_CN[columns_PS.flatten(), :reached] += effects_PSN.flatten(0, 1)  # no column occurs twice
        positions_T = torch.arange(v_NTD.shape[1], device=v_NTD.device)
        for depth, u_NTD in self.transport.local.skips.pull_back(v_NTD, layer, positions_T):
            if depth in self._pending:  # from a written layer above this one: as many targets or fewer
                u_NTD[: len(self._pending[depth])] += self._pending[depth]
            self._pending[depth] = u_NTD

    def _meet_embeddings(self, rows: slice) -> None:
        """Inner products with the embeddings, in front of attention 0."""
        T, n_tokens = self.v_NTD.shape[1], len(self.transport.local.frozen.tokens_T)
        for place, source_TD in enumerate(_embeddings(self.transport.local)):
            columns = slice(place * n_tokens, place * n_tokens + T)
            self.effects_CN[columns, rows] = torch.einsum("ntd,td->tn", self.v_NTD[rows], source_TD[:T])

    def _meet_pushed(self, pushed_TDC: Tensor, reached: int) -> None:
        """Inner products with the embeddings after attention 0: one matrix product instead of the last pull-back."""
        T = self.v_NTD.shape[1]
        n_columns = pushed_TDC.shape[2]
        self.effects_CN[:n_columns, :reached] = (self.v_NTD[:reached].flatten(1) @ pushed_TDC[:T].flatten(0, 1)).T

    def _add_pending(self, depth: int) -> None:
        if depth in self._pending:
            u_NTD = self._pending.pop(depth)
            self.v_NTD[: len(u_NTD)] += u_NTD


def constant_stream(local: LocalReplacement, sources: Sources) -> Float[Tensor, "P T D"]:
    """The residual stream at every depth (P = 2 L + 1) when embeddings, features and errors are zero.

    It is what biases alone make of the stream. The frozen model is affine, so the constant part of a target is its inner
    product with it.
    """
    frozen, shape, skips = local.frozen, local.shape, local.skips
    x_TD = torch.zeros_like(frozen.token_embedding_TD)
    positions_T = torch.arange(len(x_TD), device=x_TD.device)
    stream = x_TD.new_zeros(2 * shape.n_layers + 1, *x_TD.shape)
    mlp_LD, attention_LD = sources.bias(0), None if local.attention is None else sources.bias(1)
    skipped: dict[int, Tensor] = {}  # by the layer written
    for layer, attention in enumerate(frozen.attentions):
        stream[2 * layer] = x_TD
        add_terms(skipped, skips.apply(x_TD, 2 * layer, positions_T))
        x_TD = x_TD + (attention.apply(x_TD) if attention_LD is None else attention_LD[layer])
        stream[2 * layer + 1] = x_TD
        add_terms(skipped, skips.apply(x_TD, 2 * layer + 1, positions_T))
        x_TD = x_TD + mlp_LD[layer] + skips.bias(layer) + skipped.pop(layer, 0)
    stream[-1] = x_TD
    return stream


def _embeddings(local: LocalReplacement) -> list[Tensor]:
    """Token embeddings and, where the model has them, learned position embeddings, `[T, D]` each."""
    found = (local.frozen.token_embedding_TD, local.frozen.position_embedding_TD)
    return [source_TD for source_TD in found if source_TD is not None]


def _push_embeddings(local: LocalReplacement) -> Tensor | None:
    """`[T, D, C]`: what each embedding (C = T, or 2 T with positions) is at every position after attention 0.

    Every target passes attention 0, but there are few embeddings: pushing them up costs less than pulling all targets
    down, as long as the prompt is short beside D. None for longer prompts, and where skip connections read the embeddings
    themselves.
    """
    attention, sources = local.frozen.attentions[0], _embeddings(local)
    T, D = sources[0].shape
    read = {read_depth(site, local.shape) for site in local.crosscoder.wiring.read_sites}
    if len(sources) * T > D // 4 or len(sources) * T * T * D > PUSHED_NUMBERS or (local.crosscoder.skip and 0 in read):
        return None
    weights = attention.weights
    parts = []
    for source_TD in sources:
        values_SHK = (source_TD @ weights.W_V_XD.T).unflatten(1, (weights.n_heads, -1))
        z_TSX = torch.einsum("hts,shk->tshk", attention.kernel_HTT, values_SHK).flatten(2)
        pushed_TSD = z_TSX @ weights.W_O_XD
        pushed_TSD[torch.arange(T), torch.arange(T)] += source_TD
        parts.append(pushed_TSD)
    return torch.cat(parts, 1).transpose(1, 2).contiguous()
