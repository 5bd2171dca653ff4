"""What the nodes of a graph write to the residual stream and read from it, and how both move along the stream.

    SourceWrites    the vectors that source nodes write; `carry_up` moves them to later positions and layers
    TargetReads     the vectors that target nodes read with; `carry_down` moves them to earlier positions and layers

With attention patterns and norm scales frozen, everything between two nodes is linear, so an edge is the inner product of both
at any one point of the stream.

Points of the stream are numbered by depth: pre_l = 2 l, mid_l = 2 l + 1. Attention of layer l writes between depths 2 l and
2 l + 1, its MLP between 2 l + 1 and 2 l + 2. S sources, M targets, N a chunk of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.attribution.readers import HeadTargets, Targets, head_reads, logit_reads, stream_reads
from circuits.graph.nodes import NodeKind
from replacement import LocalReplacement
from replacement.language_model.frozen_layers import Scratch
from replacement.splicing.skip import add_terms

Step = Callable[[int, Tensor], Tensor]
"""Given a depth and the vectors there, the vectors after what happens at that depth."""


def walk_up(
    local: LocalReplacement, x: Tensor, positions: Tensor, depths: range, write: Step
) -> Iterator[tuple[int, Tensor]]:
    """Carry vectors up the residual stream, through skip connections; yields (depth, vectors) in front of every `write`, and
    last behind all depths.

    Args:
        x: `[..., P, D]`, vectors on the stream at the first depth.
        positions: `[P]`, position of each of their rows.
        write: adds what attention (even depths) or the MLP (odd depths) writes behind a depth.
    """
    skipped: dict[int, Tensor] = {}
    for depth in depths:
        yield depth, x
        add_terms(skipped, local.skips.apply(x, depth, positions))
        x = write(depth, x)
        if depth % 2 and depth // 2 in skipped:
            x = x + skipped.pop(depth // 2)
    yield depths.stop, x


def walk_down(local: LocalReplacement, v: Tensor, positions: Tensor, read: Step) -> Iterator[tuple[int, Tensor]]:
    """Carry reading vectors down the residual stream, through skip connections; yields (depth, vectors) from behind the last
    layer to the embeddings: their inner product with what enters the stream at a depth is what is read of it.

    Args:
        v: `[..., P, D]`, zeros.
        positions: `[P]`, position of each of their rows.
        read: adds the vectors that read at a depth, after what attention makes of those above it (even depths).
    """
    skipped: dict[int, Tensor] = {}
    for depth in reversed(range(2 * local.shape.n_layers + 1)):
        v = read(depth, v)
        if depth in skipped:
            v = v + skipped.pop(depth)
        yield depth, v
        if depth and depth % 2 == 0:
            add_terms(skipped, local.skips.pull_back(v, depth // 2 - 1, positions))


@dataclass(frozen=True, slots=True)
class SourceWrites:
    """What S sources write to the residual stream, each at its own position."""

    local: LocalReplacement
    position_S: Tensor
    by_depth: dict[int, tuple[Tensor, Tensor]]
    """Depth at which vectors enter the stream -> the sources they belong to, and the vectors."""

    @classmethod
    def of(cls, grounding: Grounding, nodes: np.ndarray) -> SourceWrites:
        """Of graph nodes."""
        by_depth = {0: grounding.embeddings(nodes)}
        for part, layers in enumerate(grounding.writes(nodes)):
            for layer, (source_S, vectors_SD) in enumerate(layers):
                if len(source_S):
                    by_depth[2 * layer + 2 - part] = (source_S, vectors_SD)
        position_S = torch.from_numpy(grounding.graph.nodes.position[nodes].astype(np.int64))
        return cls(grounding.local, position_S.to(grounding.local.device), by_depth)

    def at(self, depth: int, sources_N: Tensor | slice = slice(None)) -> Tensor:
        """`[N, D]`, what some sources write at one depth."""
        written_SD = self.local.zeros(len(self.position_S), self.local.shape.d_model)
        if depth in self.by_depth:
            source_S, vectors_SD = self.by_depth[depth]
            written_SD[source_S] = vectors_SD
        return written_SD[sources_N]

    def at_own_position(self) -> Iterator[tuple[int, Tensor]]:
        """(layer, `[S, D]`), upwards: the stream of each source's own position in front of a layer, without any head."""
        depths = range(2 * self.local.shape.n_layers - 1)
        walk = walk_up(self.local, self.at(0), self.position_S, depths, lambda depth, x_SD: x_SD + self.at(depth + 1))
        return ((depth // 2, x_SD) for depth, x_SD in walk if depth % 2 == 0)

    def carry_up(self, sources_N: Tensor, start: int, stop: int, depth: int) -> Iterator[tuple[int, Tensor]]:
        """Carry some sources up to a depth; yields (layer, `[N, T, X]`): what its heads write, in front of `W_O`.

        Args:
            sources_N: numbers of the sources.
            start: position of the first of T rows that are carried.
            stop: position behind the last one.
        """
        n, device = len(sources_N), sources_N.device
        row_N, place_N = torch.arange(n, device=device), self.position_S[sources_N] - start
        x_NTD = self.local.zeros(n, stop - start, self.local.shape.d_model)
        x_NTD[row_N, place_N] = self.at(0, sources_N)
        mixed_NTX: dict[int, Tensor] = {}

        def write(depth: int, x_NTD: Tensor) -> Tensor:
            if depth % 2:
                x_NTD[row_N, place_N] += self.at(depth + 1, sources_N)
                return x_NTD
            attention = self.local.frozen.attentions[depth // 2]
            mixed_NTX[depth // 2] = attention.mix(x_NTD, start=start)
            return x_NTD + mixed_NTX[depth // 2] @ attention.weights.W_O_XD

        for reached, _ in walk_up(self.local, x_NTD, torch.arange(start, stop, device=device), range(depth), write):
            if reached % 2:
                yield reached // 2, mixed_NTX.pop(reached // 2)

    def through_chain(self, chain: Sequence[tuple[int, int]], sources_N: Tensor, start: int, stop: int) -> Tensor:
        """`[N, T, D]`, what a chain of heads, (layer, head) in rising layers, writes for each source.

        Between two heads it moves along the stream of one position and through skip connections, not through other heads.
        """
        first = chain[0][0]
        own_ND = next(x_SD for layer, x_SD in self.at_own_position() if layer == first)[sources_N]
        x_NTD = own_ND.new_zeros(len(sources_N), stop - start, own_ND.shape[1])
        x_NTD[torch.arange(len(sources_N)), self.position_S[sources_N] - start] = own_ND
        positions_T = torch.arange(start, stop, device=sources_N.device)
        depth = 2 * first
        for layer, head in chain:
            *_, (_, x_NTD) = walk_up(self.local, x_NTD, positions_T, range(depth, 2 * layer), lambda _, x: x)
            attention = self.local.frozen.attentions[layer]
            heads = attention.weights.n_heads
            mixed_NTK = attention.mix(x_NTD, start=start).unflatten(-1, (heads, -1))[..., head, :]
            x_NTD = mixed_NTK @ attention.weights.W_O_XD.unflatten(0, (heads, -1))[head]
            depth = 2 * layer + 1
        return x_NTD


@dataclass(frozen=True, slots=True)
class TargetReads:
    """What M targets read: vectors on the stream of their own position; features of attention read earlier ones, too."""

    local: LocalReplacement
    n_targets: int
    target_R: Tensor
    """Target of every reading of the stream; several readings of one target are at one position."""
    reads: Targets
    """R readings of the stream."""
    heads: dict[int, tuple[Tensor, HeadTargets]] = field(default_factory=dict)
    """Layer -> numbers of its features of attention among the targets, and what they read through heads."""

    @classmethod
    def of(cls, grounding: Grounding, nodes: np.ndarray) -> TargetReads:
        """Of graph nodes."""
        local, device = grounding.local, grounding.local.device
        heads: dict[int, tuple[Tensor, HeadTargets]] = {}
        parts = [_logit_reads(grounding, nodes)]
        for part, (places, numbers_S) in zip(local.decompositions, grounding.feature_numbers(nodes), strict=True):
            place_S = torch.from_numpy(places).to(device)
            if part.kind == "mlp_out" and len(places):
                feature_R, targets, _ = stream_reads(local, part, numbers_S)
                parts.append((place_S[feature_R], targets))
            for group in torch.unique(part.features.group[numbers_S]).tolist() if part.kind == "attn_out" else ():
                of_group_S = part.features.group[numbers_S] == group
                read = head_reads(local, part, numbers_S[of_group_S], group)
                heads[read.layer] = place_S[of_group_S], read
        reads = Targets(
            vectors_ND=torch.cat([targets.vectors_ND for _, targets in parts]),
            depth_N=torch.cat([targets.depth_N for _, targets in parts]),
            position_N=torch.cat([targets.position_N for _, targets in parts]),
        )
        target_R = torch.cat([place_R for place_R, _ in parts])
        return cls(local, len(nodes), target_R, reads, heads)

    @property
    def deepest(self) -> int:
        """Depth of the deepest reading of the stream."""
        return int(self.reads.depth_N.max()) if len(self.reads.depth_N) else -1

    def at_own_position(self) -> Iterator[tuple[int, Tensor]]:
        """(depth, `[M, D]`), downwards: what each target reads of a vector that enters the stream of its own position at a
        depth, directly or through skip connections."""
        position_M = torch.zeros(self.n_targets, dtype=torch.int64, device=self.target_R.device)
        position_M[self.target_R] = self.reads.position_N

        def read(depth: int, v_MD: Tensor) -> Tensor:
            here = self.reads.depth_N == depth
            return v_MD.index_add(0, self.target_R[here], self.reads.vectors_ND[here])

        none_MD = self.local.zeros(self.n_targets, self.local.shape.d_model)
        return walk_down(self.local, none_MD, position_M, read)

    def carry_down(self, targets_N: Tensor, position_N: Tensor, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        """Carry some targets down; yields (layer, `[X, N, T]`): what its heads read, in front of `W_V`.

        Args:
            targets_N: numbers of the targets, rising.
            position_N: their positions.
            scratch: holds what is yielded, until the next layer.
        """
        v_NTD = self.local.zeros(len(targets_N), int(position_N.max()) + 1, self.local.shape.d_model)
        chosen_R = torch.isin(self.target_R, targets_N)
        row_R = torch.searchsorted(targets_N, self.target_R[chosen_R])
        depth_R, vectors_RD = self.reads.depth_N[chosen_R], self.reads.vectors_ND[chosen_R]
        z_XNT: dict[int, Tensor] = {}

        def read(depth: int, v_NTD: Tensor) -> Tensor:
            if depth % 2 == 0 and depth // 2 < self.local.shape.n_layers:
                attention = self.local.frozen.attentions[depth // 2]
                z_XNT[depth // 2] = attention.mix_back(v_NTD, scratch)
                attention.add_values_back_(z_XNT[depth // 2], v_NTD)
            row = row_R[depth_R == depth]
            v_NTD.index_put_((row, position_N[row]), vectors_RD[depth_R == depth], accumulate=True)
            return v_NTD

        positions_T = torch.arange(v_NTD.shape[1], device=position_N.device)
        for depth, _ in walk_down(self.local, v_NTD, positions_T, read):
            if depth // 2 in z_XNT:
                yield depth // 2, z_XNT.pop(depth // 2)


def _logit_reads(grounding: Grounding, nodes: np.ndarray) -> tuple[Tensor, Targets]:
    """Places in `nodes` of the logits among them, and what they read."""
    local, logit_nodes = grounding.local, np.flatnonzero(grounding.graph.nodes.mask(NodeKind.LOGIT))
    places = np.flatnonzero(np.isin(nodes, logit_nodes))
    logits = [grounding.logits[number] for number in np.searchsorted(logit_nodes, nodes[places])]
    directions_ND = (
        torch.stack([logit.direction_D for logit in logits]) if logits else local.zeros(0, local.shape.d_model)
    )
    positions_N = torch.tensor([logit.position for logit in logits], dtype=torch.int64, device=local.device)
    return torch.from_numpy(places).to(local.device), logit_reads(local, directions_ND, positions_N)[0]
