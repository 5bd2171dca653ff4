"""The source vectors of one prompt: everything that writes to the residual stream, laid out for long matrix products.

T tokens, L layers, D d_model, S active features, C source columns.

Columns are those of `circuits.attribution.columns`: features by (layer, position, index). Inside `LayerSources` they are
grouped by position instead, so that the features of one position that write one layer are contiguous, already multiplied
by their activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution.columns import Columns
from replacement import Decomposition, LocalReplacement, Site


@dataclass(frozen=True, slots=True)
class LayerSources:
    """What one part (MLP or attention) of one layer writes: per token position one error term and its features."""

    vectors_SD: Float[Tensor, "S D"]
    """Error and `activation * W_dec` rows, position after position."""
    offsets: tuple[int, ...]
    """T + 1 numbers: rows `offsets[t]:offsets[t + 1]` belong to position t."""
    columns_S: Int[Tensor, " S"]
    """Source column of every row."""


@dataclass(frozen=True, slots=True)
class PartSources:
    """What the MLPs, or the attention layers, write."""

    layers: tuple[LayerSources, ...]
    bias_LD: Float[Tensor, "L D"]
    """Decoder bias that each layer writes at every token."""


@dataclass(frozen=True, slots=True)
class Sources:
    """All sources of one prompt."""

    columns: Columns
    mlp: PartSources
    attention: PartSources | None
    """None where attention is linear."""

    @classmethod
    def of(cls, local: LocalReplacement) -> Sources:
        """Gather the decoder rows of the active features, once per prompt."""
        columns = Columns.of(local)
        parts = [_part_sources(part, columns, number) for number, part in enumerate(local.decompositions)]
        return cls(columns=columns, mlp=parts[0], attention=parts[1] if len(parts) > 1 else None)


def _part_sources(part: Decomposition, columns: Columns, number: int) -> PartSources:
    first_error, first_feature = columns.error_columns[number], columns.feature_columns[number]
    bias_LD = part.errors_LTD.new_zeros(part.errors_LTD.shape[0], part.errors_LTD.shape[2])
    for site in part.crosscoder.wiring.write_sites:
        bias_LD[site.layer] = part.crosscoder.decoder_bias(site)
    layers = range(len(part.errors_LTD))
    return PartSources(tuple(_layer_sources(part, layer, first_error, first_feature) for layer in layers), bias_LD)


def _layer_sources(part: Decomposition, layer: int, first_error: int, first_feature: int) -> LayerSources:
    crosscoder, site, error_TD = part.crosscoder, Site(layer, part.kind), part.errors_LTD[layer]
    T, device = len(error_TD), error_TD.device
    positions_T = torch.arange(T, device=device)
    vectors, rows, columns = [error_TD], [positions_T], [first_error + layer * T + positions_T]
    for group in crosscoder.wiring.writers(site):
        active = part.features.of(group)
        first = first_feature + int(torch.searchsorted(part.features.group, group))
        vectors.append(crosscoder.decoder_vectors(group, active.index, site) * active.activation[:, None])
        rows.append(active.row)
        columns.append(first + torch.arange(len(active), device=device))
    row_S = torch.cat(rows)
    order_S = torch.argsort(row_S, stable=True)
    counts = torch.bincount(row_S, minlength=T)
    return LayerSources(
        vectors_SD=torch.cat(vectors)[order_S],
        offsets=(0, *torch.cumsum(counts, 0).tolist()),
        columns_S=torch.cat(columns)[order_S],
    )
