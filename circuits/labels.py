"""Readable names for features until an index of their examples exists: what they read and what they promote.

`reads`: tokens whose embeddings excite the feature most, along the one path that excites it most in this prompt: its own
token's stream, or one attention head. `promotes`: tokens whose logits the sum of its decoder vectors raises most, through the
final norm's weight. Both leave out what other features add, so a label is a hint, not a claim.

N features, T tokens, H heads, K d_head, X = H K, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from circuits.transport import read_depth, read_vectors
from replacement import LocalReplacement, ReplacementModel

WORDS = 3
CHUNK = 256  # features compared with the vocabulary at once; bounds memory


class FeatureLabels:
    """Labels the active features of one prompt: `reads → promotes`, the top tokens of each side."""

    def __init__(self, model: ReplacementModel, local: LocalReplacement) -> None:
        parts = model.language_model.parts
        self._lm, self._local, self._crosscoder = model.language_model, local, model.crosscoder
        embedding_VD = parts.bridge.W_E.detach()
        embedding_VD = embedding_VD - embedding_VD.mean(0)
        self._embedding_VD = embedding_VD / embedding_VD.norm(dim=1, keepdim=True).clamp(min=1e-9)
        unembedding_DV = parts.norm_weights("ln_final").weight_D[:, None] * local.W_U
        self._unembedding_DV = unembedding_DV - unembedding_DV.mean(1, keepdim=True)
        self._streams = _streams(local)
        self._special = sorted(set(getattr(self._lm.tokenizer, "all_special_ids", None) or ()))

    def labels(self, group: int, index_N: Tensor, position_N: Tensor) -> list[str]:
        """One label per active feature of a group."""
        crosscoder = self._crosscoder
        reads, writes = crosscoder.wiring.reads[group], crosscoder.wiring.writes[group]
        depth = max(read_depth(site, self._local.shape) for site in reads)
        found = []
        for index, position in zip(index_N.split(CHUNK), position_N.split(CHUNK), strict=True):
            read_ND = torch.stack([read_vectors(self._local, group, site, index, position)[0] for site in reads]).sum(0)
            written_ND = torch.stack([crosscoder.decoder_vectors(group, index, site) for site in writes]).sum(0)
            read = self._top(self._strongest_path(read_ND, position, depth) @ self._embedding_VD.T)
            promoted = self._top(written_ND @ self._unembedding_DV)
            found += [f"{left} → {right}" for left, right in zip(read, promoted, strict=True)]
        return found

    def _strongest_path(self, v_ND: Tensor, position_N: Tensor, depth: int) -> Tensor:
        """Vectors read, or their pull-back through the one head that excites the feature more than its own token."""
        embedding_TD = self._streams[0]
        best_N, best_ND = (v_ND * embedding_TD[position_N]).sum(-1), v_ND.clone()
        for layer in range((depth + 1) // 2):  # attention layers below the point where the feature reads
            attention = self._local.frozen.attentions[layer]
            weights = attention.weights
            u_NHK = (v_ND @ weights.W_O_XD.T).unflatten(1, (weights.n_heads, -1))
            z_THK = (self._streams[layer] @ weights.W_V_XD.T).unflatten(1, (weights.n_heads, -1))
            kernel_NHT = attention.kernel_HTT[:, position_N].transpose(0, 1)
            excitement_NH = (torch.einsum("nhk,thk->nht", u_NHK, z_THK) * kernel_NHT).sum(-1)
            score_N, head_N = excitement_NH.max(1)
            W_V_HKD = weights.W_V_XD.unflatten(0, (weights.n_heads, -1))
            pulled_ND = torch.einsum(
                "nk,nkd->nd", u_NHK[torch.arange(len(v_ND), device=head_N.device), head_N], W_V_HKD[head_N]
            )
            better = score_N > best_N
            best_N, best_ND = torch.where(better, score_N, best_N), torch.where(better[:, None], pulled_ND, best_ND)
        return best_ND

    def _top(self, scores_NV: Tensor) -> list[str]:
        scores_NV[:, self._special] = -torch.inf
        top_NK = scores_NV.topk(min(WORDS, scores_NV.shape[1]), dim=1).indices
        return [", ".join(self._words(row)) for row in top_NK.tolist()]

    def _words(self, token_ids: Iterable[int]) -> list[str]:
        return [text.strip() or repr(text) for text in self._lm.token_strings(token_ids)]


def _streams(local: LocalReplacement) -> list[Tensor]:
    """Residual stream `[T, D]` in front of every layer's attention."""
    frozen = local.frozen
    x_TD = frozen.token_embedding_TD
    if frozen.position_embedding_TD is not None:
        x_TD = x_TD + frozen.position_embedding_TD
    streams = []
    for attention, mlp_TD in zip(frozen.attentions, local.mlp_outputs(), strict=True):
        streams.append(x_TD)
        x_TD = x_TD + attention.apply(x_TD) + mlp_TD
    return streams
