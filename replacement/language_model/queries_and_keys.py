"""Queries and keys of one layer, frozen for one prompt: affine maps of the residual stream that the layer reads.

Letters: T tokens, H query heads, G key heads (H = G x queries per key), K d_head, R rotated part of K, D d_model.

    score(q, k) = scale (R_q query(x_q)) . (R_k key(x_k))
    query(x) = gain_q ((centre(x) weight / scale_in) W_Q + b_Q)        gain: of the norm of queries, where there is one

The norm's weight and centring are folded into `W_Q` and `W_K`; its scale, the scale of the norms of queries and keys (of each
head: Gemma 3, Qwen 3, Cohere; of all heads at once: OLMo 2) and the rotation `R` are fixed per position. A soft-cap on scores
(Gemma 2) is not part of the map: scores are those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replacement.crosscoder.rotation import Rotation
from replacement.language_model.frozen_layers import NormWeights


@dataclass(frozen=True, slots=True)
class QueryKeyWeights:
    """Query and key weights of one layer with the input norm folded in; the same for every prompt."""

    W_Q_HKD: Float[Tensor, "H K D"]
    b_Q_HK: Float[Tensor, "H K"]
    """What queries hold when the stream is zero: input-norm bias through `W_Q`, plus `b_Q`."""
    W_K_GKD: Float[Tensor, "G K D"]
    b_K_GK: Float[Tensor, "G K"]
    query_norm_HK: Float[Tensor, "H K"] | None
    """Gain of the norm of queries; None where there is none."""
    key_norm_GK: Float[Tensor, "G K"] | None
    scale: float
    """Factor of the inner product of query and key."""
    soft_cap: float | None
    """`cap tanh(score / cap)` is what the softmax sees; None where there is no cap."""

    @classmethod
    def fold(
        cls,
        *,
        W_Q: Tensor,
        W_K: Tensor,
        b_Q: Tensor | None,
        b_K: Tensor | None,
        norm_in: NormWeights,
        query_norm: NormWeights | None,
        key_norm: NormWeights | None,
        scale: float,
        soft_cap: float | None,
    ) -> QueryKeyWeights:
        """Fold the input norm, and the centring of the norms of queries and keys, into `W_Q [H, D, K]` and `W_K [G, D, K]`.

        Args:
            query_norm: gain over the channels of a head, or over those of all heads one after another.
            key_norm: the same for keys.
        """
        W_Q_HKD, b_Q_HK = _fold_norms(W_Q, b_Q, norm_in, query_norm)
        W_K_GKD, b_K_GK = _fold_norms(W_K, b_K, norm_in, key_norm)
        return cls(
            W_Q_HKD=W_Q_HKD,
            b_Q_HK=b_Q_HK,
            W_K_GKD=W_K_GKD,
            b_K_GK=b_K_GK,
            query_norm_HK=None if query_norm is None else query_norm.weight_D.view(-1, W_Q.shape[2]).expand_as(b_Q_HK),
            key_norm_GK=None if key_norm is None else key_norm.weight_D.view(-1, W_K.shape[2]).expand_as(b_K_GK),
            scale=scale,
            soft_cap=soft_cap,
        )

    def query_gain(self, norm_scale_HT1: Tensor | None, n_positions: int) -> Float[Tensor, "H T K"]:
        """What multiplies every query: gain and frozen scale of the norm of queries, or ones."""
        return _gain(self.b_Q_HK, self.query_norm_HK, norm_scale_HT1, n_positions)

    def key_gain(self, norm_scale_GT1: Tensor | None, n_positions: int) -> Float[Tensor, "G T K"]:
        """The same for keys."""
        return _gain(self.b_K_GK, self.key_norm_GK, norm_scale_GT1, n_positions)

    def cap(self, scores: Tensor) -> Tensor:
        """What the softmax sees of scores."""
        return scores if self.soft_cap is None else self.soft_cap * torch.tanh(scores / self.soft_cap)


def _fold_norms(
    W: Tensor, b: Tensor | None, norm_in: NormWeights, norm_out: NormWeights | None
) -> tuple[Tensor, Tensor]:
    bias = torch.einsum("d,hdk->hk", norm_in.bias_D, W)
    bias = bias if b is None else bias + b
    folded = W * norm_in.weight_D[:, None]
    if norm_in.centred:
        folded = folded - folded.mean(1, keepdim=True)
    if norm_out is not None and norm_out.centred:
        folded, bias = folded - folded.mean(2, keepdim=True), bias - bias.mean(1, keepdim=True)
    return folded.transpose(1, 2).contiguous(), bias


def _gain(b_HK: Tensor, norm_HK: Tensor | None, norm_scale_HT1: Tensor | None, n_positions: int) -> Tensor:
    if norm_HK is None or norm_scale_HT1 is None:
        return b_HK.new_ones(b_HK.shape[0], n_positions, b_HK.shape[1])
    return norm_HK[:, None] / norm_scale_HT1


@dataclass(frozen=True, slots=True)
class FrozenQueryKey:
    """One layer's queries and keys with norm scales and rotations fixed, and the scores the model made of them."""

    weights: QueryKeyWeights
    scale_in_T: Float[Tensor, " T"]
    """Scale of the norm in front of the layer."""
    query_gain_HTK: Float[Tensor, "H T K"]
    key_gain_GTK: Float[Tensor, "G T K"]
    rotation: Rotation | None
    """None where positions are learned, or the layer has none (SmolLM 3, Cohere 2)."""
    scores_HTT: Float[Tensor, "H T T"]
    """The model's own scores `[head, query, key]` before any soft-cap; minus infinity where a key is masked."""
    pattern_HTT: Float[Tensor, "H T T"]
    """Attention probabilities."""
    visible_TT: Bool[Tensor, "T T"]
    """Keys that a query may attend to: not after it, and inside the window where the layer has one."""

    def key_head(self, head: int) -> int:
        """Key head that a query head reads."""
        return head // (len(self.weights.W_Q_HKD) // len(self.weights.W_K_GKD))

    def query(self, head: int, position: int) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"]]:
        """Vectors and constants with `scale * rotated query = vectors @ x + constants`, x the stream at the position."""
        weights = self.weights
        vectors_KD, constant_K = self._read(
            weights.W_Q_HKD[head], weights.b_Q_HK[head], self.query_gain_HTK[head], position
        )
        return vectors_KD * weights.scale, constant_K * weights.scale

    def key(self, head: int, position: int) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"]]:
        """The same for the key that a query head meets at a position, without the scale."""
        group = self.key_head(head)
        return self._read(self.weights.W_K_GKD[group], self.weights.b_K_GK[group], self.key_gain_GTK[group], position)

    def scores(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "H T T"]:
        """Scores before any soft-cap, of all heads, when the layer reads `x_TD`; keys that are masked included."""
        q_HTK, k_HTK = self._queries_and_keys(x_TD)
        return q_HTK @ k_HTK.transpose(1, 2) * self.weights.scale

    def largest_scores(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "H T T"]:
        """The scores if every query pointed at every key: `scale |query| |key|`, to which rounding is relative."""
        q_HTK, k_HTK = self._queries_and_keys(x_TD)
        return q_HTK.norm(dim=-1)[:, :, None] * k_HTK.norm(dim=-1)[:, None] * abs(self.weights.scale)

    def _queries_and_keys(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys `[H, T, K]` when the layer reads `x_TD`; shared keys repeated for each query head."""
        x_TD = x_TD / self.scale_in_T[:, None]
        weights, everywhere = self.weights, slice(None)
        q_HTK = torch.einsum("td,hkd->htk", x_TD, weights.W_Q_HKD) + weights.b_Q_HK[:, None]
        k_GTK = torch.einsum("td,gkd->gtk", x_TD, weights.W_K_GKD) + weights.b_K_GK[:, None]
        q_HTK = self._rotate(q_HTK * self.query_gain_HTK, everywhere)
        k_GTK = self._rotate(k_GTK * self.key_gain_GTK, everywhere)
        return q_HTK, k_GTK.repeat_interleave(len(q_HTK) // len(k_GTK), 0)

    def _read(self, W_KD: Tensor, b_K: Tensor, gain_TK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        gain_K = gain_TK[position]
        vectors_DK = (W_KD * (gain_K / self.scale_in_T[position])[:, None]).T
        return self._rotate(vectors_DK, position).T, self._rotate(b_K * gain_K, position)

    def _rotate(self, x: Tensor, position: int | slice) -> Tensor:
        return x if self.rotation is None else self.rotation.apply(x, position)
