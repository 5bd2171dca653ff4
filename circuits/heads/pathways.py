"""What chosen sources write and chosen targets read, with skip matrices followed and heads left to the caller.

    Writings    sources: vectors written at their own position; pushed forward, layer by layer
    Readings    targets: vectors read at their own position; pulled back, layer by layer

S sources, M targets, N a chunk of either, R readings, T positions, L layers, D d_model, X heads x d_head.
Depths: pre_l = 2 l, mid_l = 2 l + 1; what an MLP writes enters at 2 l + 2, what attention writes at 2 l + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.attribution.readers import Targets, head_reads, logit_reads, stream_reads
from circuits.attribution.sources import Sources
from circuits.graph.nodes import NodeKind
from replacement import LocalReplacement, Site
from replacement.language_model.frozen_layers import Scratch
from replacement.splicing.skip import read_depth


@dataclass(frozen=True, slots=True)
class Writings:
    """What S sources write to the residual stream, each at its own position."""

    n_sources: int
    position_S: Tensor
    depths: dict[int, tuple[Tensor, Tensor]]
    """Depth -> sources that write there, and what."""
    d_model: int

    @classmethod
    def of(cls, grounding: Grounding, nodes: np.ndarray) -> Writings:
        """Of graph nodes."""
        local = grounding.local
        depths = {0: grounding.embeddings(nodes)}
        written = grounding.writes(Sources.of(local), nodes)
        for part, layers in enumerate(written):
            for layer, (source_S, vectors_SD) in enumerate(layers):
                if len(source_S):
                    depths[2 * layer + 2 - part] = (source_S, vectors_SD)
        position_S = torch.from_numpy(grounding.graph.nodes.position[nodes].astype(np.int64))
        return cls(len(nodes), position_S.to(local.W_U.device), dict(sorted(depths.items())), local.shape.d_model)

    def by_depth(self) -> Iterator[tuple[int, Tensor]]:
        """Depth and what every source writes there, `[S, D]`."""
        for depth in self.depths:
            yield depth, self._at(depth, torch.arange(self.n_sources))

    def streams(self, local: LocalReplacement) -> Iterator[tuple[int, Tensor]]:
        """Layer by layer: what each source put into the stream at its own position in front of it, through no head."""
        x_SD = self._at(0, torch.arange(self.n_sources))
        pending: dict[int, Tensor] = {}
        for layer in range(local.shape.n_layers):
            yield layer, x_SD
            _branch(local, 2 * layer, x_SD, self.position_S, pending)
            x_SD = x_SD + self._at(2 * layer + 1, torch.arange(self.n_sources))
            _branch(local, 2 * layer + 1, x_SD, self.position_S, pending)
            x_SD = x_SD + self._at(2 * layer + 2, torch.arange(self.n_sources)) + pending.pop(layer, 0)

    def push(self, local: LocalReplacement, sources_N: Tensor, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Layer by layer: what every head writes for each source, `[N, T, X]` in front of `W_O`; T from `start` to `stop`."""
        n = len(sources_N)
        own_N = torch.arange(n, device=sources_N.device)
        place_N = self.position_S[sources_N] - start
        x_NTD = local.W_U.new_zeros(n, stop - start, self.d_model)
        x_NTD[own_N, place_N] = self._at(0, sources_N)
        positions_T = torch.arange(start, stop, device=sources_N.device)
        pending: dict[int, Tensor] = {}
        for layer, attention in enumerate(local.frozen.attentions):
            mixed_NTX = attention.mix(x_NTD, start=start)
            yield layer, mixed_NTX
            _branch(local, 2 * layer, x_NTD, positions_T, pending)
            x_NTD = x_NTD + mixed_NTX @ attention.weights.W_O_XD
            _branch(local, 2 * layer + 1, x_NTD, positions_T, pending)
            x_NTD[own_N, place_N] += self._at(2 * layer + 2, sources_N)
            if layer in pending:
                x_NTD += pending.pop(layer)

    def through_chain(
        self, local: LocalReplacement, chain: Sequence[tuple[int, int]], sources_N: Tensor, start: int, stop: int
    ) -> Tensor:
        """What a chain of heads, (layer, head) in rising layers, writes for each source, `[N, T, D]`.

        From each head to the next it moves along the direct stream and through skip matrices, not through other heads.
        """
        own = dict(self.streams(local))[chain[0][0]][sources_N]
        x_NTD = own.new_zeros(len(sources_N), stop - start, self.d_model)
        x_NTD[torch.arange(len(sources_N)), self.position_S[sources_N] - start] = own
        positions_T = torch.arange(start, stop, device=sources_N.device)
        heads = dict(chain)
        for layer in range(chain[0][0], chain[-1][0] + 1):
            if layer in heads:
                attention = local.frozen.attentions[layer]
                one = torch.zeros(attention.weights.n_heads, device=x_NTD.device, dtype=x_NTD.dtype)
                one[heads[layer]] = 1
                mixed_NTX = (attention.mix(x_NTD, start=start).unflatten(-1, (len(one), -1)) * one[:, None]).flatten(-2)
                x_NTD = mixed_NTX @ attention.weights.W_O_XD
                pending: dict[int, Tensor] = {}
            elif layer > chain[0][0]:
                _branch(local, 2 * layer, x_NTD, positions_T, pending)
            if layer < chain[-1][0]:
                _branch(local, 2 * layer + 1, x_NTD, positions_T, pending)
                x_NTD = x_NTD + pending.pop(layer, 0)
        return x_NTD

    def _at(self, depth: int, sources_N: Tensor) -> Tensor:
        """What some sources (rising numbers) write at one depth, `[N, D]`."""
        like = next(iter(self.depths.values()))[1]
        written_SD = like.new_zeros(self.n_sources, self.d_model)
        if depth in self.depths:
            source_S, vectors_SD = self.depths[depth]
            written_SD[source_S] = vectors_SD
        return written_SD[sources_N]


@dataclass(frozen=True, slots=True)
class Readings:
    """What M targets read: vectors on the stream at their own position, and on `attn_z` for features of attention."""

    n_targets: int
    target_R: Tensor
    """Target of every reading."""
    reads: Targets
    """R readings; those that skip matrices make are readings of their own, behind the others."""
    n_plain: int
    """How many readings are the targets' own."""
    heads: dict[int, Tensor]
    """Layer -> `[M, X]`, what its targets read at `attn_z`; zero in other rows."""
    head_layer_M: Tensor
    """Layer at which a target reads `attn_z`; -1 for targets that read the stream."""

    @classmethod
    def of(cls, grounding: Grounding, nodes: np.ndarray) -> Readings:
        """Of graph nodes."""
        local, graph = grounding.local, grounding.graph
        own, reads, heads = [], [], {}
        head_layer_M = torch.full((len(nodes),), -1, device=local.W_U.device)
        logit_nodes = np.flatnonzero(graph.nodes.mask(NodeKind.LOGIT))
        of_logits = np.flatnonzero(np.isin(nodes, logit_nodes))
        if len(of_logits):
            chosen = [grounding.logits[int(np.searchsorted(logit_nodes, nodes[place]))] for place in of_logits]
            directions_ND = torch.stack([one.direction_D for one in chosen])
            positions_N = torch.tensor([one.position for one in chosen], device=directions_ND.device)
            own.append(torch.from_numpy(of_logits).to(directions_ND.device))
            reads.append(logit_reads(local, directions_ND, positions_N)[0])
        for part, (places, numbers_S) in zip(local.decompositions, grounding.feature_numbers(nodes), strict=True):
            place_S = torch.from_numpy(places).to(numbers_S.device)
            if part.kind == "mlp_out" and len(places):
                own_N, targets, _ = stream_reads(local, part, numbers_S)
                own.append(place_S[own_N])
                reads.append(targets)
            for group in torch.unique(part.features.group[numbers_S]).tolist() if part.kind == "attn_out" else ():
                mine = part.features.group[numbers_S] == group
                read = head_reads(part, numbers_S[mine], group)
                heads[read.layer] = read.vectors_NX.new_zeros(len(nodes), read.vectors_NX.shape[1])
                heads[read.layer][place_S[mine]] = read.vectors_NX
                head_layer_M[place_S[mine]] = read.layer
        target_R, plain = _join(own, reads, local)
        return cls(len(nodes), *_with_skips(local, target_R, plain), len(target_R), heads, head_layer_M)

    @property
    def deepest(self) -> int:
        """Depth of the deepest reading of the stream."""
        return int(self.reads.depth_N.max()) if len(self.reads.depth_N) else -1

    def above(self, depth: int) -> Tensor:
        """`[M, D]`: what each target reads, at its own position, of a vector that enters the stream at a depth."""
        chosen_R = self.reads.depth_N >= depth
        vectors_RD = self.reads.vectors_ND[chosen_R]
        return vectors_RD.new_zeros(self.n_targets, vectors_RD.shape[1]).index_add(
            0, self.target_R[chosen_R], vectors_RD
        )

    def pull(
        self, local: LocalReplacement, targets_N: Tensor, position_N: Tensor, scratch: Scratch
    ) -> Iterator[tuple[int, Tensor]]:
        """Layer by layer, downwards: what every head reads for each target, `[X, N, T]`, in front of `W_V`."""
        v_NTD = local.W_U.new_zeros(len(targets_N), int(position_N.max()) + 1, local.W_U.shape[0])
        mine_R = torch.isin(self.target_R[: self.n_plain], targets_N)
        place_R = torch.searchsorted(targets_N, self.target_R[: self.n_plain][mine_R])
        depth_R, vectors_RD = self.reads.depth_N[: self.n_plain][mine_R], self.reads.vectors_ND[: self.n_plain][mine_R]
        positions_T = torch.arange(v_NTD.shape[1], device=position_N.device)
        pending: dict[int, Tensor] = {}

        def arrive(depth: int) -> None:
            place = place_R[depth_R == depth]
            v_NTD.index_put_((place, position_N[place]), vectors_RD[depth_R == depth], accumulate=True)
            if depth in pending:
                v_NTD.add_(pending.pop(depth))

        arrive(2 * local.shape.n_layers)
        for layer in reversed(range(local.shape.n_layers)):
            for depth, u_NTD in _skips_back(local, layer, v_NTD, positions_T):
                pending[depth] = pending[depth] + u_NTD if depth in pending else u_NTD
            arrive(2 * layer + 1)
            z_XNT = local.frozen.attentions[layer].mix_back(v_NTD, scratch)
            yield layer, z_XNT
            local.frozen.attentions[layer].add_values_back_(z_XNT, v_NTD)
            arrive(2 * layer)


def _join(own: list[Tensor], reads: list[Targets], local: LocalReplacement) -> tuple[Tensor, Targets]:
    none_R = torch.zeros(0, dtype=torch.int64, device=local.W_U.device)
    return torch.cat([none_R, *own]), Targets(
        vectors_ND=torch.cat([local.W_U.new_zeros(0, local.W_U.shape[0]), *(one.vectors_ND for one in reads)]),
        depth_N=torch.cat([none_R, *(one.depth_N for one in reads)]),
        position_N=torch.cat([none_R, *(one.position_N for one in reads)]),
    )


def _with_skips(local: LocalReplacement, target_R: Tensor, reads: Targets) -> tuple[Tensor, Targets]:
    """Add the readings that skip matrices make of others: `W_skip^T v` where the skip reads, from the deepest layer down."""
    for layer in reversed(range(local.shape.n_layers)) if local.crosscoder.skip else ():
        above_R = reads.depth_N >= 2 * layer + 2
        position_R = reads.position_N[above_R]
        more = [
            Targets(u_RD, torch.full_like(position_R, depth), position_R)
            for depth, u_RD in _skips_back(local, layer, reads.vectors_ND[above_R], position_R)
        ]
        target_R, reads = _join([target_R, *[target_R[above_R]] * len(more)], [reads, *more], local)
    return target_R, reads


def _skips_back(local: LocalReplacement, layer: int, v: Tensor, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`W_skip^T v` of vectors `[..., D]` above one layer's MLP, and the depth that each of its skip matrices reads."""
    crosscoder, write = local.crosscoder, Site(layer, "mlp_out")
    for group in crosscoder.wiring.writers(write) if crosscoder.skip else ():
        for read in crosscoder.wiring.reads[group]:
            u = v @ crosscoder.skip_matrix(group, read, write)
            if read.kind == "mlp_in":
                u = local.frozen.norms_mlp[read.layer].pull_back(u, positions)
            yield read_depth(read, local.shape), u


def _branch(local: LocalReplacement, depth: int, x: Tensor, positions: Tensor, pending: dict[int, Tensor]) -> None:
    """What the skip matrices that read a depth make of streams `[..., D]` there, by the layer that they write."""
    crosscoder = local.crosscoder
    for group, reads in enumerate(crosscoder.wiring.reads) if crosscoder.skip else ():
        for read in reads:
            if read_depth(read, local.shape) != depth:
                continue
            inputs = x
            if read.kind == "mlp_in":
                norm = local.frozen.norms_mlp[read.layer]
                centred = x - x.mean(-1, keepdim=True) if norm.centred else x
                inputs = centred * norm.gain_TD[positions]
            for write in crosscoder.wiring.writes[group]:
                u = inputs @ crosscoder.skip_matrix(group, read, write).T
                pending[write.layer] = pending[write.layer] + u if write.layer in pending else u
