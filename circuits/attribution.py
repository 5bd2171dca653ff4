"""Attribution: rows of direct effects for the targets and then for features, most influential first.

S active features, C source columns (tokens, positions, errors, features), N nodes = C + logit targets.

A node's row is `A[node, source]` for every source below it. Rows are made in rounds. After each round one backward
sweep over the rows made so far tells how much of the output still ends in features without a row (the unexpanded
share), and the next round takes the features that hold most of it, until that share is below `1 - coverage`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from circuits.targets import LogitTarget
from circuits.transport import Point, Targets, Transport
from replacement import LocalReplacement

FIRST_ROUND = 128
"""Features expanded in the first round; every further round doubles, so early rounds stay selective and late ones
fast."""
LARGEST_ROUND = 1024
CANCELLATION = 0.01
"""A gap is measured against the value, or against this part of the summed magnitudes where the value is a small
remainder."""

Progress = Callable[[int, float], None]
"""Called after every round with the number of features expanded and the unexpanded share of influence."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of some nodes that read at one point: A in CSR form."""

    node: np.ndarray
    """int64[n], node of every row."""
    counts: np.ndarray
    """int64[n], entries per row."""
    source: np.ndarray
    """int32[E], source columns, rising inside a row."""
    weight: np.ndarray
    """float32[E]."""


@dataclass(slots=True)
class Attribution:
    """Rows of A and what was seen while they were made; arrays over all N nodes."""

    n_columns: int
    n_nodes: int
    blocks: dict[Point, list[Block]] = field(default_factory=dict)
    value: np.ndarray = field(init=False)
    bias: np.ndarray = field(init=False)
    inflow: np.ndarray = field(init=False)
    expanded: np.ndarray = field(init=False)
    identity_error: float = 0.0
    """Largest relative gap between a node's value and the sum of its row and bias."""
    stopped_by: str = ""
    """`coverage`, `max_nodes`, or `exhausted` when every reachable feature has a row."""
    unexpanded_share: float = 1.0
    """Share of the output that ends in features without a row."""

    def __post_init__(self) -> None:
        self.value, self.bias, self.inflow = (np.zeros(self.n_nodes) for _ in range(3))
        self.expanded = np.zeros(self.n_nodes, dtype=bool)

    def add(self, point: Point, node_N: Tensor, effects_NC: Tensor, bias_N: Tensor, value_N: Tensor) -> None:
        """Store the rows of nodes that read at one point, and check the identity on each."""
        inflow_N = effects_NC.abs().sum(1)
        gap_N = (value_N - effects_NC.sum(1) - bias_N).abs()
        scale_N = torch.maximum(value_N.abs(), CANCELLATION * (inflow_N + bias_N.abs()))
        self.identity_error = max(self.identity_error, float((gap_N / scale_N.clamp(min=1e-30)).max()))
        node = node_N.cpu().numpy()
        self.value[node], self.bias[node] = value_N.cpu().numpy(), bias_N.cpu().numpy()
        self.inflow[node], self.expanded[node] = inflow_N.cpu().numpy(), True
        effects = effects_NC.float().cpu().numpy()
        row, column = np.nonzero(effects)
        counts = np.bincount(row, minlength=len(node))
        self.blocks.setdefault(point, []).append(Block(node, counts, column.astype(np.int32), effects[row, column]))

    def influence(self, output: np.ndarray) -> np.ndarray:
        """float64[N], influence through the rows made so far: one sweep from the last point to the first."""
        influence = np.zeros(self.n_nodes)
        for point in sorted(self.blocks, reverse=True):
            for block in self.blocks[point]:
                share = (influence + output)[block.node] / np.maximum(self.inflow[block.node], 1e-300)
                mass = np.repeat(share, block.counts) * np.abs(block.weight)
                influence[: self.n_columns] += np.bincount(block.source, weights=mass, minlength=self.n_columns)
        return influence


class Attributor:
    """Makes rows for one prompt."""

    def __init__(self, local: LocalReplacement, logits: Sequence[LogitTarget]) -> None:
        self.local = local
        self.logits = logits
        self.transport = Transport(local)
        sources = self.transport.sources
        self.first_feature, n_columns = sources.feature_column, sources.n_columns
        self.rows = Attribution(n_columns=n_columns, n_nodes=n_columns + len(logits))

    def expand(
        self,
        output: np.ndarray,
        *,
        coverage: float,
        max_nodes: int | None,
        progress: Progress | None = None,
    ) -> Attribution:
        """Make rows until the unexpanded share is below `1 - coverage` or `max_nodes` features have one.

        Args:
            output: float64[N], the share of the output each root stands for.
            coverage: share of influence that must not end in features without a row, in 0..1.
            max_nodes: most features given a row; no limit by default.
            progress: called after every round.
        """
        rows = self.rows
        if self.logits:
            self._expand_logits()
        features = slice(self.first_feature, rows.n_columns)
        n_expanded, size = 0, FIRST_ROUND
        while True:
            held = (rows.influence(output) + output)[features] * ~rows.expanded[features]
            rows.unexpanded_share = float(held.sum())
            if progress is not None:
                progress(n_expanded, rows.unexpanded_share)
            # A feature that is itself a root needs its row whatever the coverage.
            needed = rows.unexpanded_share > 1 - coverage or bool((held[output[features] > 0] > 0).any())
            chosen = _smallest_set(held, rows.unexpanded_share - (1 - coverage))[:size]
            if max_nodes is not None:
                chosen = chosen[: max_nodes - n_expanded]
            if not needed or len(chosen) == 0:
                capped = max_nodes is not None and n_expanded >= max_nodes
                rows.stopped_by = "coverage" if not needed else "max_nodes" if capped else "exhausted"
                return rows
            self._expand_features(torch.from_numpy(np.sort(chosen)))
            n_expanded, size = n_expanded + len(chosen), min(2 * size, LARGEST_ROUND)

    def _expand_logits(self) -> None:
        norm = self.local.frozen.norm_final
        device = norm.gain_TD.device
        direction_ND = torch.stack([target.direction_D for target in self.logits])
        position_N = torch.tensor([target.position for target in self.logits], device=device)
        point = Point(self.local.shape.n_layers)
        effects_NC, bias_N = self.transport.attribute(
            Targets(point, norm.pull_back(direction_ND, position_N), position_N)
        )
        own_bias_N = direction_ND.new_tensor([target.bias for target in self.logits])
        value_N = direction_ND.new_tensor([target.value for target in self.logits])
        node_N = self.rows.n_columns + torch.arange(len(self.logits))
        self.rows.add(point, node_N, effects_NC, bias_N + direction_ND @ norm.bias_D + own_bias_N, value_N)

    def _expand_features(self, chosen_S: Tensor) -> None:
        """Rows of the chosen active features (numbers into `local.features`, rising)."""
        features, crosscoder = self.local.features, self.local.crosscoder
        for group in torch.unique(features.group[chosen_S]).tolist():
            own_S = chosen_S[features.group[chosen_S] == group]
            index_N, position_N = features.index[own_S], features.row[own_S]
            bias_N = crosscoder.b_enc[group][index_N]
            effects_NC: Tensor | None = None
            for site in crosscoder.wiring.reads[group]:
                vectors_ND = crosscoder.encoder(group, site)[index_N]
                if site.kind == "mlp_in":
                    norm = self.local.frozen.norms_mlp[site.layer]
                    bias_N = bias_N + vectors_ND @ norm.bias_D
                    vectors_ND = norm.pull_back(vectors_ND, position_N)
                point = Point.of_read(site, self.local.shape)
                effects, constant_N = self.transport.attribute(Targets(point, vectors_ND, position_N))
                effects_NC = effects if effects_NC is None else effects_NC + effects
                bias_N = bias_N + constant_N
            assert effects_NC is not None
            self.rows.add(point, self.first_feature + own_S, effects_NC, bias_N, self.local.pre_activation_S[own_S])


def _smallest_set(held: np.ndarray, enough: float) -> np.ndarray:
    """Numbers of the largest entries that together hold `enough`, largest first (ties by number)."""
    order = np.argsort(-held, kind="stable")
    order = order[held[order] > 0]
    before = np.cumsum(held[order]) - held[order]
    return order[before < enough]
