"""The edges of one prompt, summed over the places where features are active: what `global_pass` adds up over a corpus.

S active features of all parts, C source columns, N targets of a chunk, E edges of a chunk, U different features of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.columns import Columns, source_table
from circuits.attribution.direct_effects_with_attention import ResidualTransport
from circuits.attribution.expansion import DENSE_BYTES, LARGEST_ROUND, Attributor
from circuits.attribution.readers import stream_reads
from circuits.explain.feature_numbers import FeatureNumbers
from circuits.graph.nodes import NodeKind
from replacement import LocalReplacement


@dataclass(frozen=True, slots=True)
class PromptSums:
    """Sums over the places where some features are active in one prompt; each feature is in one or several of these."""

    feature_U: np.ndarray
    """Numbers of the features, each once."""
    of_features: dict[str, np.ndarray]
    """Columns over `feature_U`, as in `GlobalCircuits.features`."""
    key_P: np.ndarray
    """`target * F + source` of every pair with an edge, rising."""
    sums_CP: np.ndarray
    """`direct`, `attention`, `together` and `reach` of every pair."""


class PromptEdges:
    """The edges of one prompt, chunk by chunk of its active features."""

    def __init__(self, local: LocalReplacement, numbers: FeatureNumbers, counted_T: np.ndarray, *, paths: str) -> None:
        """
        Args:
            local: the prompt's local replacement model.
            counted_T: bool, tokens at which targets count.
            paths: `all`, or `direct` for the residual stream at the target's own position alone.
        """
        self.local, self.numbers, self.columns = local, numbers, Columns.of(local)
        self.attributor = Attributor(local, []) if paths == "all" else None
        self.residual = ResidualTransport(local)
        table, features = source_table(local), self.columns.features
        part, layer, index = (table[name][features] for name in ("part", "layer", "index"))
        self.position_S, self.activation_S = table["position"][features], table["activation"][features].astype(float)
        self.number_U, self.place_S = np.unique(numbers.numbers(part, layer, index), return_inverse=True)
        self.counted = np.flatnonzero(counted_T[self.position_S] & (self.activation_S > 0))
        self.is_error_C = table["kind"][: features.start] == NodeKind.ERROR
        self.value_S = torch.cat([part.pre_activation_S for part in local.decompositions]).double().cpu().numpy()

    @property
    def identity_error(self) -> float:
        """The largest violation of `value = sum of the row + bias` seen so far; 0 for direct paths, which are not all."""
        return self.attributor.rows.identity_error if self.attributor is not None else 0.0

    def __iter__(self) -> Iterator[PromptSums]:
        step = max(1, min(LARGEST_ROUND, DENSE_BYTES // (self.columns.n_columns * self.local.dtype.itemsize)))
        for first in range(0, len(self.counted), step):
            yield self._sums(self.counted[first : first + step])

    def _sums(self, chosen: np.ndarray) -> PromptSums:
        """Sums over the places of some active features."""
        direct_NC = self._direct(chosen)
        if self.attributor is None:
            target, source = np.nonzero(direct_NC)
            total, bias, inflow = direct_NC[target, source], np.zeros(len(chosen)), np.abs(direct_NC).sum(1)
        else:
            target, source, total = self._rows(self.attributor, chosen)
            nodes = self.columns.features.start + chosen
            bias, inflow = self.attributor.rows.bias[nodes], self.attributor.rows.inflow[nodes]
        direct = direct_NC[target, source].astype(float)
        start, n_sources = (
            self.columns.features.start,
            len(self.number_U) + 2,
        )  # tokens and errors stand behind the features
        is_feature = source >= start
        own = source[is_feature] - start
        column = np.empty(len(source), np.int64)
        column[is_feature] = self.place_S[own]
        column[~is_feature] = len(self.number_U) + self.is_error_C[source[~is_feature]]
        here_U, row_N = np.unique(self.place_S[chosen], return_inverse=True)
        cell, n_cells = row_N[target] * n_sources + column, len(here_U) * n_sources
        reach = np.zeros(len(source))
        reach[is_feature] = self.activation_S[own]
        together = reach.copy()
        together[is_feature] *= self.position_S[own] == self.position_S[chosen][target[is_feature]]
        sums = [np.bincount(cell, values, n_cells) for values in (direct, total - direct, together, reach)]
        effect = (sums[0] + sums[1]).reshape(-1, n_sources)
        pairs = np.flatnonzero(sums[3].reshape(-1, n_sources)[:, :-2])
        row, place = np.divmod(pairs, n_sources - 2)
        n_here = len(here_U)
        return PromptSums(
            feature_U=self.number_U[here_U],
            of_features={
                "firings": np.bincount(row_N, minlength=n_here),
                "pre_activation": np.bincount(row_N, self.value_S[chosen], n_here),
                "inflow": np.bincount(row_N, inflow, n_here),
                "tokens": effect[:, -2],
                "errors": effect[:, -1],
                "bias": np.bincount(row_N, bias, n_here),
            },
            key_P=self.number_U[here_U[row]] * self.numbers.n_features + self.number_U[place],
            sums_CP=np.stack([column.reshape(-1, n_sources)[row, place] for column in sums]),
        )

    def _rows(self, attributor: Attributor, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All edges into some features: place of the target in `chosen`, source column and weight."""
        attributor.expand_features(chosen)
        rows, nodes = attributor.rows, self.columns.features.start + chosen
        blocks = [block for parts in rows.blocks.values() for block in parts]
        rows.blocks.clear()
        target = np.searchsorted(nodes, np.concatenate([np.repeat(block.node, block.counts) for block in blocks]))
        source, total = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("source", "weight"))
        return target, source, total

    def _direct(self, chosen: np.ndarray) -> np.ndarray:
        """`[N, C]`, direct effects along the residual stream at the targets' own positions; 0 on features of attention."""
        local, of_mlp = self.local, self.columns.split(chosen)[0]
        direct_NC = local.zeros(len(chosen), self.columns.n_columns)
        if len(of_mlp):
            feature_N, targets, _ = stream_reads(local, local.mlp, torch.from_numpy(of_mlp).to(local.device))
            effects: Tensor = self.residual.attribute(targets)[0]
            direct_NC.index_add_(0, feature_N, effects)
        return direct_NC.cpu().numpy()
