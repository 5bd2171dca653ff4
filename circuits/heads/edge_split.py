"""Every edge of a graph as an exact sum over the direct stream and attention heads.

    A[t, s] = direct[t, s] + sum over (layer, head) of A_head[t, s]

By last hop, a head's part holds all paths on which that head is the one that writes into the target's own position; by first
hop, all on which it is the one that first moves what the source wrote. Either way every path is counted once.

With patterns and norm scales frozen, carrying the S sources of a graph up once gives every (edge, head) value by last hop as
one inner product, and carrying its M targets down once gives those by first hop: O(S) or O(M) passes instead of O(S L H).

S sources, M targets, N a chunk of either, T positions from the chunk's first to the last target.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.direct_effects import rows_per_chunk
from circuits.attribution.grounding import Grounding
from circuits.attribution.identity import check_identity
from circuits.attribution.targets import check_model
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.text import full_name
from circuits.heads.writes_and_reads import SourceWrites, TargetReads
from replacement import Lorsa, ReplacementModel
from replacement.language_model.frozen_layers import FrozenAttention, Scratch

HOPS = ("last", "first")
_EDGES_AT_ONCE = 8192
"""Edges whose vectors, or heads in float64, are in memory together."""
_NUMBERS_AT_ONCE = 2**24
"""Numbers of vectors, one for each head, that targets of some edges read with (64 MiB in float32)."""


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """Every edge of a graph, split by heads; rows are in the order of the graph's edges."""

    direct_E: np.ndarray
    """float64[E], what arrives through no head."""
    heads_ELH: np.ndarray
    """float[E, L, H], in the model's own precision: with hundreds of heads it is by far the largest part."""
    sum_error: float
    """Largest |direct + heads - weight|, relative to the weight or to 1 % of the summed magnitudes of its parts and its row."""

    def __repr__(self) -> str:
        return f"HeadSplit({len(self.direct_E)} edges, {' x '.join(map(str, self.heads_ELH.shape[1:]))} heads)"


def split_heads(model: ReplacementModel, graph: CircuitGraph, *, hop: str = "last") -> HeadSplit:
    """Split every edge of a graph by heads.

    Where attention outputs are features too, edges into them split by the heads they read, and all others are direct.

    Args:
        model: the model the graph was traced in.
        graph: a traced graph; a pruned one is much cheaper.
        hop: `last` or `first`, which of the heads on a path it is counted for.

    Raises:
        ValueError: another hop, a graph of another model, or attention that is replaced whole (`replaces_heads`).
        IdentityError: the parts of an edge do not sum to it.
    """
    check_model(model)
    if replaces_heads(model):
        raise ValueError(
            "no head of the model carries an edge of this graph: attention is replaced by low-rank sparse attention, whose "
            "features are heads themselves"
        )
    if hop not in HOPS:
        raise ValueError(f"hop must be {HOPS[0]!r} or {HOPS[1]!r}, got {hop!r}")
    with torch.no_grad():
        return _Split(Grounding.of(model, graph)).run(hop)


def replaces_heads(model: ReplacementModel) -> bool:
    """Whether attention is replaced by low-rank sparse attention, whose features take the place of the model's own heads."""
    return isinstance(model.attention_crosscoder, Lorsa)


def with_heads(model: ReplacementModel, graph: CircuitGraph) -> CircuitGraph:
    """The graph with the heads of every edge, by last hop (see `split_heads`), for exports and reports."""
    split = split_heads(model, graph)
    facts = {**graph.metadata, "heads": {"hop": "last", "sum_error": split.sum_error}}
    heads = EdgeHeads.from_dense(split.direct_E, split.heads_ELH)
    return dataclasses.replace(graph, heads=heads, metadata=facts)


def chain_weights(model: ReplacementModel, graph: CircuitGraph, chain: Sequence[tuple[int, int]]) -> np.ndarray:
    """float64[E], the part of every edge that goes through exactly these heads, in this order.

    The product of the heads' frozen maps: between them the path stays on the stream of one position. Over all chains, the
    empty one (`direct`) included, the parts sum to the edge.

    Args:
        chain: (layer, head) pairs in rising layers, the first mover first.

    Raises:
        ValueError: no heads, a head the model does not have, layers that do not rise, or attention outputs as features,
            where no edge goes through more than one head.
    """
    split = _Split(Grounding.of(model, graph))
    shape = split.local.shape
    for layer, head in chain:
        if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
            raise ValueError(f"there is no head {layer}.{head}: {shape.n_layers} layers of {shape.n_heads} heads")
    if not chain or any(above <= below for (below, _), (above, _) in itertools.pairwise(chain)):
        raise ValueError(f"expected (layer, head) pairs in rising layers, at least one; got {list(chain)}")
    if split.local.attention is not None:
        raise ValueError("where attention outputs are features, an edge goes through one head at most: use split_heads")
    with torch.no_grad():
        return split.chain(chain)


class _Split:
    """The split of one graph, while it is made."""

    def __init__(self, grounding: Grounding) -> None:
        self.graph, self.local = grounding.graph, grounding.local
        nodes, edges, device = self.graph.nodes, self.graph.edges, self.local.device
        sources, targets = grounding.source_nodes, grounding.target_nodes
        self.writes = SourceWrites.of(grounding, sources)
        self.reads = TargetReads.of(grounding, targets)
        self.source_E = torch.from_numpy(np.searchsorted(sources, edges.source)).to(device)
        self.target_E = torch.from_numpy(np.searchsorted(targets, edges.target)).to(device)
        self.position_S = self.writes.position_S
        self.position_M = torch.from_numpy(nodes.position[targets].astype(np.int64)).to(device)
        self.direct_E = torch.zeros(len(edges), dtype=self.local.dtype, device=device)
        self.heads_ELH = self.direct_E.new_zeros(len(edges), self.local.shape.n_layers, self.local.shape.n_heads)

    def run(self, hop: str) -> HeadSplit:
        if len(self.graph.edges):
            self._direct()
            if self.local.attention is not None:
                self._read_heads()
            elif hop == "last":
                self._last_hop()
            else:
                self._first_hop()
        direct_E = self.direct_E.double().cpu().numpy()
        sum_E, magnitude_E = _sums(self.heads_ELH.flatten(1))
        sum_E += direct_E
        edges, nodes = self.graph.edges, self.graph.nodes

        def ends(edge: int) -> tuple[int, int]:
            return int(edges.source[edge]), int(edges.target[edge])

        sum_error = check_identity(
            edges.weight.astype(np.float64),
            sum_E,
            # An edge is rounded at the size of its target's whole row.
            np.abs(direct_E) + magnitude_E + nodes.inflow[edges.target],
            dtype=max(self.local.dtype, torch.float32, key=lambda dtype: torch.finfo(dtype).eps),
            n_layers=self.local.shape.n_layers,
            name=lambda edge: f"edge {' -> '.join(full_name(nodes, end) for end in ends(edge))} ({hop} hop)",
        )
        return HeadSplit(direct_E, self.heads_ELH.cpu().numpy(), sum_error)

    def _direct(self) -> None:
        """What sources write at a target's own position, below where it reads."""
        here_E = torch.nonzero(self.position_S[self.source_E] == self.position_M[self.target_E])[:, 0]
        place_S = torch.full_like(self.position_S, -1)
        for depth, read_MD in self.reads.at_own_position():
            if depth in self.writes.by_depth:
                source_S, vectors_SD = self.writes.by_depth[depth]
                place_S.fill_(-1)[source_S] = torch.arange(len(source_S), device=place_S.device)
                edges_E = here_E[place_S[self.source_E[here_E]] >= 0]
                for edges_C in edges_E.split(_EDGES_AT_ONCE):
                    written_CD = vectors_SD[place_S[self.source_E[edges_C]]]
                    self.direct_E[edges_C] += (written_CD * read_MD[self.target_E[edges_C]]).sum(-1)

    def _read_heads(self) -> None:
        """Edges into features of attention: what each head reads of the stream the source wrote at its own position."""
        row_M = torch.full_like(self.position_M, -1)
        for layer, stream_SD in self.writes.at_own_position():
            if layer not in self.reads.heads:
                continue
            targets_N, reads = self.reads.heads[layer]
            row_M.fill_(-1)[targets_N] = torch.arange(len(targets_N), device=row_M.device)
            edges_E = torch.nonzero(row_M[self.target_E] >= 0)[:, 0]
            for edges_C in edges_E.split(max(1, _NUMBERS_AT_ONCE // reads.vectors_NPD[0].numel())):
                row_C, source_C = row_M[self.target_E[edges_C]], self.source_E[edges_C]
                read_CP = torch.einsum("cd,cpd->cp", stream_SD[source_C], reads.vectors_NPD[row_C])
                head_CP, t_C1 = reads.head_NP[row_C], reads.position_N[row_C][:, None]
                pattern_CP = reads.kernel_HTT[head_CP, t_C1, self.position_S[source_C][:, None]]
                self.heads_ELH[edges_C[:, None], layer, head_CP] = read_CP * pattern_CP

    def _last_hop(self) -> None:
        """Carry sources up; at every layer compare what the heads write with what targets read above it."""
        attentions, deepest = self.local.frozen.attentions, self.reads.deepest
        read_MX = {
            depth // 2: read_MD @ attentions[depth // 2].weights.W_O_XD.T
            for depth, read_MD in self.reads.at_own_position()
            if depth % 2 and depth <= deepest
        }
        for edges_E, row_E, target_E, sources_N, start, stop in self._source_chunks():
            groups = _by_position(row_E, target_E, self.position_M[target_E] - start)
            for layer, mixed_NTX in self.writes.carry_up(sources_N, start, stop, deepest):
                heads, of_layer_EH = attentions[layer].weights.n_heads, self.heads_ELH[:, layer]
                for position, places_E, rows_E, targets_M, columns_E in groups:
                    mixed_HNK = mixed_NTX[:, position].unflatten(-1, (heads, -1)).transpose(0, 1)
                    read_HKM = read_MX[layer][targets_M].unflatten(-1, (heads, -1)).permute(1, 2, 0)
                    of_layer_EH[edges_E[places_E]] = (mixed_HNK @ read_HKM)[:, rows_E, columns_E].T

    def chain(self, chain: Sequence[tuple[int, int]]) -> np.ndarray:
        depth = 2 * chain[-1][0] + 1
        read_MD = next(read_MD for at, read_MD in self.reads.at_own_position() if at == depth)
        weight_E = torch.zeros_like(self.direct_E)
        for edges_E, row_E, target_E, sources_N, start, stop in self._source_chunks():
            written_NTD = self.writes.through_chain(chain, sources_N, start, stop)
            written_ED = written_NTD[row_E, self.position_M[target_E] - start]
            weight_E[edges_E] = (written_ED * read_MD[target_E]).sum(-1)
        return weight_E.double().cpu().numpy()

    def _first_hop(self) -> None:
        """Carry targets down; at every layer compare what the heads read with what sources wrote at their own position."""
        stream_SD, attentions, scratch = dict(self.writes.at_own_position()), self.local.frozen.attentions, Scratch()
        for targets_N in _chunks(self.position_M, lambda position: position + 1):
            edges_E = torch.nonzero(torch.isin(self.target_E, targets_N))[:, 0]
            row_E, source_E = torch.searchsorted(targets_N, self.target_E[edges_E]), self.source_E[edges_E]
            for layer, z_XNT in self.reads.carry_down(targets_N, self.position_M[targets_N], scratch):
                values_SX = stream_SD[layer] @ attentions[layer].weights.W_V_XD.T
                parts_EX = z_XNT[:, row_E, self.position_S[source_E]].T * values_SX[source_E]
                self.heads_ELH[edges_E, layer] = _per_head(parts_EX, attentions[layer])

    def _source_chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int, int]]:
        """Edges of some sources of similar position, the row of each edge's source in its chunk and its target; these sources;
        and the first and last position they are carried to."""
        if not len(self.graph.edges):
            return
        stop = int(self.position_M.max()) + 1
        for sources_N in _chunks(self.position_S, lambda position: stop - position):
            edges_E = torch.nonzero(torch.isin(self.source_E, sources_N))[:, 0]
            row_E = torch.searchsorted(sources_N, self.source_E[edges_E])
            yield edges_E, row_E, self.target_E[edges_E], sources_N, int(self.position_S[sources_N].min()), stop


def _sums(heads_EX: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sums of magnitudes over all heads of every edge, in float64."""
    # Results have their place beforehand: small ones between large ones that come and go would keep these apart in memory.
    sums_2E = heads_EX.new_empty(2, len(heads_EX), dtype=torch.float64)
    for heads_CX, sums_2C in zip(heads_EX.split(_EDGES_AT_ONCE), sums_2E.split(_EDGES_AT_ONCE, dim=1), strict=True):
        exact_CX = heads_CX.double()
        torch.sum(exact_CX, 1, out=sums_2C[0])
        torch.sum(exact_CX.abs(), 1, out=sums_2C[1])
    sum_E, magnitude_E = sums_2E.cpu().numpy()
    return sum_E, magnitude_E


def _by_position(
    row_E: Tensor, target_E: Tensor, position_E: Tensor
) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Edges by the position of their target: it, places among the edges, source rows, targets, and columns among the targets.

    Edges of one position are read off one matrix product of all its sources with all its targets: circuits with many edges are
    dense enough for that to cost far less than one pair of vectors for every edge.
    """
    groups = []
    for position in torch.unique(position_E).tolist():
        places_E = torch.nonzero(position_E == position)[:, 0]
        targets_M, columns_E = torch.unique(target_E[places_E], return_inverse=True)
        groups.append((position, places_E, row_E[places_E], targets_M, columns_E))
    return groups


def _chunks(positions: Tensor, n_rows: Callable[[int], int]) -> Iterator[Tensor]:
    """Rising numbers of nodes of similar position, as many at once as `rows_per_chunk` allows.

    Args:
        n_rows: rows that a node at a position carries; those of a chunk's first node count for all of them.
    """
    order, begin = torch.argsort(positions, stable=True), 0
    while begin < len(order):
        end = begin + max(1, rows_per_chunk(positions.device) // n_rows(int(positions[order[begin]])))
        yield order[begin:end].sort().values
        begin = end


def _per_head(parts_EX: Tensor, attention: FrozenAttention) -> Tensor:
    return parts_EX.unflatten(1, (attention.weights.n_heads, -1)).sum(-1)
