"""The source vectors of one prompt: everything that writes to the residual stream, laid out for batched matrix products.

Columns are those of `circuits.attribution.columns`: features by (layer, position, index). Inside `LayerSources` they are
grouped by position instead, already multiplied by their activations, and positions with equally many sources lie side by side:
the inner products of all targets with all of these are one batched product.

A source row is D numbers for every layer that a feature writes, so a cross-layer crosscoder on a long prompt has gigabytes of
them. They are gathered layer by layer from the decoder rows of the active features alone; what exceeds the budget is
gathered again each time it is met, which costs little beside the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.columns import Columns
from replacement import Decomposition, LocalReplacement, Site

BUDGET = 5 * 2**28
"""Bytes of source rows that stay in memory while a prompt is traced."""


@dataclass(frozen=True, slots=True)
class PositionBlock:
    """Positions with equally many sources, in `LayerSources`."""

    positions_P: Int[Tensor, " P"]
    """Rising."""
    first: int
    """Row of the first source of the first position; the others follow without gaps."""
    n_sources: int
    """Sources of every position."""


@dataclass(frozen=True, slots=True)
class LayerSources:
    """What one part (MLP or attention) of one layer writes: per token position one error term and its features."""

    vectors_SD: Float[Tensor, "S D"]
    """Error and `activation * W_dec` rows, position after position, block after block."""
    columns_S: Int[Tensor, " S"]
    """Source column of every row."""
    blocks: tuple[PositionBlock, ...]

    @classmethod
    def gather(
        cls, part: Decomposition, columns: Columns, number: int, layer: int, chosen_S: Tensor | None = None
    ) -> LayerSources:
        """Read the error terms and decoder rows of one layer.

        Args:
            part: whose outputs are decomposed.
            columns: the numbering of all sources.
            number: place of the part among the decompositions.
            layer: the layer that is written.
            chosen_S: numbers into `part.features`, rising, of the features wanted; all by default.
        """
        site, error_TD = Site(layer, part.kind), part.errors_LTD[layer]
        (T, D), device = error_TD.shape, error_TD.device
        positions_T = torch.arange(T, device=device)
        pieces = [(-1, positions_T[:0], positions_T)]  # group, numbers of features, positions; the error terms first
        for group in part.crosscoder.wiring.writers(site):
            begin, end = torch.searchsorted(
                part.features.group, part.features.group.new_tensor([group, group + 1])
            ).tolist()
            numbers_S = torch.arange(begin, end, device=device)
            if chosen_S is not None:
                numbers_S = chosen_S[(chosen_S >= begin) & (chosen_S < end)]
            pieces.append((group, numbers_S, part.features.row[numbers_S]))
        position_S = torch.cat([position for _, _, position in pieces])
        counts_T = torch.bincount(position_S, minlength=T)
        order_S = torch.argsort(counts_T[position_S] * T + position_S, stable=True)
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(len(order_S), device=device)
        vectors_SD = error_TD.new_empty(len(order_S), D)
        columns_S = torch.empty_like(order_S)
        start = 0
        for group, numbers_S, position in pieces:  # written to their places one group at a time, without a second copy
            place = place_S[start : start + len(position)]
            if group < 0:
                vectors_SD[place], columns_S[place] = error_TD, columns.error_columns[number] + layer * T + positions_T
            else:
                rows = part.crosscoder.decoder_vectors(group, part.features.index[numbers_S], site)
                vectors_SD[place] = rows * part.features.activation[numbers_S, None]
                columns_S[place] = columns.feature_columns[number] + numbers_S
            start += len(position)
        return cls(vectors_SD, columns_S, tuple(_blocks(counts_T)))

    def products(
        self, block: PositionBlock, v_PND: Float[Tensor, "P N D"], place_P: Tensor | None = None
    ) -> tuple[Float[Tensor, "P S N"], Int[Tensor, "P S"]]:
        """Inner products of N vectors at each of P positions with the sources there, and the columns of these sources.

        Args:
            block: positions with equally many sources.
            v_PND: the vectors, position by position.
            place_P: places of their positions in the block; the first P of it by default.
        """
        rows = slice(block.first, block.first + len(block.positions_P) * block.n_sources)
        chosen = slice(len(v_PND)) if place_P is None else place_P
        vectors_PSD = self.vectors_SD[rows].unflatten(0, (-1, block.n_sources))[chosen]
        columns_PS = self.columns_S[rows].view(-1, block.n_sources)[chosen]
        return vectors_PSD @ v_PND.transpose(1, 2), columns_PS


def _blocks(counts_T: Tensor) -> Iterator[PositionBlock]:
    """Positions by their number of sources, fewest first."""
    first = 0
    for count in torch.unique(counts_T).tolist():
        positions_P = torch.nonzero(counts_T == count)[:, 0]
        yield PositionBlock(positions_P, first, count)
        first += len(positions_P) * count


class Sources:
    """All sources of one prompt."""

    def __init__(self, local: LocalReplacement, *, budget: int = BUDGET) -> None:
        """Number the sources; the decoder rows are read when they are first met.

        Args:
            local: the prompt's local replacement model.
            budget: bytes of source rows to keep in memory.
        """
        self.columns = Columns.of(local)
        self.parts = local.decompositions
        self._kept: dict[tuple[int, int], LayerSources] = {}
        self._room = budget

    def written(self, number: int, layer: int) -> LayerSources:
        """What the MLP (part 0) or attention (part 1) of a layer writes."""
        if (number, layer) in self._kept:
            return self._kept[number, layer]
        sources = LayerSources.gather(self.parts[number], self.columns, number, layer)
        size = sources.vectors_SD.nbytes + sources.columns_S.nbytes
        if size <= self._room:
            self._kept[number, layer] = sources
            self._room -= size
        return sources

    def bias(self, number: int) -> Float[Tensor, "L D"]:
        """Decoder bias that each layer's MLP (part 0) or attention (part 1) writes at every token."""
        part = self.parts[number]
        bias_LD = part.errors_LTD.new_zeros(part.errors_LTD.shape[0], part.errors_LTD.shape[2])
        for site in part.crosscoder.wiring.write_sites:
            bias_LD[site.layer] = part.crosscoder.decoder_bias(site)
        return bias_LD
