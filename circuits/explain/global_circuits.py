"""Global circuits as a value: edges between features that hold over a corpus, and the file they are stored in.

F features of all parts and layers, E edges, by target as in a graph. Imports no torch and no models.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from circuits.explain import global_storage
from circuits.explain.feature_numbers import FeatureNumbers
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.influence import edge_influence
from circuits.graph.nodes import NodeKind

NEIGHBOURS, MEMORY = 64, "2GB"
"""Edges kept into each feature, and most memory for the table of pairs, where nothing else is asked for."""
OF_FEATURES = ("firings", "pre_activation", "inflow", "tokens", "errors", "bias", "error", "omitted")
OF_EDGES = ("direct", "attention", "together", "reach")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A feature at the other end of a global edge."""

    name: str
    effect: float
    """Mean of what the source adds to the target's pre-activation, over the tokens where the target is active."""
    share: float
    """The same, divided by the target's mean inflow (the sum of |A| over its row): a signed share, as of a graph's edges."""
    direct: float
    """The part of `effect` that takes the residual stream at the target's own position; attention carries the rest."""
    virtual_weight: float | None
    """Direct effect of a unit of the source's activation; None where both were never active at one token."""


@dataclass(frozen=True, eq=False, repr=False)
class GlobalCircuits:
    """Expected direct effects between features over a corpus; see the README of this room for every definition.

    Attributes:
        features: columns over F. `firings` counts the tokens where a feature is active; summed over these are its
            `pre_activation`, its `inflow` (sum of |A| over its row), and what comes from `tokens` (and positions), `errors` and
            its `bias`. No edge into it is off by more than `error`, and none that is missing is larger than `omitted`, as sums.
        indptr: int64[F + 1], edges into feature t are `indptr[t]:indptr[t + 1]`.
        source: int32[E].
        edges: columns over E, sums over all tokens where the target is active: the effect along the residual stream at its own
            position (`direct`), the one through `attention`, and the source's activation at this token (`together`) and at all
            tokens with an edge to it (`reach`).
        metadata: what was summed over.
    """

    features: dict[str, np.ndarray]
    indptr: np.ndarray
    source: np.ndarray
    edges: dict[str, np.ndarray]
    metadata: dict[str, Any]

    def __repr__(self) -> str:
        facts = self.metadata
        return f"GlobalCircuits({len(self.source):,} edges over {facts['n_tokens']:,} tokens of {facts['corpus']})"

    @cached_property
    def numbers(self) -> FeatureNumbers:
        """How features are numbered."""
        return FeatureNumbers(tuple((tuple(layers), n_features) for layers, n_features in self.metadata["parts"]))

    @cached_property
    def target(self) -> np.ndarray:
        """int64[E], the target of every edge."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))

    @cached_property
    def effect(self) -> np.ndarray:
        """float64[E], mean effect of each edge over the tokens where its target is active."""
        total = self.edges["direct"].astype(np.float64) + self.edges["attention"]
        return total / self.features["firings"][self.target]

    @cached_property
    def share(self) -> np.ndarray:
        """float64[E], the same as a signed share of the target's mean inflow."""
        return self.effect * (self.features["firings"] / np.maximum(self.features["inflow"], 1e-30))[self.target]

    @property
    def largest_error(self) -> float:
        """The most that an edge may be off because pairs were forgotten, as a share of its target's mean inflow; 0 if exact."""
        return float((self.features["error"] / np.maximum(self.features["inflow"], 1e-30)).max(initial=0.0))

    def upstream(self, feature: str, *, top: int = 10) -> list[Neighbour]:
        """What drives a feature: the sources of the largest effects on it, largest first.

        Raises:
            ValueError: there is no such feature.
        """
        number = self.numbers.named(feature)
        edges_E = np.arange(self.indptr[number], self.indptr[number + 1])
        return self._neighbours(edges_E, np.abs(self.effect[edges_E]), self.source, top)

    def downstream(self, feature: str, *, top: int = 10) -> list[Neighbour]:
        """What a feature drives: the targets of the largest sums of |share|, so that features of any scale compare.

        Raises:
            ValueError: there is no such feature.
        """
        edges_E = np.flatnonzero(self.source == self.numbers.named(feature))
        size_E = np.abs(self.share[edges_E]) * self.features["firings"][self.target[edges_E]]
        return self._neighbours(edges_E, size_E, self.target, top)

    def _neighbours(self, edges_E: np.ndarray, size_E: np.ndarray, end_E: np.ndarray, top: int) -> list[Neighbour]:
        result = []
        for edge in edges_E[np.argsort(-size_E, kind="stable")[:top]].tolist():
            direct, together = float(self.edges["direct"][edge]), float(self.edges["together"][edge])
            result.append(
                Neighbour(
                    name=self.numbers.name(int(end_E[edge])),
                    effect=float(self.effect[edge]),
                    share=float(self.share[edge]),
                    direct=direct / int(self.features["firings"][self.target[edge]]),
                    virtual_weight=direct / together if together else None,
                )
            )
        return result

    def account(self, feature: str) -> dict[str, float]:
        """Where a feature's pre-activation comes from: its mean over the tokens where the feature is active, and the parts that
        sum to it: the edges `listed` and those `not_listed`, `tokens`, `errors` and the `bias`.

        Raises:
            ValueError: there is no such feature.
        """
        number = self.numbers.named(feature)
        firings = max(1, int(self.features["firings"][number]))
        names = ("pre_activation", "tokens", "errors", "bias")
        value, *others = (float(self.features[name][number]) / firings for name in names)
        listed = float(self.effect[self.indptr[number] : self.indptr[number + 1]].sum())
        not_listed = value - sum(others) - listed
        return dict(zip((*names, "listed", "not_listed"), (value, *others, listed, not_listed), strict=True))

    # Local graphs ---------------------------------------------------------------------------------------------------

    def explained(self, graph: CircuitGraph) -> dict[str, float | int | None]:
        """How much of a local graph the global edges hold.

        Returns:
            `edges` between features of the graph; `share_of_edges` and `share_of_influence` of those that are global edges too;
            `correlation` (Pearson) of their weights, over all `edges`, with the ones that the global edges predict: the
            source's activation times the mean effect per unit of it (direct at the target's own token, and through attention),
            and 0 where there is no global edge. None where there is nothing to correlate.

        Raises:
            ValueError: a graph of another crosscoder.
        """
        traced, own = graph.metadata.get("crosscoder_fingerprint"), self.metadata["crosscoder_fingerprint"]
        if traced != own:
            raise ValueError(
                f"the graph was traced with another crosscoder ({traced}) than that of these edges ({own})"
            )
        nodes, is_feature = graph.nodes, graph.nodes.mask(NodeKind.FEATURE)
        chosen = np.flatnonzero(is_feature[graph.edges.source] & is_feature[graph.edges.target])
        source, target = graph.edges.source[chosen], graph.edges.target[chosen]
        number_N = self.numbers.numbers(nodes.part, nodes.layer, nodes.index)
        place, found = self.find(number_N[target], number_N[source])
        at = {name: column[place] for name, column in self.edges.items()}
        slope = np.divide(at["attention"], at["reach"], out=np.zeros(len(place)), where=at["reach"] != 0)
        direct = np.divide(at["direct"], at["together"], out=np.zeros(len(place)), where=at["together"] != 0)
        slope += direct * (nodes.position[source] == nodes.position[target])
        predicted, weight = nodes.activation[source] * slope * found, graph.edges.weight[chosen]
        influence = edge_influence(graph)[chosen]
        varies = len(chosen) > 1 and np.ptp(weight) > 0 and np.ptp(predicted) > 0
        return {
            "edges": len(chosen),
            "share_of_edges": float(found.mean()) if len(chosen) else None,
            "share_of_influence": float(influence[found].sum() / influence.sum()) if influence.sum() else None,
            "correlation": float(np.corrcoef(predicted, weight)[0, 1]) if varies else None,
        }

    def find(self, target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place of the edge between each pair of numbers of features, and whether there is one; a place of 0 if not."""
        F = self.numbers.n_features
        key, wanted = self.target * F + self.source, target.astype(np.int64) * F + source
        place = np.searchsorted(key, wanted).clip(max=max(0, len(key) - 1))
        found = key[place] == wanted if len(key) else np.zeros(len(wanted), bool)
        return np.where(found, place, 0), found

    def strongest(self, most: int) -> GlobalCircuits:
        """The same with at most this many edges into each feature, those of largest |effect|."""
        order = np.lexsort((-np.abs(self.effect), self.target))
        rank = np.arange(len(order)) - self.indptr[self.target]
        return self.with_edges(np.sort(order[rank < most]))

    def shuffled(self, seed: int) -> GlobalCircuits:
        """A control of the same density: every source stands for another feature of its layer, drawn from those that fire."""
        generator, numbers = np.random.default_rng(seed), self.numbers
        stands_for, first = np.arange(numbers.n_features), 0
        for layers, n_features in numbers.parts:
            for _ in layers:
                used = np.union1d(self.source, np.flatnonzero(self.features["firings"]))
                used = used[(used >= first) & (used < first + n_features)]
                stands_for[used] = generator.permutation(used)
                first += n_features
        return self.with_edges(np.arange(len(self.source)), stands_for[self.source])

    def with_edges(self, chosen: np.ndarray, source: np.ndarray | None = None) -> GlobalCircuits:
        """Some of the edges (places, rising), if wanted with other sources, as a control has them."""
        target, source = self.target[chosen], (self.source[chosen] if source is None else source)
        order = np.lexsort((source, target))
        indptr = np.searchsorted(target, np.arange(len(self.indptr)))
        edges = {name: column[chosen][order] for name, column in self.edges.items()}
        return GlobalCircuits(self.features, indptr, source[order].astype(np.int32), edges, self.metadata)

    # Files ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one `.safetensors` file, atomically, with metadata and a digest of all of it in its header.

        Raises:
            ValueError: a place that cannot be written.
        """
        tensors = {"indptr": self.indptr, "source": self.source}
        tensors |= {f"features.{name}": self.features[name] for name in OF_FEATURES}
        tensors |= {f"edges.{name}": self.edges[name] for name in OF_EDGES}
        return global_storage.save(path, tensors, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GlobalCircuits:
        """Read a file that `save` wrote.

        Raises:
            ValueError: no such file, one of something else or of a newer version, or a damaged one; it names the file.
        """
        tensors, metadata = global_storage.load(path)
        features = {name: tensors[f"features.{name}"] for name in OF_FEATURES}
        edges = {name: tensors[f"edges.{name}"] for name in OF_EDGES}
        return cls(features, tensors["indptr"], tensors["source"], edges, metadata)
