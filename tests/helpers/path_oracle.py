"""Heads by dense matrices: an independent implementation that the split of edges by heads is compared with.

It shares no code with `replacement.language_model.frozen_layers`, `circuits.heads.writes_and_reads` or
`circuits.attribution.direct_effects`: one `[T D, T D]` matrix per head is built from the bridge's raw
`W_V`, `W_O` and norm gains, the model's own patterns and its own streams, and whatever a
source writes is carried through all layers with only some heads switched on. With `on(S)` the edge that a set S of heads
leaves, the part of the paths that go through exactly the heads of a chain follows by inclusion and exclusion:

    chain(C) = sum over S in subsets of C of (-1)^(|C| - |S|) on(S)

S sources, M targets, E edges, T tokens, D d_model, H heads, K d_head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from circuits import CircuitGraph, NodeKind
from replacement import Decomposition, LocalReplacement, ReplacementModel, Site

Chain = tuple[tuple[int, int], ...]


class PathOracle:
    """Every chain of heads behind every edge of one traced graph, in float64."""

    def __init__(self, model: ReplacementModel, graph: CircuitGraph) -> None:
        self.graph, self.shape = graph, model.language_model.shape
        self.parts = model.language_model.parts
        tokens_T = torch.tensor(graph.metadata["token_ids"])
        self.local: LocalReplacement = model.localize(tokens_T)
        names = {"hook_embed", "ln_final.hook_in"}
        names |= {"hook_pos_embed"} if graph.nodes.mask(NodeKind.POSITION).any() else set()
        for layer in range(self.shape.n_layers):
            norms = [f"{name}.hook_in" for name in self.parts.norm_names(layer)]
            names |= {f"blocks.{layer}.{hook}" for hook in ["attn.hook_pattern", *norms]}
        _, self.cache = self.parts.capture(tokens_T, names)
        self.n_tokens, self.d_model = len(tokens_T), self.shape.d_model
        self.sources, self.source_E = np.unique(graph.edges.source, return_inverse=True)
        self.targets, self.target_E = np.unique(graph.edges.target, return_inverse=True)
        layers = range(self.shape.n_layers)
        paths = [f"blocks.{layer}.{name}" for layer in layers for name in self.parts.norm_names(layer)]
        self.norms = {path: self._norm(path) for path in [*paths, "ln_final"]}
        places = [(-1, ""), *itertools.product(layers, ("attn_out", "mlp_out"))]
        self.written = {place: self._written(*place) for place in places}
        on_stream = self.targets[~graph.nodes.of_attention[self.targets]].tolist()
        self.readings = {target: self._readings(target) for target in on_stream}
        self._on: dict[Chain, np.ndarray] = {}

    def _norm(self, path: str) -> Tensor:
        """A norm with its scale fixed, as matrices `[T, D, D]` that act on vectors from the left; offsets left out."""
        norm, x_TD = self.parts._component(path), self.cache[f"{path}.hook_in"]
        centre_DD = torch.eye(self.d_model, dtype=x_TD.dtype)
        if not norm.uses_rms_norm:
            centre_DD = centre_DD - 1 / self.d_model
        original = norm.original_component
        epsilon = getattr(original, "variance_epsilon", getattr(original, "eps", None))
        scale_T = ((x_TD @ centre_DD).pow(2).mean(-1) + epsilon).sqrt()
        gain_D = original.weight.detach() + (1 if norm.uses_weight_offset else 0)
        return gain_D[:, None] * centre_DD / scale_T[:, None, None]

    def _setting(self, name: str) -> float:
        """A factor in the model's configuration; 1 where it has none."""
        return float(getattr(getattr(self.parts.bridge.original_model, "config", None), name, 1.0))

    def values(self, layer: int, head: int) -> Tensor:
        """`[T, K, T, D]`: what a head puts into `attn_z` at one position, of a stream at another."""
        attention = self.parts.bridge.blocks[layer].attn
        group = head * attention.W_V.shape[0] // attention.W_O.shape[0]
        value_KD = attention.W_V[group].detach().T
        norm_SDD = self.norms.get(f"blocks.{layer}.ln1")  # OLMo 2 has none
        value_SKD = value_KD.expand(self.n_tokens, -1, -1) if norm_SDD is None else value_KD @ norm_SDD
        return torch.einsum("ts,skd->tksd", self.cache[f"blocks.{layer}.attn.hook_pattern"][head], value_SKD)

    @cached_property
    def heads(self) -> dict[tuple[int, int], Tensor]:
        """(layer, head) -> `[T D, T D]`, from the stream in front of the layer to what the head adds behind it."""
        matrices, width = {}, self.n_tokens * self.d_model
        for layer, head in itertools.product(range(self.shape.n_layers), range(self.shape.n_heads)):
            W_O_KD = self.parts.bridge.blocks[layer].attn.W_O[head].detach() * self._setting("residual_multiplier")
            matrix = torch.einsum("tksd,ke->tesd", self.values(layer, head), W_O_KD)
            if "ln1_post" in self.parts.norm_names(layer):
                matrix = torch.einsum("tfe,tesd->tfsd", self.norms[f"blocks.{layer}.ln1_post"], matrix)
            matrices[layer, head] = matrix.reshape(width, width)
        return matrices

    def chains(self) -> Iterator[Chain]:
        """Every chain of heads in rising layers, the empty one first."""
        layers = [
            [None, *((layer, head) for head in range(self.shape.n_heads))] for layer in range(self.shape.n_layers)
        ]
        for steps in itertools.product(*layers):
            yield tuple(step for step in steps if step is not None)

    def chain(self, chain: Chain) -> np.ndarray:
        """float64[E], the part of each edge that goes through exactly these heads."""
        subsets = (s for size in range(len(chain) + 1) for s in itertools.combinations(chain, size))
        return sum(((-1) ** (len(chain) - len(s)) * self.on(s) for s in subsets), np.zeros(len(self.graph.edges)))

    def split(self, hop: str) -> tuple[np.ndarray, np.ndarray]:
        """float64[E] and float64[E, L, H]: what goes through no head, and through each as the last or first of its chain."""
        heads_ELH = np.zeros((len(self.graph.edges), self.shape.n_layers, self.shape.n_heads))
        for chain in self.chains():
            if chain:
                layer, head = chain[-1 if hop == "last" else 0]
                heads_ELH[:, layer, head] += self.chain(chain)
        return self.chain(()), heads_ELH

    def on(self, heads: Chain) -> np.ndarray:
        """float64[E], the edges that are left with these heads alone."""
        if heads not in self._on:
            streams = self.streams(heads)
            effects_MS = torch.stack([self._read(target, streams) for target in self.targets.tolist()])
            self._on[heads] = effects_MS.numpy()[self.target_E, self.source_E]
        return self._on[heads]

    def streams(self, heads: Iterable[tuple[int, int]]) -> list[Tensor]:
        """`[S, T, D]` at pre_0, mid_0, pre_1, ... and behind the last layer, of every source, with these heads alone."""
        crosscoder = self.local.crosscoder
        x, depths = self.written[-1, ""], []
        for layer in range(self.shape.n_layers):
            depths.append(x)
            moved = [x.flatten(1) @ self.heads[head].T for head in heads if head[0] == layer]
            x = x + sum((y.view_as(x) for y in moved), self.written[layer, "attn_out"])
            depths.append(x)
            x = x + self.written[layer, "mlp_out"]
            write = Site(layer, "mlp_out")
            for group in crosscoder.wiring.writers(write) if crosscoder.skip else ():
                for read in crosscoder.wiring.reads[group]:
                    inputs = [*depths, x][self._depth(read)]
                    if read.kind == "mlp_in":
                        inputs = torch.einsum("tij,stj->sti", self.norms[f"blocks.{read.layer}.ln2"], inputs)
                    x = x + inputs @ crosscoder.skip_matrix(group, read, write).T
        return [*depths, x]

    def _depth(self, site: Site) -> int:
        """Where a site of the residual stream lies in `streams`."""
        mid = {"resid_mid": 1, "resid_post": 2, "mlp_in": 0 if self.shape.parallel else 1}
        return 2 * site.layer + mid.get(site.kind, 0)

    def _written(self, layer: int, kind: str) -> Tensor:
        """`[S, T, D]`: what every source writes at one layer to one kind of site; embeddings at layer -1."""
        nodes = self.graph.nodes
        out = torch.zeros(len(self.sources), self.n_tokens, self.d_model, dtype=torch.float64)
        for row, node in enumerate(self.sources.tolist()):
            t, node_kind = int(nodes.position[node]), nodes.kind[node]
            if node_kind in (NodeKind.TOKEN, NodeKind.POSITION):
                if layer < 0:
                    out[row, t] = self.cache["hook_embed" if node_kind == NodeKind.TOKEN else "hook_pos_embed"][t]
                continue
            part = self.local.decompositions[int(nodes.of_attention[node])]
            if kind == part.kind and node_kind == NodeKind.ERROR and nodes.layer[node] == layer:
                out[row, t] = part.errors_LTD[layer, t]
            elif kind == part.kind and node_kind == NodeKind.FEATURE:
                out[row, t] = self._decoded(part, node, Site(layer, kind))
        return out

    def _decoded(self, part: Decomposition, node: int, site: Site) -> Tensor:
        """`activation * W_dec` of one feature at one site."""
        group, features = self._group(part, node), part.features
        if group not in part.crosscoder.wiring.writers(site):
            return torch.zeros(self.d_model, dtype=torch.float64)
        index, t = int(self.graph.nodes.index[node]), int(self.graph.nodes.position[node])
        here = (features.group == group) & (features.index == index) & (features.row == t)
        return part.crosscoder.decoder(group, site)[index] * features.activation[here]

    def _group(self, part: Decomposition, node: int) -> int:
        """Group of a feature node."""
        wiring = part.crosscoder.wiring
        return [wiring.group_layer(g) for g in range(wiring.n_groups)].index(int(self.graph.nodes.layer[node]))

    def _read(self, target: int, streams: list[Tensor]) -> Tensor:
        """`[S]`: what one target reads of every source's streams."""
        if target not in self.readings:
            return self.read_heads(target, streams).sum(1)
        t = int(self.graph.nodes.position[target])
        return torch.stack([streams[depth][:, t] @ v_D for depth, v_D in self.readings[target]]).sum(0)

    def _readings(self, target: int) -> list[tuple[int, Tensor]]:
        """Depths of the stream that a logit or a feature of an MLP reads at its own position, and the vectors `[D]`."""
        nodes = self.graph.nodes
        t, index = int(nodes.position[target]), int(nodes.index[target])
        if nodes.kind[target] == NodeKind.LOGIT:
            return [(2 * self.shape.n_layers, self._direction(target) @ self.norms["ln_final"][t])]
        crosscoder, group = self.local.crosscoder, self._group(self.local.mlp, target)
        readings = []
        for site in crosscoder.wiring.reads[group]:
            v_D = crosscoder.encoder(group, site)[index]
            v_D = v_D @ self.norms[f"blocks.{site.layer}.ln2"][t] if site.kind == "mlp_in" else v_D
            readings.append((self._depth(site), v_D))
        return readings

    def read_heads(self, target: int, streams: list[Tensor]) -> Tensor:
        """`[S, H]`: what one feature of attention reads, head by head."""
        assert self.local.attention is not None
        nodes, crosscoder = self.graph.nodes, self.local.attention.crosscoder
        t, layer = int(nodes.position[target]), int(nodes.layer[target])
        encoder_D = crosscoder.encoder(self._group(self.local.attention, target), Site(layer, "attn_z"))
        encoder_HK = encoder_D[int(nodes.index[target])].view(self.shape.n_heads, -1)
        return torch.stack(
            [
                torch.einsum("nsd,ksd,k->n", streams[2 * layer], self.values(layer, head)[t], encoder_HK[head])
                for head in range(self.shape.n_heads)
            ],
            dim=1,
        )

    def _direction(self, target: int) -> Tensor:
        """Unembedding direction `[D]` of a logit node."""
        nodes, W_U_DV = self.graph.nodes, self.parts.bridge.W_U.detach() / self._setting("logits_scaling")
        number = int(np.searchsorted(np.flatnonzero(nodes.mask(NodeKind.LOGIT)), target))
        pair = self.graph.metadata["targets"][number].get("token_ids")
        if pair is not None:
            return W_U_DV[:, pair[0]] - W_U_DV[:, pair[1]]
        return W_U_DV[:, int(nodes.index[target])] - W_U_DV.mean(1)
