"""Where features fire: a batch of rows and its active features as columns; no dense activations of all features exist."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.data.documents import special_id, special_ids
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.replacement_model import ReplacementModel

TOKENS_PER_PASS = 8192
"""Tokens of one forward pass; bounds memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Firings:
    """The features that fire in a batch of rows: those whose activation is above 0 at a token that counts.

    Columns have one entry for every firing S, sorted by (layer, row, position, index).
    """

    tokens_RT: np.ndarray
    """Token ids, int64."""
    counted_RT: np.ndarray
    """Bool: tokens that count. Special tokens and undecomposed positions, which crosscoders are not trained on, do not."""
    layer: np.ndarray
    """Layer of the feature, int64."""
    index: np.ndarray
    """Its index in the layer, int64."""
    row: np.ndarray
    """Row of the batch, int64."""
    position: np.ndarray
    """Position in the row, int64."""
    activation: np.ndarray
    """Above 0, float32."""

    def __len__(self) -> int:
        return len(self.activation)

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.counted_RT.sum())


def firings_of(model: ReplacementModel, rows: Tensor | np.ndarray, *, part: str = "mlp") -> Firings:
    """Where features fire when the original model reads some rows.

    Negative activations, which some activation functions allow, count as no firing.

    Args:
        rows: token ids `[R, T]`; they run a few thousand tokens at a time.
        part: the crosscoder whose features are meant, `mlp` or `attention`.

    Raises:
        ValueError: rows that the model cannot read, or a part without a crosscoder.
    """
    lm, crosscoder = model.language_model, crosscoder_of(model, part)
    tokens_RT = lm.batch(torch.as_tensor(rows))
    n_rows, context = tokens_RT.shape
    counted_RT = counted_tokens(lm, tokens_RT.cpu(), undecomposed_positions=crosscoder.undecomposed_positions)
    sites = crosscoder.wiring.read_sites
    columns: list[list[Tensor]] = []
    rows_per_pass = max(1, TOKENS_PER_PASS // context)
    with torch.no_grad():
        for first in range(0, n_rows, rows_per_pass):
            tokens_BT = tokens_RT[first : first + rows_per_pass]
            positions_P = torch.arange(context, device=tokens_BT.device).repeat(len(tokens_BT))
            inputs = {site: x_BTD.flatten(0, 1) for site, x_BTD in lm.read(tokens_BT, sites).items()}
            features = crosscoder.encode(inputs, positions=positions_P)
            group_S, place_S, index_S, acts_S = (
                column.cpu() for column in (features.group, features.row, features.index, features.activation)
            )
            place_S = place_S + first * context
            kept_S = (acts_S > 0) & counted_RT.flatten()[place_S]
            columns.append([column[kept_S] for column in (group_S, place_S, index_S, acts_S.float())])
    group_S, place_S, index_S, acts_S = (torch.cat(parts) for parts in zip(*columns, strict=True))
    if len(columns) > 1:  # each pass is sorted by (group, place, index)
        group_S, order_S = group_S.sort(stable=True)
        place_S, index_S, acts_S = (x_S[order_S] for x_S in (place_S, index_S, acts_S))
    layer_G = np.array([crosscoder.wiring.group_layer(group) for group in range(crosscoder.n_groups)])
    row_S, position_S = np.divmod(place_S.numpy(), context)
    tokens_RT, layer_S = tokens_RT.cpu(), layer_G[group_S.numpy()]
    return Firings(tokens_RT.numpy(), counted_RT.numpy(), layer_S, index_S.numpy(), row_S, position_S, acts_S.numpy())


def crosscoder_of(model: ReplacementModel, part: str) -> Crosscoder:
    """The crosscoder of a part.

    Raises:
        ValueError: there is none.
    """
    if part not in model.crosscoders:
        raise ValueError(f"part: expected {' or '.join(map(repr, model.crosscoders))}, got {part!r:.50}")
    return model.crosscoders[part]


def counted_tokens(lm: LanguageModel, tokens_RT: Tensor, *, undecomposed_positions: int = 0) -> Tensor:
    """Bool `[R, T]`: all tokens but special ones and undecomposed positions; a beginning-of-sequence token in front of a row
    counts where its position is decomposed, as in training."""
    counted_RT = ~torch.isin(tokens_RT, torch.tensor(sorted(special_ids(lm)), dtype=torch.int64))
    if undecomposed_positions:
        counted_RT[:, :undecomposed_positions] = False
    elif lm.tokenizer is not None:
        bos = special_id(lm.tokenizer, "bos", vocabulary_size=lm.vocabulary_size)
        if bos is not None:
            counted_RT[:, 0] |= tokens_RT[:, 0] == bos
    return counted_RT
