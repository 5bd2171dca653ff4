"""What a feature's weights say of tokens, whatever the text: those it promotes, suppresses and reads.

    promoted, suppressed    (centre(sum_w W_dec[w]) * gain_final) . (W_U[:, t] - mean W_U)
    read                    v . e_t,                  v = sum_r W_enc[r] pulled back through the norm in front of r
    read through a head     (v W_O^T W_V) . e_t,      both norms of the attention layer folded in

The first is the logit above the mean logit that one unit of activation adds, times the scale of the final norm, which
depends on the text. e_t is the embedding of token t less the mean embedding, scaled to root mean square 1 as a norm would do,
so that the lengths of embeddings do not matter; learned positions are left out. The other two are then pre-activations: of a
feature that reads e_t alone, and of one that reads what a head writes which attends to e_t alone.

Of all heads below the point where the feature reads, the one is kept whose `n_tokens` largest scores have the largest mean.
Comparing every head with the vocabulary would take hours in a model of 30 layers: only the `HEADS_TRIED` heads with the
largest root mean square score over the vocabulary, `sqrt(u C u)` with the second moment C of e_t, are compared. In a model of
30 layers, for directions that its own MLPs read, these held the best head in all cases in layer 12 and in 85 % in layer 29, and
98 % of its score on average; 270,000 features of that model take half an hour on one core. A norm behind attention divides by
its typical scale (`_output_scale`).

All of this is a hint, not a measurement: paths through MLPs, other features and two or more heads are left out, the stream of
a later layer is more than an embedding, and models that assemble words from pieces read little from embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.index.records import TokenEffects, TokenWeight
from replacement.language_model.frozen_layers import AttentionWeights, FrozenNorm
from replacement.language_model.language_model import LanguageModel
from replacement.language_model.sixteen_bits import Unembedding
from replacement.number_checks import whole_number
from replacement.splicing.skip import read_depth, read_norm

CHUNK = 256
"""Features compared with the vocabulary at once; bounds memory."""
HEADS_TRIED = 4
_ADDED = ("mlp_out", "mlp_difference", "attn_out")
_IN_FRONT_OF_ATTENTION = ("attn_in", "attn_normalized")
_STREAM = ("resid_pre", "resid_mid", "resid_post")


class Vocabulary:
    """The tokens of a language model as directions that vectors of the residual stream read or promote."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self.unembedding = lm.parts.unembedding()
        self._embedding = Unembedding(lm.parts.bridge.W_E.detach().T, None)
        self._mean_D = mean_D = self._embedding.mean()[0]
        square_V = self._embedding.square_norms() - 2 * self._embedding.scores(mean_D) + mean_D.square().sum()
        size_V = (square_V.clamp(min=0) / len(mean_D)).sqrt()
        self._size_V = size_V.clamp(
            min=1e-3 * float(size_V.max())
        )  # what differs from the mean by rounding reads nothing
        self._gain_final = lm.parts.norm_weights("ln_final").freeze(torch.ones_like(mean_D[:1]))
        named = size_V.numel() if lm.tokenizer is None else len(lm.tokenizer)
        special = set(getattr(lm.tokenizer, "all_special_ids", None) or ()) | set(range(named, size_V.numel()))
        self._special = sorted(token for token in special if 0 <= token < size_V.numel())
        self._texts: dict[int, str] = {}

    def read(self, vectors_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """What vectors read of every centred embedding of root mean square 1."""
        return (self._embedding.scores(vectors_ND) - (vectors_ND @ self._mean_D)[:, None]) / self._size_V

    def promoted(self, vectors_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """What vectors in front of the final norm, with scale 1, add to every logit, less what they add to the mean logit."""
        normed_ND = self._gain_final.apply(vectors_ND) - self._gain_final.bias_D
        scores_NV = self.unembedding.scores(normed_ND)
        return scores_NV - scores_NV.mean(1, keepdim=True)

    def strongest(
        self, scores_NV: Float[Tensor, "N V"], n_tokens: int, *, lowest: bool = False
    ) -> list[tuple[TokenWeight, ...]]:
        """For every row the tokens of the largest (or lowest) scores; special and unnamed ones are left out."""
        scores_NV = scores_NV.clone()
        scores_NV[:, self._special] = math.inf if lowest else -math.inf
        n_tokens = min(n_tokens, scores_NV.shape[1] - len(self._special))
        best = scores_NV.topk(n_tokens, dim=1, largest=not lowest)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [tuple((self.text(token), score) for token, score in zip(*row, strict=True)) for row in rows]

    def text(self, token: int) -> str:
        """A token's text."""
        if token not in self._texts:
            self._texts[token] = self._lm.token_strings([token])[0]
        return self._texts[token]

    @cached_property
    def second_moment(self) -> Float[Tensor, "D D"]:
        """Mean outer product of the centred embeddings of root mean square 1."""
        total_DD = torch.zeros(
            len(self._mean_D), len(self._mean_D), dtype=self._mean_D.dtype, device=self._mean_D.device
        )
        W_E_VD = self._embedding.stored_DV.T
        for token_V in torch.arange(len(W_E_VD), device=W_E_VD.device).split(4096):
            e_VD = (W_E_VD[token_V].to(total_DD.dtype) - self._mean_D) / self._size_V[token_V, None]
            total_DD += e_VD.T @ e_VD
        return total_DD / len(W_E_VD)


class FeatureWeights:
    """The weights of a crosscoder's features beside those of its language model.

    Args:
        lm: the language model.
        crosscoder: of that model; may stay in its file.
        n_tokens: tokens to keep of every kind.

    >>> FeatureWeights(lm, crosscoder).effects(2, torch.tensor([345]))[0].promoted   # doctest: +SKIP
    """

    def __init__(self, lm: LanguageModel, crosscoder: Crosscoder, *, n_tokens: int = 10) -> None:
        self.n_tokens = whole_number("n_tokens", n_tokens, least=1)
        self.crosscoder, self.vocabulary = crosscoder, Vocabulary(lm)
        self._lm, parts = lm, lm.parts
        one = torch.ones(1, dtype=parts.exact_dtype, device=lm.device)
        layers = range(lm.shape.n_layers)
        self._norms_mlp, self._norms_attention = (
            [parts.norm_weights(parts.norm_before(layer, part)).freeze(one) for layer in layers]
            for part in ("mlp", "attention")
        )
        self._moments: dict[int, Tensor] = {}

    @torch.no_grad()
    def effects(self, group: int, index_N: Int[Tensor, " N"]) -> list[TokenEffects]:
        """What features of a group promote, suppress and read; memory grows with `CHUNK`, not with their number.

        Sites that are not on the residual stream's path to the logits (or from the embeddings) give empty lists.
        """
        return [effects for chunk_N in index_N.split(CHUNK) for effects in self._chunk(group, chunk_N)]

    def _chunk(self, group: int, index_N: Tensor) -> list[TokenEffects]:
        vocabulary, n_tokens, n = self.vocabulary, self.n_tokens, len(index_N)
        promoted = suppressed = read = through = [()] * n  # type: list[tuple[TokenWeight, ...]]
        heads: list[tuple[int, int] | None] = [None] * n
        if (written_ND := self._written(group, index_N)) is not None:
            scores_NV = vocabulary.promoted(written_ND)
            promoted = vocabulary.strongest(scores_NV, n_tokens)
            suppressed = vocabulary.strongest(scores_NV, n_tokens, lowest=True)
        reads = self._stream_reads(group, index_N)
        if reads:
            read = vocabulary.strongest(vocabulary.read(torch.stack([v_ND for _, v_ND in reads]).sum(0)), n_tokens)
        if readings := self._head_reads(group, index_N, reads):
            through, heads = self._best_heads(readings)
        return [TokenEffects(*facts) for facts in zip(promoted, suppressed, read, through, heads, strict=True)]

    def _written(self, group: int, index_N: Tensor) -> Tensor | None:
        """What features write to the last stream, `[N, D]`: outputs of sub-layers add up, of streams the last one counts."""
        sites = [site for site in self.crosscoder.wiring.writes[group] if not site.model]
        streams = [site for site in sites if site.kind in _STREAM]
        chosen = streams[-1:] or [site for site in sites if site.kind in _ADDED]
        vectors = [self._exact(self.crosscoder.decoder_vectors(group, index_N, site)) for site in chosen]
        return torch.stack(vectors).sum(0) if vectors else None

    def _stream_reads(self, group: int, index_N: Tensor) -> list[tuple[int, Tensor]]:
        """(number of attention layers below, vectors `[N, D]` on the stream) of every site that features read it at."""
        reads = []
        for site in self.crosscoder.wiring.reads[group]:
            if site.model or site.kind in (*_ADDED, "attn_z"):
                continue
            v_ND = self._exact(self.crosscoder.encoder_vectors(group, index_N, site))
            if site.kind in _IN_FRONT_OF_ATTENTION:
                whole, below = self._norms_attention[site.layer], site.layer
                norm: FrozenNorm | None = whole if site.kind == "attn_in" else whole.without_gain
            else:
                norm, below = read_norm(site, self._norms_mlp), (read_depth(site, self._lm.shape) + 1) // 2
            reads.append((below, v_ND if norm is None else norm.pull_back(v_ND, torch.zeros_like(index_N))))
        return reads

    def _head_reads(self, group: int, index_N: Tensor, reads: list[tuple[int, Tensor]]) -> dict[int, Tensor]:
        """Layer by layer, what features read of the value vectors of every head, `[N, H, K]`."""
        n_heads, readings = self._lm.shape.n_heads, dict[int, Tensor]()
        for layer in range(max((below for below, _ in reads), default=0)):
            v_ND, attention = (
                torch.stack([v_ND for below, v_ND in reads if layer < below]).sum(0),
                self._attention(layer),
            )
            readings[layer] = (v_ND @ attention.W_O_XD.T / _output_scale(attention)).unflatten(1, (n_heads, -1))
        for site in self.crosscoder.wiring.reads[group]:
            if site.kind == "attn_z" and not site.model:
                reading_NX = self._exact(self.crosscoder.encoder_vectors(group, index_N, site))
                readings[site.layer] = reading_NX.unflatten(1, (n_heads, -1))
        return readings

    def _best_heads(
        self, readings: dict[int, Tensor]
    ) -> tuple[list[tuple[TokenWeight, ...]], list[tuple[int, int] | None]]:
        """The strongest tokens of every feature through its best head, and that head."""
        layers, n_heads = list(readings), self._lm.shape.n_heads
        size_NC = torch.cat([self._square_sizes(layer, r_NHK) for layer, r_NHK in readings.items()], 1)
        best: list[tuple[tuple[TokenWeight, ...], tuple[int, int] | None]] = [((), None)] * len(size_NC)
        mean_N = [-math.inf] * len(size_NC)
        for number_N in size_NC.topk(min(HEADS_TRIED, size_NC.shape[1]), dim=1).indices.T:
            u_ND = torch.empty(len(number_N), self._lm.shape.d_model, dtype=size_NC.dtype, device=size_NC.device)
            for number in number_N.unique().tolist():
                layer, head = layers[number // n_heads], number % n_heads
                rows = number_N == number
                u_ND[rows] = (
                    readings[layer][rows, head] @ self._attention(layer).W_V_XD.unflatten(0, (n_heads, -1))[head]
                )
            strongest = self.vocabulary.strongest(self.vocabulary.read(u_ND), self.n_tokens)
            for row, (number, tokens) in enumerate(zip(number_N.tolist(), strongest, strict=True)):
                if (mean := sum(score for _, score in tokens) / len(tokens)) > mean_N[row]:
                    mean_N[row], best[row] = mean, (tokens, (layers[number // n_heads], number % n_heads))
        return [tokens for tokens, _ in best], [head for _, head in best]

    def _square_sizes(self, layer: int, reading_NHK: Tensor) -> Tensor:
        """Mean square, over the vocabulary, of what is read through every head, `[N, H]`."""
        if layer not in self._moments:
            W_V_HKD = self._attention(layer).W_V_XD.unflatten(0, (self._lm.shape.n_heads, -1))
            self._moments[layer] = W_V_HKD @ self.vocabulary.second_moment @ W_V_HKD.transpose(1, 2)
        return torch.einsum("nhk,hkj,nhj->nh", reading_NHK, self._moments[layer], reading_NHK)

    def _attention(self, layer: int) -> AttentionWeights:
        return self._lm.parts.attention_weights(layer)

    def _exact(self, vectors: Tensor) -> Tensor:
        return vectors.detach().to(device=self._lm.device, dtype=self._lm.parts.exact_dtype)


def token_effects(
    lm: LanguageModel, crosscoder: Crosscoder, *, n_tokens: int = 10
) -> Iterator[tuple[int, int, TokenEffects]]:
    """(layer, index, effects) of every feature, group by group; a few hundred features are in memory at a time."""
    weights = FeatureWeights(lm, crosscoder, n_tokens=n_tokens)
    for group in range(crosscoder.n_groups):
        layer = crosscoder.wiring.group_layer(group)
        for index_N in torch.arange(crosscoder.n_features, device=crosscoder.device).split(CHUNK):
            for index, effects in zip(index_N.tolist(), weights.effects(group, index_N), strict=True):
                yield layer, index, effects
        crosscoder.release()


def _output_scale(attention: AttentionWeights) -> float:
    """Scale of the norm behind attention when one position of independent entries is attended to; 1 where there is none."""
    if attention.norm_out is None:
        return 1.0
    W_O_XD = attention.W_O.flatten(0, 1).to(attention.norm_in.weight_D.dtype)
    if attention.norm_out.centred:
        W_O_XD = W_O_XD - W_O_XD.mean(-1, keepdim=True)
    return float((attention.W_V_XD.norm(dim=1) * W_O_XD.norm(dim=1)).norm()) / math.sqrt(W_O_XD.shape[1])
