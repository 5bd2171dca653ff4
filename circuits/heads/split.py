"""Heads: every edge as a sum over the direct stream and attention heads, exactly.

    A[t, s] = direct[t, s] + sum over (layer, head) of A_head[t, s]

By last hop, a head's part holds all paths on which that head is the one that writes into the target's own position; by first
hop, all on which it is the one that first moves what the source wrote. Either way every path is counted once.

With patterns and norm scales frozen, pushing the S sources of a graph forward once gives every (edge, head) value by last hop
as one inner product, and pulling its M targets back once gives those by first hop: O(S) or O(M) passes instead of O(S L H).

E edges, S source nodes, M target nodes, R readings (a target at one point of the stream), T positions from the chunk's
first to the last target, L layers, H heads, K d_head, X = H K, D d_model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.attribution.identity import CANCELLATION
from circuits.attribution.transport import ROWS_PER_CHUNK
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.edge_heads import EdgeHeads
from circuits.heads.pathways import Readings, Writings
from replacement import ReplacementModel
from replacement.language_model.frozen_layers import FrozenAttention, Scratch

HOPS = ("last", "first")


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """Every edge of a graph, split by heads; rows are in the order of the graph's edges."""

    direct_E: np.ndarray
    """float64[E], what arrives through no head."""
    heads_ELH: np.ndarray
    """float64[E, L, H]."""
    sum_error: float
    """Largest |direct + heads - weight|, relative to the weight or to 1 % of the parts' summed magnitudes."""


def split_heads(model: ReplacementModel, graph: CircuitGraph, *, hop: str = "last") -> HeadSplit:
    """Split every edge of a graph by heads.

    Where attention outputs are features too, edges into them split by the heads they read, and all others are direct.

    Args:
        model: the model the graph was traced in.
        graph: a traced graph; a pruned one is much cheaper.
        hop: `last` or `first`, which of the heads on a path it is counted for.

    Raises:
        ValueError: another hop, or a graph of another model.
    """
    if hop not in HOPS:
        raise ValueError(f"hop must be {HOPS[0]!r} or {HOPS[1]!r}, got {hop!r}")
    with torch.no_grad():
        return _Split(Grounding.of(model, graph)).run(hop)


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
    """The work of one graph."""

    def __init__(self, grounding: Grounding) -> None:
        self.local = grounding.local
        self.edges = grounding.graph.edges
        nodes, device = grounding.graph.nodes, self.local.W_U.device
        sources, targets = grounding.source_nodes, grounding.target_nodes
        self.writings = Writings.of(grounding, sources)
        self.readings = Readings.of(grounding, targets)
        self.source_E = torch.from_numpy(np.searchsorted(sources, self.edges.source)).to(device)
        self.target_E = torch.from_numpy(np.searchsorted(targets, self.edges.target)).to(device)
        self.position_S = torch.from_numpy(nodes.position[sources].astype(np.int64)).to(device)
        self.position_M = torch.from_numpy(nodes.position[targets].astype(np.int64)).to(device)
        shape, n_edges = self.local.shape, len(self.edges)
        self.direct_E = torch.zeros(n_edges, dtype=self.local.W_U.dtype, device=device)
        self.heads_ELH = self.direct_E.new_zeros(n_edges, shape.n_layers, shape.n_heads)

    def run(self, hop: str) -> HeadSplit:
        if len(self.edges):
            self._direct()
            if self.local.attention is not None:
                self._read_heads()
            elif hop == "last":
                self._last_hop()
            else:
                self._first_hop()
        direct_E, heads_ELH = self.direct_E.double().cpu().numpy(), self.heads_ELH.double().cpu().numpy()
        weight_E = self.edges.weight.astype(np.float64)
        gap_E = np.abs(direct_E + heads_ELH.sum((1, 2)) - weight_E)
        parts_E = np.abs(direct_E) + np.abs(heads_ELH).sum((1, 2))
        scale_E = np.maximum(np.abs(weight_E), CANCELLATION * parts_E)
        return HeadSplit(direct_E, heads_ELH, float((gap_E / np.maximum(scale_E, 1e-30)).max(initial=0.0)))

    def _direct(self) -> None:
        """What sources write at a target's own position, below where it reads."""
        here_E = torch.nonzero(self.position_S[self.source_E] == self.position_M[self.target_E])[:, 0]
        source_E, target_E = self.source_E[here_E], self.target_E[here_E]
        for depth, written_SD in self.writings.by_depth():
            read_MD = self.readings.above(depth)
            self.direct_E[here_E] += (written_SD[source_E] * read_MD[target_E]).sum(-1)

    def _read_heads(self) -> None:
        """Edges into features of attention: what each head reads of the stream the source wrote at its own position."""
        for layer, own_SD in self.writings.streams(self.local):
            heads_MX = self.readings.heads.get(layer)
            if heads_MX is None:
                continue
            edges_E = torch.nonzero(self.readings.head_layer_M[self.target_E] == layer)[:, 0]
            attention = self.local.frozen.attentions[layer]
            source_E, target_E = self.source_E[edges_E], self.target_E[edges_E]
            values_SX = own_SD @ attention.weights.W_V_XD.T
            head_EH = _per_head(values_SX[source_E] * heads_MX[target_E], attention)
            t_E, s_E = self.position_M[target_E], self.position_S[source_E]
            pattern_EH = attention.kernel_HTT[:, t_E, s_E].T
            if attention.scale_out_T is not None:  # attn_z lies before the output norm
                pattern_EH = pattern_EH * attention.scale_out_T[t_E][:, None]
            self.heads_ELH[edges_E, layer] = head_EH * pattern_EH

    def _last_hop(self) -> None:
        """Push sources forward; at every layer compare what the heads write with what targets read above it."""
        read = [
            self.readings.above(2 * layer + 1) @ attention.weights.W_O_XD.T
            for layer, attention in enumerate(self.local.frozen.attentions)
            if 2 * layer + 1 <= self.readings.deepest
        ]
        for sources_N, start, stop in self._source_chunks():
            edges_E = torch.nonzero(torch.isin(self.source_E, sources_N))[:, 0]
            place_E = torch.searchsorted(sources_N, self.source_E[edges_E])
            target_E = self.target_E[edges_E]
            position_E = self.position_M[target_E] - start
            push = self.writings.push(self.local, sources_N, start, stop)
            for read_MX, (layer, mixed_NTX) in zip(read, push, strict=False):  # no layer above the deepest reading
                parts_EX = mixed_NTX[place_E, position_E] * read_MX[target_E]
                self.heads_ELH[edges_E, layer] = _per_head(parts_EX, self.local.frozen.attentions[layer])

    def chain(self, chain: Sequence[tuple[int, int]]) -> np.ndarray:
        read_MD = self.readings.above(2 * chain[-1][0] + 1)
        weight_E = torch.zeros_like(self.direct_E)
        for sources_N, start, stop in self._source_chunks():
            edges_E = torch.nonzero(torch.isin(self.source_E, sources_N))[:, 0]
            place_E, target_E = torch.searchsorted(sources_N, self.source_E[edges_E]), self.target_E[edges_E]
            written_NTD = self.writings.through_chain(self.local, chain, sources_N, start, stop)
            written_ED = written_NTD[place_E, self.position_M[target_E] - start]
            weight_E[edges_E] = (written_ED * read_MD[target_E]).sum(-1)
        return weight_E.double().cpu().numpy()

    def _source_chunks(self) -> Iterator[tuple[Tensor, int, int]]:
        """Sources of similar position (rising numbers), and the first and last position they are pushed to."""
        if not len(self.edges):
            return
        stop = int(self.position_M.max()) + 1
        order_S = torch.argsort(self.position_S, stable=True)
        begin = 0
        while begin < len(order_S):
            start = int(self.position_S[order_S[begin]])
            end = begin + max(1, ROWS_PER_CHUNK // (stop - start))
            yield order_S[begin:end].sort().values, start, stop
            begin = end

    def _first_hop(self) -> None:
        """Pull targets back; at every layer compare what the heads read with what sources wrote at their own position."""
        own = dict(self.writings.streams(self.local))
        scratch = Scratch()
        order_M = torch.argsort(self.position_M, stable=True)
        begin = 0
        while begin < len(order_M):
            end = begin + max(1, ROWS_PER_CHUNK // (int(self.position_M[order_M[begin]]) + 1))
            targets_N = order_M[begin:end].sort().values
            edges_E = torch.nonzero(torch.isin(self.target_E, targets_N))[:, 0]
            place_E = torch.searchsorted(targets_N, self.target_E[edges_E])
            source_E = self.source_E[edges_E]
            pull = self.readings.pull(self.local, targets_N, self.position_M[targets_N], scratch)
            for layer, z_XNT in pull:
                attention = self.local.frozen.attentions[layer]
                values_SX = own[layer] @ attention.weights.W_V_XD.T
                parts_EX = z_XNT[:, place_E, self.position_S[source_E]].T * values_SX[source_E]
                self.heads_ELH[edges_E, layer] = _per_head(parts_EX, attention)
            begin = end


def _per_head(parts_EX: Tensor, attention: FrozenAttention) -> Tensor:
    return parts_EX.unflatten(1, (attention.weights.n_heads, -1)).sum(-1)
