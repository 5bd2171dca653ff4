"""The source vectors of one prompt: everything that writes to the residual stream, laid out for long matrix products.

T tokens, L layers, D d_model, S active features, C source columns.

Columns follow the node table: tokens, learned positions, errors by (layer, position), features by (layer, position,
index). Inside `LayerSources` features are grouped by position instead, so that all features of one position that write
one layer are a contiguous block, already multiplied by their activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement import LocalReplacement, Site


@dataclass(frozen=True, slots=True)
class LayerSources:
    """What the MLP position of one layer writes: per token position one error term and its features."""

    vectors_SD: Float[Tensor, "S D"]
    """Error and `activation * W_dec` rows, position after position."""
    offsets: tuple[int, ...]
    """T + 1 numbers: rows `offsets[t]:offsets[t + 1]` belong to position t."""
    columns_S: Int[Tensor, " S"]
    """Source column of every row."""


@dataclass(frozen=True, slots=True)
class Sources:
    """All sources of one prompt.

    Columns: `token_column + t`, `position_column + t` (only with learned positions), `error_column + l T + t`, and
    `feature_column + i` for the i-th feature of `local.features`.
    """

    layers: tuple[LayerSources, ...]
    n_columns: int
    error_column: int
    feature_column: int
    bias_LD: Float[Tensor, "L D"]
    """Decoder bias that each layer's MLP position writes at every token."""

    @classmethod
    def of(cls, local: LocalReplacement) -> Sources:
        """Gather the decoder rows of the active features, once per prompt."""
        T, L = local.n_positions, local.shape.n_layers
        error_column = T if local.frozen.position_embedding_TD is None else 2 * T
        feature_column = error_column + L * T
        crosscoder = local.crosscoder
        bias_LD = local.errors_LTD.new_zeros(L, local.shape.d_model)
        for site in crosscoder.wiring.write_sites:
            bias_LD[site.layer] = crosscoder.decoder_bias(site)
        return cls(
            layers=tuple(_layer_sources(local, layer, error_column, feature_column) for layer in range(L)),
            n_columns=feature_column + len(local.features),
            error_column=error_column,
            feature_column=feature_column,
            bias_LD=bias_LD,
        )


def _layer_sources(local: LocalReplacement, layer: int, error_column: int, feature_column: int) -> LayerSources:
    T, crosscoder, site = local.n_positions, local.crosscoder, Site(layer, "mlp_out")
    device = local.errors_LTD.device
    positions_T = torch.arange(T, device=device)
    vectors, rows, columns = [local.errors_LTD[layer]], [positions_T], [error_column + layer * T + positions_T]
    for group in range(crosscoder.n_groups):
        if site not in crosscoder.wiring.writes[group]:
            continue
        active = local.features.of(group)
        first = int(torch.searchsorted(local.features.group, group))
        vectors.append(crosscoder.decoder_vectors(group, active.index, site) * active.activation[:, None])
        rows.append(active.row)
        columns.append(feature_column + first + torch.arange(len(active), device=device))
    row_S = torch.cat(rows)
    order_S = torch.argsort(row_S, stable=True)
    counts = torch.bincount(row_S, minlength=T)
    return LayerSources(
        vectors_SD=torch.cat(vectors)[order_S],
        offsets=(0, *torch.cumsum(counts, 0).tolist()),
        columns_S=torch.cat(columns)[order_S],
    )
