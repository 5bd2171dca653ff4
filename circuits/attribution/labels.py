"""Readable names for features until an index of their examples exists: what they read and what they promote.

`reads`: tokens whose embeddings excite the feature most, along the one path that excites it most in this prompt: its own
token's stream, or one attention head. `promotes`: tokens whose logits the sum of its decoder vectors raises most, through the
final norm's weight. Both leave out what other features add, so a label is a hint, not a claim.

N features, T tokens, H heads, K d_head, X = H K, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.readers import read_vectors
from circuits.attribution.targets import LogitTarget
from circuits.graph.nodes import NodeKind
from replacement import Decomposition, LocalReplacement, ReplacementModel
from replacement.splicing.skip import read_depth

WORDS = 3
CHUNK = 256  # features compared with the vocabulary at once; bounds memory


def node_labels(
    model: ReplacementModel,
    local: LocalReplacement,
    logits: Sequence[LogitTarget],
    columns: Mapping[str, np.ndarray],
    kept: np.ndarray,
) -> list[str]:
    """Readable text of every kept node.

    Args:
        columns: the node table's `kind`, `part`, `layer` and `position` for all nodes.
        kept: bool[N].
    """
    lm = model.language_model
    strings = [text.strip() or repr(text) for text in lm.token_strings(local.frozen.tokens_T.tolist())]
    label = np.full(len(kept), "", dtype=object)
    of_kind = {kind: np.flatnonzero(columns["kind"] == kind) for kind in NodeKind}
    label[of_kind[NodeKind.TOKEN]] = strings
    label[of_kind[NodeKind.POSITION]] = [f"position {t}" for t in columns["position"][of_kind[NodeKind.POSITION]]]
    errors = of_kind[NodeKind.ERROR]
    parts = ["attention error" if part else "error" for part in columns["part"][errors]]
    label[errors] = [f"{part} in layer {layer}" for part, layer in zip(parts, columns["layer"][errors], strict=True)]
    label[of_kind[NodeKind.LOGIT]] = [one.label.strip() or repr(one.label) for one in logits]
    first = int(errors[-1]) + 1  # features follow errors
    for part in local.decompositions:
        labels, here = FeatureLabels(model, local, part), kept[first : first + len(part.features)]
        for group in range(part.crosscoder.n_groups):
            own = np.flatnonzero((part.features.group.cpu().numpy() == group) & here)
            if len(own):
                chosen = torch.from_numpy(own)
                label[first + own] = labels.labels(group, part.features.index[chosen], part.features.row[chosen])
        first += len(part.features)
    return label[kept].tolist()


class FeatureLabels:
    """Labels the active features of one prompt: `reads → promotes`, the top tokens of each side."""

    def __init__(self, model: ReplacementModel, local: LocalReplacement, part: Decomposition) -> None:
        """Labels of the features of one part: of the MLPs' or of attention's crosscoder."""
        parts = model.language_model.parts
        self._lm, self._local, self._part = model.language_model, local, part
        embedding_VD = parts.bridge.W_E.detach()
        embedding_VD = embedding_VD - embedding_VD.mean(0)
        self._embedding_VD = embedding_VD / embedding_VD.norm(dim=1, keepdim=True).clamp(min=1e-9)
        unembedding_DV = parts.norm_weights("ln_final").weight_D[:, None] * local.W_U
        self._unembedding_DV = unembedding_DV - unembedding_DV.mean(1, keepdim=True)
        self._streams = local.streams()
        self._special = sorted(set(getattr(self._lm.tokenizer, "all_special_ids", None) or ()))

    def labels(self, group: int, index_N: Tensor, position_N: Tensor) -> list[str]:
        """One label per active feature of a group."""
        crosscoder = self._part.crosscoder
        found = []
        for index, position in zip(index_N.split(CHUNK), position_N.split(CHUNK), strict=True):
            writes = crosscoder.wiring.writes[group]
            written_ND = torch.stack([crosscoder.decoder_vectors(group, index, site) for site in writes]).sum(0)
            read = self._top(self._strongest_read(group, index, position) @ self._embedding_VD.T)
            promoted = self._top(written_ND @ self._unembedding_DV)
            found += [f"{left} → {right}" for left, right in zip(read, promoted, strict=True)]
        return found

    def _strongest_read(self, group: int, index_N: Tensor, position_N: Tensor) -> Tensor:
        """Vectors `[N, D]` read from embeddings along the one path that excites each feature most."""
        crosscoder = self._part.crosscoder
        reads = crosscoder.wiring.reads[group]
        if self._part.kind == "attn_out":
            (site,) = reads
            return self._strongest_head(site.layer, crosscoder.encoder(group, site)[index_N], position_N)[1]
        best_ND = torch.stack([read_vectors(self._local, group, site, index_N, position_N)[0] for site in reads]).sum(0)
        v_ND = best_ND
        best_N = (v_ND * self._streams[0][position_N]).sum(-1)
        depth = max(read_depth(site, self._local.shape) for site in reads)
        for layer in range((depth + 1) // 2):  # attention layers below the point where the feature reads
            u_NX = v_ND @ self._local.frozen.attentions[layer].weights.W_O_XD.T
            score_N, pulled_ND = self._strongest_head(layer, u_NX, position_N)
            better = score_N > best_N
            best_N, best_ND = torch.where(better, score_N, best_N), torch.where(better[:, None], pulled_ND, best_ND)
        return best_ND

    def _strongest_head(self, layer: int, u_NX: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of vectors that read all heads of a layer: the largest head's part `[N]`, and what it reads, `[N, D]`."""
        attention = self._local.frozen.attentions[layer]
        weights = attention.weights
        u_NHK = u_NX.unflatten(1, (weights.n_heads, -1))
        z_THK = (self._streams[layer] @ weights.W_V_XD.T).unflatten(1, (weights.n_heads, -1))
        kernel_NHT = attention.kernel_HTT[:, position_N].transpose(0, 1)
        excitement_NH = (torch.einsum("nhk,thk->nht", u_NHK, z_THK) * kernel_NHT).sum(-1)
        score_N, head_N = excitement_NH.max(1)
        W_V_HKD = weights.W_V_XD.unflatten(0, (weights.n_heads, -1))
        own_NK = u_NHK[torch.arange(len(u_NX), device=head_N.device), head_N]
        return score_N, torch.einsum("nk,nkd->nd", own_NK, W_V_HKD[head_N])

    def _top(self, scores_NV: Tensor) -> list[str]:
        scores_NV[:, self._special] = -torch.inf
        top_NK = scores_NV.topk(min(WORDS, scores_NV.shape[1]), dim=1).indices
        return [", ".join(self._words(row)) for row in top_NK.tolist()]

    def _words(self, token_ids: Iterable[int]) -> list[str]:
        return [text.strip() or repr(text) for text in self._lm.token_strings(token_ids)]
