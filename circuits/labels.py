"""Readable names for features until an index of their examples exists: what they read and what they promote.

A feature's encoder is compared with the token embeddings, and the sum of its decoder vectors, through the final norm's
weight, with the unembedding. Direct comparison ignores what attention brings, so a label is a hint, not a claim.

F features, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from replacement import LocalReplacement, ReplacementModel

WORDS = 3


class FeatureLabels:
    """Labels features of one replacement model: `reads → promotes`, the top tokens of each side."""

    def __init__(self, model: ReplacementModel, local: LocalReplacement) -> None:
        lm = model.language_model
        self._lm = lm
        self._crosscoder = model.crosscoder
        parts = lm.parts
        embedding_VD = parts.bridge.W_E.detach()
        embedding_VD = embedding_VD - embedding_VD.mean(0)
        self._embedding_VD = embedding_VD / embedding_VD.norm(dim=1, keepdim=True).clamp(min=1e-9)
        unembedding_DV = parts.norm_weights("ln_final").weight_D[:, None] * local.W_U
        self._unembedding_DV = unembedding_DV - unembedding_DV.mean(1, keepdim=True)
        self._special = set(getattr(lm.tokenizer, "all_special_ids", None) or ())

    def labels(self, group: int, index_S: Tensor) -> list[str]:
        """One label per feature of a group."""
        crosscoder = self._crosscoder
        reads_SD = sum(crosscoder.encoder(group, site)[index_S] for site in crosscoder.wiring.reads[group])
        writes_SD = sum(crosscoder.decoder_vectors(group, index_S, site) for site in crosscoder.wiring.writes[group])
        read = self._top(reads_SD @ self._embedding_VD.T)
        promoted = self._top(writes_SD @ self._unembedding_DV)
        return [f"{left} → {right}" for left, right in zip(read, promoted, strict=True)]

    def _top(self, scores_SV: Tensor) -> list[str]:
        if self._special:
            scores_SV[:, sorted(self._special)] = -torch.inf
        top_SK = scores_SV.topk(min(WORDS, scores_SV.shape[1]), dim=1).indices
        return [", ".join(self._words(row)) for row in top_SK.tolist()]

    def _words(self, token_ids: Iterable[int]) -> list[str]:
        return [text.strip() or repr(text) for text in self._lm.token_strings(token_ids)]
