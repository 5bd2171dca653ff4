"""Transport where attention outputs are features too: effects run through the residual stream alone.

T tokens, N targets, R rows (a target at one of its positions), D d_model, C source columns.

An MLP feature or a logit reads its own position. A feature of attention, with patterns frozen, is a linear reading of every
earlier position of its layer's input (`HeadTargets`): one row per position. A row meets what lower layers write at
its position, and nothing moves between positions on the way, except through the nodes of attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.direct_effects import constant_stream
from circuits.attribution.readers import HeadTargets, Targets
from circuits.attribution.sources import LayerSources, Sources
from replacement import LocalReplacement
from replacement.splicing.skip import add_terms

NUMBERS_AT_ONCE = 2**24
"""Targets x positions x D of one chunk of targets that read attention (64 MiB in float32)."""


class ResidualTransport:
    """The frozen linear maps of one prompt whose attention outputs are decomposed."""

    def __init__(self, local: LocalReplacement) -> None:
        self.local = local
        self.sources = Sources(local)
        self.constants = constant_stream(local, self.sources)

    def attribute(self, targets: Targets) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
        """Direct effects `A [N, C]` of every source on every target, and the constant part `bias [N]`.

        For a target that reads `v . x` at its point, `v . x = sum_c A[n, c] + bias[n]` exactly.
        """
        n_targets, position_N, depth_N = len(targets.depth_N), targets.position_N, targets.depth_N
        target_N = torch.arange(n_targets, device=position_N.device)
        rows = _Rows.sort(target_N, position_N, depth_N, targets.vectors_ND, self.constants.shape[1])
        effects_NC = self._effects(rows, n_targets)
        return effects_NC, (targets.vectors_ND * self.constants[depth_N, position_N]).sum(-1)

    @property
    def heads_at_once(self) -> int:
        """Targets of one call of `attribute_heads`: it holds a vector for each of them at every position."""
        T, D = self.constants.shape[1:]
        return max(1, NUMBERS_AT_ONCE // (T * D))

    def attribute_heads(self, targets: HeadTargets) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
        """The same for targets that read every earlier position; their constants are part of `bias`."""
        bias_N = targets.read(self.constants[targets.depth]).sum((1, 2)) + targets.constant_N
        v_NTD = targets.pull_back()
        positions_T = torch.arange(v_NTD.shape[1], device=bias_N.device)
        target_R, position_R = torch.nonzero(positions_T <= targets.position_N[:, None], as_tuple=True)
        depth_R = torch.full_like(position_R, targets.depth)
        rows = _Rows.sort(target_R, position_R, depth_R, v_NTD[target_R, position_R], self.constants.shape[1])
        return self._effects(rows, len(v_NTD)), bias_N

    def _effects(self, rows: _Rows, n_targets: int) -> Tensor:
        """Walk down from the deepest row, meeting what every layer writes."""
        effects_NC = rows.v_RD.new_zeros(n_targets, self.sources.columns.n_columns)
        pending: dict[int, Tensor] = {}  # vectors that skip connections add when the walk reaches a depth
        skips = self.local.skips
        for layer in reversed(range(min(self.local.shape.n_layers, int(rows.depth_R.max()) // 2 + 1))):
            rows.meet(self.sources.written(0, layer), 2 * layer + 2, effects_NC)
            if skips:
                reading_RD = rows.v_RD * (rows.depth_R >= 2 * layer + 2)[:, None]
                add_terms(pending, skips.pull_back(reading_RD, layer, rows.position_R))
            rows.add(pending.pop(2 * layer + 1, None))
            if self.local.attention is not None:
                rows.meet(self.sources.written(1, layer), 2 * layer + 1, effects_NC)
            rows.add(pending.pop(2 * layer, None))
        frozen, first = self.local.frozen, 0
        for source_TD in (frozen.token_embedding_TD, frozen.position_embedding_TD):
            if source_TD is not None:
                effects_NC[rows.target_R, first + rows.position_R] = (rows.v_RD * source_TD[rows.position_R]).sum(-1)
                first += len(source_TD)
        return effects_NC


@dataclass(slots=True)
class _Rows:
    """Vectors on the stream, sorted by position, deepest first at each; one target has at most one row at a position."""

    target_R: Int[Tensor, " R"]
    position_R: Int[Tensor, " R"]
    depth_R: Int[Tensor, " R"]
    v_RD: Float[Tensor, "R D"]
    first_T: Int[Tensor, " T"]
    """First row of every position."""

    @classmethod
    def sort(cls, target_R: Tensor, position_R: Tensor, depth_R: Tensor, v_RD: Tensor, n_positions: int) -> _Rows:
        order_R = torch.argsort(position_R * (int(depth_R.max()) + 1) + depth_R.max() - depth_R, stable=True)
        counts_T = torch.bincount(position_R, minlength=n_positions)
        first_T = torch.cumsum(counts_T, 0) - counts_T
        return cls(target_R[order_R], position_R[order_R], depth_R[order_R], v_RD[order_R], first_T)

    def meet(self, written: LayerSources, depth: int, effects_NC: Tensor) -> None:
        """Add the inner products of rows that read at `depth` or above it with what is written there.

        Positions with equally many sources and equally many such rows are one batched product.
        """
        reached_T = torch.bincount(self.position_R[self.depth_R >= depth], minlength=len(self.first_T))
        for block in written.blocks:
            reached_P = reached_T[block.positions_P]
            for n_rows in torch.unique(reached_P[reached_P > 0]).tolist():
                place_P = torch.nonzero(reached_P == n_rows)[:, 0]
                steps_N = torch.arange(n_rows, device=place_P.device)
                row_PN = self.first_T[block.positions_P[place_P], None] + steps_N
                effects_PSN, columns_PS = written.products(block, self.v_RD[row_PN], place_P)
                # A target has one row at a position, and a column one position: no entry occurs twice.
                effects_NC[self.target_R[row_PN][:, None], columns_PS[..., None]] += effects_PSN

    def add(self, u_RD: Tensor | None) -> None:
        """Add what skip matrices send to the point that the walk has reached."""
        if u_RD is not None:
            self.v_RD = self.v_RD + u_RD
