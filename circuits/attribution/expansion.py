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

from circuits.attribution.columns import source_table
from circuits.attribution.direct_effects import Transport
from circuits.attribution.direct_effects_with_attention import ResidualTransport
from circuits.attribution.identity import check_identity
from circuits.attribution.readers import head_reads, logit_reads, reading_sizes, stream_reads
from circuits.attribution.targets import LogitTarget
from circuits.graph.edges import RowBlock
from replacement import Decomposition, LocalReplacement
from replacement.token_texts import visible

FIRST_ROUND = 128
"""Features expanded in the first round; every further round doubles, so early rounds stay selective and late ones
fast."""
LARGEST_ROUND = 1024
DENSE_BYTES = 2**28
"""Most bytes that the rows of one round take before they are made sparse."""
DENSE_ENTRIES = 2**22
"""Most entries that are made sparse at once, and that one block can hold."""

Progress = Callable[[int, float], None]
"""Called after every round with the number of features expanded and the unexpanded share of influence."""


@dataclass(slots=True)
class Attribution:
    """Rows of A and what was seen while they were made; arrays over all N nodes."""

    n_columns: int
    n_nodes: int
    drop_below: float = 0.0
    """Entries of at most this share of their row's inflow are not stored: they count as lost."""
    blocks: dict[int, list[RowBlock]] = field(default_factory=dict)
    """Rows by the depth at which their nodes read (see `circuits.attribution.direct_effects`)."""
    value: np.ndarray = field(init=False)
    bias: np.ndarray = field(init=False)
    inflow: np.ndarray = field(init=False)
    expanded: np.ndarray = field(init=False)
    identity_error: float = 0.0
    """Largest relative gap between a node's value and the sum of its row and bias."""
    stopped_by: str = ""
    """`coverage`, `max_nodes` or `interrupt`."""
    unexpanded_share: float = 1.0
    """Share of the output that ends in features without a row."""

    def __post_init__(self) -> None:
        self.value, self.bias, self.inflow = (np.zeros(self.n_nodes) for _ in range(3))
        self.expanded = np.zeros(self.n_nodes, dtype=bool)

    def add(
        self, depth: int, node_N: Tensor, effects_NC: Tensor, inflow_N: Tensor, bias_N: Tensor, value_N: Tensor
    ) -> None:
        """Store the rows of nodes that read at one depth."""
        node = node_N.cpu().numpy()
        self.value[node], self.bias[node] = value_N.cpu().numpy(), bias_N.cpu().numpy()
        self.inflow[node], self.expanded[node] = inflow_N.cpu().numpy(), True
        step = max(1, DENSE_ENTRIES // max(1, effects_NC.shape[1]))
        for start in range(0, len(node), step):
            rows = slice(start, start + step)
            effects = effects_NC[rows].cpu().numpy()
            row, column = np.nonzero(np.abs(effects) > (self.drop_below * self.inflow[node[rows]])[:, None])
            counts = np.bincount(row, minlength=len(effects))
            block = RowBlock(node[rows], counts, column.astype(np.int32), effects[row, column])
            self.blocks.setdefault(depth, []).append(block)

    def forget(self, node: np.ndarray) -> None:
        """Remove the rows of a round that was interrupted."""
        for blocks in self.blocks.values():
            blocks[:] = [block for block in blocks if not np.isin(block.node, node).any()]
        for column in (self.value, self.bias, self.inflow, self.expanded):
            column[node] = 0

    def leave_out(self, left_out: np.ndarray, output: np.ndarray) -> float:
        """Remove some nodes; what they contribute to the nodes that stay becomes part of their bias.

        Args:
            left_out: bool[N], the nodes to remove.
            output: float64[N], the share of the output each root stands for.

        Returns:
            The share of the output that reaches the removed nodes.
        """
        through, share = self.influence(output) + output, 0.0
        for blocks in self.blocks.values():
            for number, block in enumerate(blocks):
                stays = ~left_out[block.node]
                node, row = block.node[stays], np.repeat(np.arange(len(block.node)), block.counts)
                removed = left_out[block.source]
                size, length = np.abs(block.weight).astype(np.float64), len(block.node)
                effect = np.bincount(row, weights=removed * block.weight, minlength=length)[stays]
                gone = np.bincount(row, weights=removed * size, minlength=length)[stays]
                kept = np.bincount(row, weights=~removed * size, minlength=length)[stays]
                share += float((through[node] * gone / np.maximum(self.inflow[node], 1e-300)).sum())
                # What fell below `drop_below` was never stored, and stays counted.
                unstored = np.maximum(self.inflow[node] - gone - kept, 0) if self.drop_below else 0.0
                self.bias[node], self.inflow[node] = self.bias[node] + effect, kept + unstored
                chosen = stays[row] & ~removed
                counts = np.bincount(row[chosen], minlength=length)[stays]
                blocks[number] = RowBlock(node, counts, block.source[chosen], block.weight[chosen])
        for column in (self.value, self.bias, self.inflow, self.expanded):
            column[left_out] = 0
        return share

    def influence(self, output: np.ndarray) -> np.ndarray:
        """float64[N], influence through the rows made so far: one sweep from the deepest reader to the shallowest."""
        influence = np.zeros(self.n_nodes)
        for depth in sorted(self.blocks, reverse=True):
            for block in self.blocks[depth]:
                share = (influence + output)[block.node] / np.maximum(self.inflow[block.node], 1e-300)
                mass = np.repeat(share, block.counts) * np.abs(block.weight)
                influence[: self.n_columns] += np.bincount(block.source, weights=mass, minlength=self.n_columns)
        return influence


class Attributor:
    """Makes rows for one prompt."""

    def __init__(self, local: LocalReplacement, logits: Sequence[LogitTarget], *, drop_below: float = 0.0) -> None:
        """Prepare the transport.

        Args:
            local: the prompt's local replacement model.
            logits: targets that are logits.
            drop_below: see `Attribution.drop_below`.
        """
        self.local = local
        self.logits = logits
        self.transport = Transport(local) if local.attention is None else ResidualTransport(local)
        self.columns = self.transport.sources.columns
        n_columns = self.columns.n_columns
        self.rows = Attribution(n_columns=n_columns, n_nodes=n_columns + len(logits), drop_below=drop_below)
        self.largest_round = max(1, min(LARGEST_ROUND, DENSE_BYTES // (n_columns * local.dtype.itemsize)))

    def expand(
        self,
        output: np.ndarray,
        *,
        coverage: float,
        max_nodes: int | None,
        progress: Progress | None = None,
    ) -> Attribution:
        """Make rows until the unexpanded share is below `1 - coverage` or `max_nodes` features have one.

        A `KeyboardInterrupt` after the first round ends the expansion too; the rows of the round under way are left out.

        Args:
            output: float64[N], the share of the output each root stands for.
            coverage: share of influence that must not end in features without a row, in 0..1.
            max_nodes: most features given a row; no limit by default.
            progress: called after every round.
        """
        rows = self.rows
        features = self.columns.features
        if self.logits:
            self.expand_logits()
        roots = np.flatnonzero(output[features])
        if len(roots):  # a feature that is a root needs its row whatever the limits
            self.expand_features(roots)
        n_expanded, size = len(roots), min(FIRST_ROUND, self.largest_round)
        under_way = roots[:0]
        try:
            while True:
                held = self._held(output)
                rows.unexpanded_share = float(held.sum())
                if progress is not None:
                    progress(n_expanded, rows.unexpanded_share)
                chosen = _smallest_set(held, rows.unexpanded_share - (1 - coverage))[:size]
                room = len(chosen) if max_nodes is None else max(0, max_nodes - n_expanded)
                if not len(chosen) or not room:
                    rows.stopped_by = "max_nodes" if len(chosen) else "coverage"
                    return rows
                under_way = np.sort(chosen[:room])
                self.expand_features(under_way)
                n_expanded, size = n_expanded + len(under_way), min(2 * size, self.largest_round)
                under_way = roots[:0]
        except KeyboardInterrupt:
            if n_expanded == len(roots):
                raise
            rows.forget(features.start + under_way)
            rows.unexpanded_share, rows.stopped_by = float(self._held(output).sum()), "interrupt"
            return rows

    def _held(self, output: np.ndarray) -> np.ndarray:
        """float64[S], share of the output that ends in each feature without a row."""
        features = self.columns.features
        held: np.ndarray = (self.rows.influence(output) + output)[features] * ~self.rows.expanded[features]
        return held

    def _add(
        self,
        depth: int,
        node_N: Tensor,
        effects_NC: Tensor,
        bias_N: Tensor,
        value_N: Tensor,
        size_N: Tensor | float = 0.0,
    ) -> None:
        """Check the identity on the rows of nodes that read at one depth, and store them; sizes as in `reading_sizes`."""
        inflow_N = effects_NC.abs().sum(1)
        gap = check_identity(
            value_N,
            effects_NC.sum(1) + bias_N,
            inflow_N + bias_N.abs() + size_N,
            dtype=effects_NC.dtype,
            n_layers=self.local.shape.n_layers,
            name=lambda row: self._name(int(node_N[row])),
        )
        self.rows.identity_error = max(self.rows.identity_error, gap)
        self.rows.add(depth, node_N, effects_NC, inflow_N, bias_N, value_N)

    def _name(self, node: int) -> str:
        """Readable name of a node that has a row: of a feature or a logit target."""
        if node >= self.columns.n_columns:
            return f'output "{visible(self.logits[node - self.columns.n_columns].label)}"'
        table = source_table(self.local)
        part, layer, index, position = (int(table[name][node]) for name in ("part", "layer", "index", "position"))
        return f"{'attention ' if part else ''}feature {layer}/{index} at {position}"

    def expand_logits(self) -> None:
        """Rows of the logit targets."""
        direction_ND = torch.stack([target.direction_D for target in self.logits])
        position_N = torch.tensor([target.position for target in self.logits], device=direction_ND.device)
        targets, constant_N = logit_reads(self.local, direction_ND, position_N)
        effects_NC, bias_N = self.transport.attribute(targets)
        bias_N = bias_N + constant_N + direction_ND.new_tensor([target.bias for target in self.logits])
        value_N = direction_ND.new_tensor([target.value for target in self.logits])
        node_N = self.rows.n_columns + torch.arange(len(self.logits))
        self._add(2 * self.local.shape.n_layers, node_N, effects_NC, bias_N, value_N)

    def expand_features(self, chosen: np.ndarray) -> None:
        """Rows of the chosen active features (numbers among those of all parts, rising)."""
        for number, part_numbers in enumerate(self.columns.split(chosen)):
            if not len(part_numbers):
                continue
            part = self.local.decompositions[number]
            chosen_S = torch.from_numpy(part_numbers).to(part.features.group.device)
            make_rows = self._head_rows if part.kind == "attn_out" else self._stream_rows
            effects_SC, bias_S, depth_S = make_rows(part, chosen_S)
            size_S = reading_sizes(self.local, part, chosen_S)
            for depth in torch.unique(depth_S).tolist():
                here = torch.nonzero(depth_S == depth)[:, 0]
                self._add(
                    depth,
                    self.columns.feature_columns[number] + chosen_S[here],
                    effects_SC[here],
                    bias_S[here],
                    part.pre_activation_S[chosen_S[here]],
                    size_S[here],
                )

    def _stream_rows(self, part: Decomposition, chosen_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Effects `[S, C]`, biases `[S]` and depths `[S]` of features that read the residual stream.

        A feature that reads several sites is several targets: its row is their sum, its depth the deepest.
        """
        feature_N, targets, bias_S = stream_reads(self.local, part, chosen_S)
        effects_NC, constant_N = self.transport.attribute(targets)
        depth_S = torch.zeros_like(chosen_S).scatter_reduce(0, feature_N, targets.depth_N, "amax")
        if len(feature_N) > len(chosen_S):
            effects_NC = effects_NC.new_zeros(len(chosen_S), effects_NC.shape[1]).index_add_(0, feature_N, effects_NC)
        return effects_NC, bias_S.index_add(0, feature_N, constant_N), depth_S

    def _head_rows(self, part: Decomposition, chosen_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for features of attention, which read earlier positions through heads of their layer."""
        assert isinstance(self.transport, ResidualTransport)
        effects, biases, depths = [], [], []
        for group in torch.unique(part.features.group[chosen_S]).tolist():
            for some_S in chosen_S[part.features.group[chosen_S] == group].split(self.transport.heads_at_once):
                targets = head_reads(self.local, part, some_S, group)
                effects_SC, bias_S = self.transport.attribute_heads(targets)
                effects.append(effects_SC)
                biases.append(bias_S)
                depths.append(torch.full_like(some_S, targets.depth))
        return torch.cat(effects), torch.cat(biases), torch.cat(depths)


def _smallest_set(held: np.ndarray, enough: float) -> np.ndarray:
    """Numbers of the largest entries that together hold `enough`, largest first (ties by number)."""
    order = np.argsort(-held, kind="stable")
    order = order[held[order] > 0]
    before = np.cumsum(held[order]) - held[order]
    return order[before < enough]
