"""The encoder of a crosscoder: which features are active in what a group reads, and with what activation.

    h_g = sum_{r in reads(g)} x_r W_enc[g, r]^T + b_enc[g]        pre-activations
    a_g = f(h_g)                                                  activations, kept sparse

f looks at each group alone, but for `JointTopK`, for which all groups compete. Features are chosen without gradients from dense
pre-activations, a few rows at a time; the gradients of those chosen are attached behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from replacement.crosscoder.activation import Selection
from replacement.crosscoder.checks import finite_values
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.sparse import Pattern, dots, with_encoder_gradient
from replacement.crosscoder.topk import BatchTopK, JointTopK
from replacement.crosscoder.weights import CrosscoderWeights

_ROWS_AT_ONCE = 512
"""Few enough for the pre-activations to stay in a cache, enough for a fast matrix product. Accelerators get more."""
_FEATURES_AT_ONCE = 16_384
"""Features whose encoders are raised from fewer bits at a time."""

Chosen: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Rows, indices and pre-activations `[S]` of chosen features of one group."""


class Encoder(CrosscoderWeights):
    """From what the sites show to active features; `Crosscoder` adds the way back."""

    def pre_activations(
        self, inputs: Mapping[Site, Tensor], group: int, *, positions: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B F"]:
        """Dense pre-activations `h = sum_r x_r W_enc[r]^T + b_enc` of one group, `[B, F]`.

        Args:
            inputs: activations `[B, D]` of (at least) the sites the group reads.
            positions: position of each row in its prompt; it matters to `Lorsa` alone.

        Raises:
            ValueError: a site is missing, or its activations have another width, dtype, device or number of rows.
        """
        return self._dense_pre_activations(self._reads(inputs, group), group)

    def _dense_pre_activations(self, reads: list[Tensor], group: int) -> Tensor:
        weights, bias_F = self.encoders(group), self.b_enc[group]
        reads = self._scaled_reads(reads, group)
        step = self.n_features if weights[0].dtype == self.dtype else _FEATURES_AT_ONCE
        parts = []
        for begin in range(0, self.n_features, step):  # matrices of fewer bits are raised in pieces
            features = slice(begin, begin + step)
            pre_BF = functional.linear(reads[0], weights[0][features].to(self.dtype), bias_F[features])
            for weight_FD, x_BD in zip(weights[1:], reads[1:], strict=True):
                pre_BF = torch.addmm(pre_BF, x_BD, weight_FD[features].to(self.dtype).T)
            parts.append(pre_BF)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def encode(
        self,
        inputs: Mapping[Site, Tensor],
        *,
        positions: Int[Tensor, " B"] | None = None,
        keep: Bool[Tensor, " B"] | None = None,
    ) -> Features:
        """Active features of all groups; differentiable in the inputs and weights.

        Args:
            inputs: activations `[B, D]` of every read site.
            positions: position of each row in its prompt, by default 0 to B - 1; rows before `undecomposed_positions`
                have no features.
            keep: which rows have features, all by default; a choice over the whole batch (BatchTopK) does not see the others.

        Raises:
            ValueError: a site is missing, or its activations have another width, dtype, device or number of rows, or hold
                NaN or infinity; positions that are not one int64 number for each row.
        """
        if isinstance(self.activation, JointTopK):
            if keep is not None:
                return _of_kept_rows(self.encode, inputs, positions, keep)
            chosen = self._choose_jointly(self.activation, inputs, positions)
            parts = [self._features(inputs, group, *features) for group, features in enumerate(chosen)]
        else:
            parts = [self.encode_group(group, inputs, positions=positions, keep=keep) for group in range(self.n_groups)]
        return Features.concatenate(parts)

    def encode_group(
        self,
        group: int,
        inputs: Mapping[Site, Tensor],
        *,
        positions: Int[Tensor, " B"] | None = None,
        keep: Bool[Tensor, " B"] | None = None,
    ) -> Features:
        """Active features of one group, for running a model layer by layer; see `encode`.

        Raises:
            ValueError: besides, features that are chosen over all groups together (`JointTopK`).
        """
        self._check_chooses_by_group()
        if keep is not None:
            return _of_kept_rows(functools.partial(self.encode_group, group), inputs, positions, keep)
        return self._features(inputs, group, *self._choose(inputs, group, positions))

    def _check_chooses_by_group(self) -> None:
        if self.activation.chooses_over_groups:
            raise ValueError(
                f"this crosscoder chooses features over all layers together ({self.activation.name}): no layer's features are "
                "known without those of all others, so that a model can only be replaced with reads='clean'"
            )

    @torch.no_grad()
    def _choose(self, inputs: Mapping[Site, Tensor], group: int, positions_B: Tensor | None) -> Chosen:
        """Rows, indices and pre-activations of a group's active features, or candidates where all groups compete."""
        reads = self._check_finite_reads(inputs, group)
        row_S, index_S, pre_S = self._select(reads, group)
        if self.undecomposed_positions:
            position_S = row_S if positions_B is None else _checked(positions_B, len(reads[0]))[row_S]
            keep_S = position_S >= self.undecomposed_positions
            row_S, index_S, pre_S = row_S[keep_S], index_S[keep_S], pre_S[keep_S]
        self.release()  # a group's encoder is not needed again before the next prompt
        return row_S, index_S, pre_S

    @torch.no_grad()
    def _choose_jointly(
        self, activation: JointTopK, inputs: Mapping[Site, Tensor], positions_B: Tensor | None
    ) -> list[Chosen]:
        """The same for all groups, whose candidates compete; at most 2 k of every row are held at a time."""
        held: list[Tensor] = []  # columns: group, row, index, pre-activation, score
        for group in range(self.n_groups):
            row_S, index_S, pre_S = self._choose(inputs, group, positions_B)
            new = [torch.full_like(row_S, group), row_S, index_S, pre_S, self.scores(pre_S, group, index_S)]
            held = [torch.cat(pair) for pair in zip(held, new, strict=True)] if held else new
            keep_S = activation.keep(held[1], held[4])
            held = [column[keep_S] for column in held]
        counts = torch.bincount(held[0], minlength=self.n_groups).tolist()
        return list(zip(*(column.split(counts) for column in held[1:4]), strict=True))

    def _features(
        self, inputs: Mapping[Site, Tensor], group: int, row_S: Tensor, index_S: Tensor, pre_S: Tensor
    ) -> Features:
        """A group's chosen features with their activations, differentiable in inputs and weights."""
        pre_S = self.pre_activations_at(inputs, group, row_S, index_S, pre_S=pre_S)
        return self._table(group, row_S, index_S, pre_S, n_rows=len(self._reads(inputs, group)[0]))

    def _table(self, group: int, row_S: Tensor, index_S: Tensor, pre_S: Tensor, *, n_rows: int) -> Features:
        acts_S = self.activations(pre_S, group, index_S)
        # Only a training step moves the threshold; encoding without gradients does not.
        records = self.training and torch.is_grad_enabled()
        if records and isinstance(self.activation, BatchTopK) and self.threshold is not None:
            with torch.no_grad():
                self.threshold[group] = self.activation.next_threshold(self.threshold[group], acts_S)
        sizes = (n_rows, self.n_groups, self.n_features)
        return Features(torch.full_like(row_S, group), row_S, index_S, acts_S, *sizes)

    def select(self, pre_BF: Float[Tensor, "B F"], group: int) -> Selection:
        """The active features of a group with these pre-activations.

        Raises:
            ValueError: features that are chosen over all groups together (`JointTopK`).
        """
        self._check_chooses_by_group()
        return self._selection(pre_BF, group)

    def _selection(self, pre_BF: Tensor, group: int) -> Selection:
        threshold_F = None if self.threshold is None else self.threshold[group]
        return self.activation.select(self.scores(pre_BF, group), threshold_F, training=self.training, group=group)

    def scores(self, pre: Tensor, group: int, index_S: Int[Tensor, " S"] | None = None) -> Tensor:
        """What features of a group are chosen by: their pre-activations, times `score_factor` where there is one.

        Args:
            pre: pre-activations of all features, `[..., F]`, or of those at `index_S`.
        """
        if self.score_factor is None:
            return pre
        return pre * (self.score_factor[group] if index_S is None else self.score_factor[group][index_S])

    def activations(self, pre_S: Float[Tensor, " S"], group: int, index_S: Int[Tensor, " S"]) -> Float[Tensor, " S"]:
        """Activations of chosen features of a group from their pre-activations, differentiable."""
        threshold_S = None if self.threshold is None else self.threshold[group].expand(self.n_features)[index_S]
        acts_S = self.activation.values(pre_S, threshold_S)
        if self.post_scale is None or self.post_offset is None:
            return acts_S
        return torch.where(
            acts_S == 0, acts_S, acts_S * self.post_scale[group][index_S] + self.post_offset[group][index_S]
        )

    def _select(self, reads: list[Tensor], group: int) -> Chosen:
        """Rows, indices and pre-activations of a group's active features.

        Where the choice in each row depends on that row alone, rows are processed in chunks: pre-activations are read while
        they are still in a cache, and dense pre-activations `[B, F]` of all rows never exist.
        """
        n_rows = max(1, len(reads[0]))
        chunk = _ROWS_AT_ONCE * (1 if self.device.type == "cpu" else 16)
        by_row = self.activation.chooses_by_row or not self.training  # in use, BatchTopK has a fixed threshold
        step = chunk if by_row else n_rows
        parts = []
        for begin in range(0, n_rows, step):
            pre_CF = self._dense_pre_activations([x_BD[begin : begin + step] for x_BD in reads], group)
            row_S, index_S = self._selection(pre_CF, group)
            parts.append((row_S + begin, index_S, pre_CF[row_S, index_S]))
        row_S, index_S, pre_S = (torch.cat(column) for column in zip(*parts, strict=True))
        if pre_S.dtype != self.dtype:  # autocast: features were chosen in bfloat16; their values are computed again
            pattern = Pattern.of(row_S, index_S, n_rows)
            products = [
                dots(x_BD, w_FD.to(self.dtype), pattern) for x_BD, w_FD in zip(reads, self.encoders(group), strict=True)
            ]
            pre_S = sum(products, start=self.b_enc[group][index_S])
        return row_S, index_S, pre_S

    def pre_activations_at(
        self,
        inputs: Mapping[Site, Tensor],
        group: int,
        row_S: Int[Tensor, " S"],
        index_S: Int[Tensor, " S"],
        *,
        pre_S: Float[Tensor, " S"],
        positions: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " S"]:
        """Attach to chosen pre-activations their gradients to inputs and weights, without a dense backward pass.

        Args:
            row_S, index_S: chosen (row, feature index) pairs.
            pre_S: their values, taken from `pre_activations` without gradient; returned unchanged.
            positions: as for `pre_activations`.
        """
        bias_F: Tensor | None = self.b_enc[group]
        if not torch.is_grad_enabled():
            return pre_S
        reads = self._scaled_reads(self._reads(inputs, group), group)
        for weight_FD, x_BD in zip(self.encoders(group), reads, strict=True):
            pre_S = with_encoder_gradient(pre_S, x_BD, weight_FD, bias_F, row_S, index_S)
            bias_F = None
        return pre_S

    def _check_finite_reads(self, inputs: Mapping[Site, Tensor], group: int) -> list[Tensor]:
        """What a group reads: NaN exceeds no threshold, so that it would look like no features."""
        reads = self._reads(inputs, group)
        for site, x_BD in zip(self.wiring.reads[group], reads, strict=True):
            finite_values(f"the input at {site}", x_BD)
        return reads

    def _reads(self, inputs: Mapping[Site, Tensor], group: int) -> list[Tensor]:
        """Activations of the sites a group reads."""
        self._check_group(group)
        reads: list[Tensor] = []
        for site in self.wiring.reads[group]:
            if site not in inputs:
                raise ValueError(
                    f"group {group} reads {site}, but the inputs hold {', '.join(map(str, inputs)) or 'none'}"
                )
            x_BD = inputs[site]
            width, shape = self.wiring.width(site), tuple(x_BD.shape)
            if len(shape) != 2 or shape[1] != width:
                raise ValueError(f"the input at {site} must have shape [rows, {width}], got {list(shape)}")
            if reads and len(x_BD) != len(reads[0]):
                raise ValueError(f"the input at {site} has {len(x_BD)} rows, that of other sites {len(reads[0])}")
            self._check_kind(f"the input at {site}", x_BD)
            reads.append(x_BD)
        return reads

    def _scaled_reads(self, reads: list[Tensor], group: int) -> list[Tensor]:
        """What the stored encoders act on: the reads, scaled where weights stay in a file that expects it."""
        if self.in_file is None or not self.in_file.input_scale:
            return reads
        scales = [self.in_file.input_scale.get(site, 1.0) for site in self.wiring.reads[group]]
        return [x_BD if scale == 1.0 else x_BD * scale for scale, x_BD in zip(scales, reads, strict=True)]

    def _check_kind(self, name: str, values: Tensor) -> None:
        if values.dtype != self.dtype or values.device != self.device:
            raise ValueError(
                f"{name} holds {values.dtype} on {values.device}, the weights are {self.dtype} on {self.device}"
            )


def _checked(positions_B: Tensor, n_rows: int) -> Tensor:
    if positions_B.dtype != torch.int64 or positions_B.shape != (n_rows,):
        given = f"{positions_B.dtype} {list(positions_B.shape)}"
        raise ValueError(f"positions must be one torch.int64 number for each of {n_rows} rows, got {given}")
    return positions_B


def _of_kept_rows(
    encode: Callable[..., Features], inputs: Mapping[Site, Tensor], positions_B: Tensor | None, keep_B: Tensor
) -> Features:
    """The features of some rows, encoded without the others."""
    row_P = keep_B.nonzero()[:, 0]
    kept = {site: x_BD[row_P] for site, x_BD in inputs.items()}
    features = encode(kept, positions=row_P if positions_B is None else positions_B[row_P])
    return replace(features, row=row_P[features.row], n_rows=len(keep_B))
