"""From the nodes of a graph back to vectors of the local replacement model: what they write, and what they read.

N graph nodes, S sources, M targets, D d_model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.columns import Columns, source_table
from circuits.attribution.metadata import crosscoder_fingerprint, legacy_crosscoder_fingerprint
from circuits.attribution.sources import LayerSources
from circuits.attribution.targets import DifferenceTarget, LogitTarget, TokenTarget, check_model, resolve_logit
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.metadata import check_traced_here
from circuits.graph.nodes import NodeKind
from replacement import LocalReplacement, ReplacementModel

_KEY = ("kind", "part", "layer", "position", "index")


@dataclass(frozen=True, slots=True)
class Grounding:
    """A graph, and the local replacement model it was traced in."""

    graph: CircuitGraph
    local: LocalReplacement
    columns: Columns
    column_N: np.ndarray
    """int64[N], source column of every node; -1 for logits."""
    logits: tuple[LogitTarget, ...]
    """Logit targets, in the order of the logit nodes."""

    @classmethod
    def of(cls, model: ReplacementModel, graph: CircuitGraph) -> Grounding:
        """Run the graph's prompt again and find every node in it.

        Raises:
            ValueError: as `traced_tokens`, or a node that is not active in this model.
        """
        tokens_T = traced_tokens(model, graph)
        with torch.no_grad():
            local = model.localize(tokens_T)
        return cls(graph, local, Columns.of(local), _find_columns(graph, local), _logits(graph, local, model))

    @property
    def source_nodes(self) -> np.ndarray:
        """Nodes that are the source of an edge."""
        return np.unique(self.graph.edges.source)

    @property
    def target_nodes(self) -> np.ndarray:
        """Nodes that edges flow into."""
        return np.flatnonzero(np.diff(self.graph.edges.indptr))

    def feature_numbers(self, nodes: np.ndarray) -> list[tuple[np.ndarray, Tensor]]:
        """Part by part: places in `nodes` of its features, and their numbers into `Decomposition.features`."""
        found = []
        starts = [*self.columns.feature_columns, self.columns.n_columns]
        for first, end in itertools.pairwise(starts):
            column = self.column_N[nodes]
            own = np.flatnonzero((column >= first) & (column < end))
            found.append((own, torch.from_numpy(column[own] - first).to(self.local.device)))
        return found

    def writes(self, nodes: np.ndarray) -> list[list[tuple[Tensor, Tensor]]]:
        """What nodes write: for the MLPs and, where decomposed, attention, per layer places in `nodes` and vectors.

        Only the decoder rows of these nodes are read.
        """
        place_C = torch.full((self.columns.n_columns,), -1, device=self.local.device)
        place_C[torch.from_numpy(self.column_N[nodes])] = torch.arange(len(nodes), device=place_C.device)
        written: list[list[tuple[Tensor, Tensor]]] = []
        for number, (part, (_, numbers_S)) in enumerate(
            zip(self.local.decompositions, self.feature_numbers(nodes), strict=True)
        ):
            chosen_S, layers = torch.sort(numbers_S).values, []
            for layer in range(self.local.shape.n_layers):
                sources = LayerSources.gather(part, self.columns, number, layer, chosen_S)
                place_S = place_C[sources.columns_S]
                layers.append((place_S[place_S >= 0], sources.vectors_SD[place_S >= 0]))
            written.append(layers)
        return written

    def embeddings(self, nodes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Places in `nodes` of tokens and learned positions, and their embeddings."""
        frozen, T = self.local.frozen, self.columns.n_tokens
        sources = [frozen.token_embedding_TD]
        sources += [] if frozen.position_embedding_TD is None else [frozen.position_embedding_TD]
        column = self.column_N[nodes]
        own = np.flatnonzero((column >= 0) & (column < T * len(sources)))
        return torch.from_numpy(own), torch.cat(sources)[torch.from_numpy(column[own])]


def traced_tokens(model: ReplacementModel, graph: CircuitGraph) -> Tensor:
    """The token ids `[T]` of a graph's prompt, if it was traced in this very model.

    Raises:
        ValueError: the graph was traced with another model or crosscoder, with or without one of attention unlike this model,
            or does not say which tokens it explains.
    """
    check_model(model)
    if not isinstance(graph, CircuitGraph):
        raise ValueError(f"expected a graph, as circuits.trace or CircuitGraph.load gives it, got {graph!r:.50}")
    facts, lm = graph.metadata, model.language_model
    check_traced_here(facts)
    if "token_ids" not in facts or "model_fingerprint" not in facts:
        raise ValueError("the graph does not name its model and tokens: expected one made by circuits.trace")
    if not lm.has_fingerprint(facts["model_fingerprint"]):
        raise ValueError(f"the graph was traced in {facts['model']}, whose weights are not those of {lm.name}")
    linear = facts.get("attention", "linear") == "linear"
    if linear != (model.attention_crosscoder is None):
        has, load = ("no ", "without") if linear else ("", "with")
        raise ValueError(f"the graph has {has}attention features: load the model {load} its attention crosscoder")
    traced = facts.get("crosscoder_fingerprint")  # graphs of earlier versions have none, or one of the legacy form
    is_legacy = traced is not None and ":" not in traced  # which reads the whole crosscoder
    if traced not in (None, legacy_crosscoder_fingerprint(model) if is_legacy else crosscoder_fingerprint(model)):
        raise ValueError("the graph was traced with another crosscoder: its weights are not those of the model given")
    return torch.tensor(facts["token_ids"], device=lm.device)


def _find_columns(graph: CircuitGraph, local: LocalReplacement) -> np.ndarray:
    table = source_table(local)
    known = {key: column for column, key in enumerate(zip(*(table[name].tolist() for name in _KEY), strict=True))}
    found = np.full(len(graph.nodes), -1)
    keys = zip(*(getattr(graph.nodes, name).tolist() for name in _KEY), strict=True)
    ids = graph.nodes.ids()
    for node, key in enumerate(keys):
        if key[0] == NodeKind.LOGIT:
            continue
        if key not in known:
            raise ValueError(f"the graph was traced with another crosscoder: node {ids[node]} is not active here")
        found[node] = known[key]
    return found


def _logits(graph: CircuitGraph, local: LocalReplacement, model: ReplacementModel) -> tuple[LogitTarget, ...]:
    nodes = np.flatnonzero(graph.nodes.mask(NodeKind.LOGIT))
    if not len(nodes):
        return ()
    facts = graph.metadata.get("targets", [])
    if len(facts) != len(nodes):
        raise ValueError(f"the graph has {len(nodes)} logit nodes, but names {len(facts)} targets")
    found = []
    for node, fact in zip(nodes.tolist(), facts, strict=True):
        token, position = int(graph.nodes.index[node]), int(graph.nodes.position[node])
        if token < 0 and "token_ids" not in fact:
            raise ValueError("the graph does not say which tokens its difference is of: trace it again")
        target: TokenTarget | DifferenceTarget = TokenTarget(token, position)
        if token < 0:
            plus, minus = fact["token_ids"]
            target = DifferenceTarget(plus, minus, position)
        found.append(resolve_logit(target, local, model.language_model))
    return tuple(found)
