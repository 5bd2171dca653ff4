"""What stays fixed for one prompt: norm scales and attention patterns. With them frozen, all but the MLPs is linear.

Letters: T tokens, H heads, K d_head, X = H K, D d_model, N targets, R = N T rows.

Everything that can be folded is folded. A frozen norm is `x -> centre(x) * weight / scale[t] + bias`; its weight and
centring go into `W_V` (norm before attention) and `W_O` (norm after it), its scale into the rows and columns of the pattern.
What is left of an attention layer is, per head, `kernel_TT @ x_TD @ W_V_DK @ W_O_KD`, plus a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

MIXED_POSITIONS = 128
"""Keys that are mixed at once: enough for a fast matrix product, few beside a long prompt."""


class Scratch:
    """Memory for intermediate results, reused: large blocks fresh from the system cost as much as a tenth of the product."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor; valid until the same name is taken again."""
        size = math.prod(shape)
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = like.new_empty(size)
        return self._buffers[name][:size].view(shape)


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A layer norm or RMS norm without its scale: `x -> centre(x) / scale * weight + bias`."""

    weight_D: Float[Tensor, " D"]
    """Gain, with any `1 + w` convention already applied."""
    bias_D: Float[Tensor, " D"]
    """Offset; zeros where the norm has none."""
    centred: bool
    """True for LayerNorm, which subtracts the mean over D."""

    @property
    def without_gain(self) -> NormWeights:
        """The same norm before its gain and offset."""
        return NormWeights(torch.ones_like(self.weight_D), torch.zeros_like(self.bias_D), self.centred)

    def fold(self, v: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Vectors `u` with `u . x / scale = v . (norm(x) - bias)`."""
        u = v * self.weight_D
        return u - u.mean(-1, keepdim=True) if self.centred else u

    def freeze(self, scale_T: Tensor) -> FrozenNorm:
        """Fix the scale of every position."""
        return FrozenNorm(self.weight_D / scale_T[:, None], self.bias_D, self.centred, scale_T)


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """A norm whose scale is fixed at every position: an affine map per position."""

    gain_TD: Float[Tensor, "T D"]
    """Gain of the norm, divided by the scale."""
    bias_D: Float[Tensor, " D"]
    centred: bool
    scale_T: Float[Tensor, " T"]

    @property
    def without_gain(self) -> FrozenNorm:
        """The same norm before its gain and offset."""
        gain_TD = (1 / self.scale_T)[:, None].expand_as(self.gain_TD)  # a view: [T, D] is not made for every reading
        return FrozenNorm(gain_TD, torch.zeros_like(self.bias_D), self.centred, self.scale_T)

    def apply(self, x_TD: Tensor) -> Tensor:
        """The norm's output for a residual stream `x_TD`."""
        if self.centred:
            x_TD = x_TD - x_TD.mean(-1, keepdim=True)
        return x_TD * self.gain_TD + self.bias_D

    def pull_back(self, v_ND: Tensor, position_N: Tensor) -> Tensor:
        """The vector `u` with `u . x = v . (norm(x) - bias)` at each target's own position."""
        u_ND = v_ND * self.gain_TD[position_N]
        return u_ND - u_ND.mean(-1, keepdim=True) if self.centred else u_ND


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """The linear part of one attention layer with its norms folded in; the same for every prompt.

    The weights are those of the model, not a second copy. Folded ones, raised to float32 where the model has 16 bits, are made
    when they are asked for, which costs little beside the products they are made for. Their heads are stacked (`X = H K`), so
    that all of them are one matrix product; with grouped-query attention every query head has its copy of the value weights.
    """

    W_V: Float[Tensor, "G D K"]
    """Value weights as the model stores them, for each of its key heads."""
    W_O: Float[Tensor, "H K D"]
    """Output weights as the model stores them."""
    norm_in: NormWeights
    """The norm in front of this layer."""
    norm_out: NormWeights | None
    """The norm behind it; None where there is none."""
    residual_scale: float
    """Factor of what is written (Granite); 1 in most models."""
    value_bias_X: Float[Tensor, " X"]
    """What the value vectors hold when the stream is zero: input-norm bias through `W_V`, plus `b_V`."""
    output_bias_D: Float[Tensor, " D"]
    """`b_O` through the output norm's weight (not yet divided by its scale)."""
    norm_bias_D: Float[Tensor, " D"]
    """Bias of the output norm; zeros where there is none."""
    held: tuple[Tensor, Tensor] | None = None
    """Folded value and output weights, where they are kept; see `hold`."""

    @classmethod
    def fold(
        cls,
        *,
        W_V: Tensor,
        W_O: Tensor,
        b_V: Tensor | None,
        b_O: Tensor | None,
        norm_in: NormWeights,
        norm_out: NormWeights | None,
        residual_scale: float = 1.0,
    ) -> AttentionWeights:
        """Fold the norms, and the factor of what is written, into the biases; into the weights when these are asked for."""
        exact, repeats = norm_in.weight_D, len(W_O) // len(W_V)
        b_V = exact.new_zeros(W_V.shape[0], W_V.shape[2]) if b_V is None else b_V.to(exact)
        b_O = exact.new_zeros(W_O.shape[2]) if b_O is None else b_O.to(exact)
        value_bias = torch.einsum("d,hdk->hk", norm_in.bias_D, W_V.to(exact)) + b_V
        norm_bias = torch.zeros_like(b_O)
        if norm_out is not None:
            b_O = (b_O - b_O.mean() if norm_out.centred else b_O) * norm_out.weight_D
            norm_bias = norm_out.bias_D
        return cls(
            W_V=W_V,
            W_O=W_O,
            norm_in=norm_in,
            norm_out=norm_out,
            residual_scale=residual_scale,
            value_bias_X=einops.repeat(value_bias, "g k -> (g r k)", r=repeats),
            output_bias_D=b_O * residual_scale,
            norm_bias_D=norm_bias * residual_scale,
        )

    @property
    def n_heads(self) -> int:
        """H."""
        return len(self.W_O)

    @property
    def W_V_XD(self) -> Float[Tensor, "X D"]:  # noqa: N802
        """Value weights with the input norm's weight and centring folded in; `x @ W_V.T` gives all values."""
        if self.held is not None:
            return self.held[0]
        W_V_GKD = self.W_V.transpose(1, 2) * self.norm_in.weight_D  # a product with float32 raises 16 bits
        if self.norm_in.centred:
            W_V_GKD -= W_V_GKD.mean(-1, keepdim=True)
        return einops.repeat(W_V_GKD, "g k d -> (g r k) d", r=len(self.W_O) // len(self.W_V))

    @property
    def W_O_XD(self) -> Float[Tensor, "X D"]:  # noqa: N802
        """Output weights with the output norm's weight and centring folded in (where the model has such a norm)."""
        if self.held is not None:
            return self.held[1]
        W_O_XD = self.W_O.flatten(0, 1).to(self.norm_in.weight_D.dtype)
        if self.norm_out is not None:
            W_O_XD = W_O_XD - W_O_XD.mean(-1, keepdim=True) if self.norm_out.centred else W_O_XD
            W_O_XD = W_O_XD * self.norm_out.weight_D
        return W_O_XD if self.residual_scale == 1 else W_O_XD * self.residual_scale

    def norm_before(self, kind: str) -> NormWeights:
        """The norm between the stream and a site in front of attention: `attn_in`, or `attn_normalized` before its gain."""
        return self.norm_in.without_gain if kind == "attn_normalized" else self.norm_in

    def hold(self) -> AttentionWeights:
        """The same weights with the folded ones kept, for many products in a row; as long as the result is referred to."""
        return replace(self, held=(self.W_V_XD.contiguous(), self.W_O_XD.contiguous()))

    def typical_sizes(self) -> tuple[float, float]:
        """Root mean square of `attn_z` and of the layer's output, when one position is attended to.

        That position's normalised stream has independent entries; the output is the one in front of the division by the
        output norm's scale.
        """
        size_X, W_O_XD = self.W_V_XD.norm(dim=1), self.W_O_XD
        output = float((size_X * W_O_XD.norm(dim=1)).norm()) / math.sqrt(W_O_XD.shape[1])
        return float(size_X.square().mean().sqrt()), output

    def freeze(self, pattern_HTT: Tensor, scale_in_T: Tensor, scale_out_T: Tensor | None) -> FrozenAttention:
        """Fix the pattern `[head, query, key]` and both norm scales for one prompt."""
        rows_T = torch.ones_like(scale_in_T) if scale_out_T is None else 1 / scale_out_T
        z_TX = (pattern_HTT.sum(-1).T[..., None] * self.value_bias_X.view(self.n_heads, -1)).flatten(1)
        constant_TD = z_TX @ self.W_O_XD + self.output_bias_D
        return FrozenAttention(
            weights=self,
            kernel_HTT=pattern_HTT * rows_T[:, None] / scale_in_T,
            constant_TD=constant_TD * rows_T[:, None] + self.norm_bias_D,
            scale_in_T=scale_in_T,
            scale_out_T=scale_out_T,
            constant_z_TX=z_TX,
        )


@dataclass(frozen=True, slots=True)
class FrozenAttention:
    """One attention layer with pattern and norm scales fixed: `x_TD -> sum_h kernel_h x W_V_h W_O_h + constant`."""

    weights: AttentionWeights
    kernel_HTT: Float[Tensor, "H T T"]
    """Pattern `[head, query, key]`, divided by the key's input scale and the query's output scale."""
    constant_TD: Float[Tensor, "T D"]
    """Output for a zero stream: every bias of the layer."""
    scale_in_T: Float[Tensor, " T"]
    """Scale of the norm in front of this layer; ones where there is none."""
    scale_out_T: Float[Tensor, " T"] | None
    """Scale of the norm after this layer; None where there is none."""
    constant_z_TX: Float[Tensor, "T X"]
    """Mixed value vectors (`attn_z`) for a zero stream."""

    def apply(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The layer's write to the residual stream when it reads `x_TD`."""
        return self.mix(x_TD) @ self.weights.W_O_XD + self.constant_TD

    def mix(self, x_TD: Float[Tensor, "*N T D"], *, start: int = 0) -> Float[Tensor, "*N T X"]:
        """What every head writes when the layer reads `x_TD`, before `W_O` and without constants.

        A product with the rows of `W_O` that belong to head h is that head's part of the output. Leading axes are a batch.

        Args:
            x_TD: streams, zero before `start`, given from there on; they may stop before the prompt does.
            start: position of the first row.
        """
        weights, here = self.weights, slice(start, start + x_TD.shape[-2])
        values = (x_TD @ weights.W_V_XD.T).unflatten(-1, (weights.n_heads, -1)).transpose(-3, -2)
        return (self.kernel_HTT[:, here, here] @ values).transpose(-3, -2).flatten(-2)

    def z(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T X"]:
        """`attn_z`, the heads' mixed value vectors, when the layer reads `x_TD`."""
        z_TX = self.mix(x_TD)
        return (z_TX if self.scale_out_T is None else z_TX * self.scale_out_T[:, None]) + self.constant_z_TX

    def pull_back_z(self, w_NX: Float[Tensor, "N X"], position_N: Tensor) -> Float[Tensor, "N H D"]:
        """Vectors that read `attn_z` at one position each, head by head, as vectors on the stream that this layer reads.

        `w . z[t] = sum_h sum_s kernel_h[t, s] u_h . x[s]`, without constants.
        """
        if self.scale_out_T is not None:  # attn_z lies before the output norm
            w_NX = w_NX * self.scale_out_T[position_N][:, None]
        return self._by_head(w_NX)

    def _by_head(self, u_NX: Float[Tensor, "N X"]) -> Float[Tensor, "N H D"]:
        """Vectors on the value vectors of every head, as vectors on the stream, head by head."""
        u_NHK, W_V_HKD = (
            x.unflatten(axis, (self.weights.n_heads, -1)) for x, axis in ((u_NX, 1), (self.weights.W_V_XD, 0))
        )
        return torch.einsum("nhk,hkd->nhd", u_NHK, W_V_HKD)

    def mix_back(self, v_NTD: Float[Tensor, "N T D"], scratch: Scratch) -> Float[Tensor, "X N T"]:
        """Vectors at this layer's output, pulled back to its value vectors: `[X, N, T]`, positions last.

        `z_h[s] = sum_t kernel_h[t, s] W_O_h v[t]`. The product with `W_O` is taken transposed, which leaves heads and
        channels in front and positions last: the mixing is then one batched product over heads, without a copy.

        Args:
            v_NTD: contiguous; its second axis may stop before the prompt does, because attention is causal.
            scratch: holds the result, until the next call with the same scratch.
        """
        N, T, D = v_NTD.shape
        W_O_XD, H = self.weights.W_O_XD, self.weights.n_heads
        X = len(W_O_XD)
        u_XR = torch.mm(W_O_XD, v_NTD.view(N * T, D).T, out=scratch.take("u", (X, N * T), v_NTD))
        z_HMT = scratch.take("z", (H, X // H * N, T), v_NTD)
        u_HMT = u_XR.view(H, -1, T)
        for start in range(0, T, MIXED_POSITIONS):  # a key mixes with later queries alone: half of the product is zero
            keys = slice(start, min(start + MIXED_POSITIONS, T))
            torch.bmm(u_HMT[..., start:], self.kernel_HTT[:, start:T, keys], out=z_HMT[..., keys])
        return z_HMT.view(X, N, T)

    def add_pull_back_from_(self, v_NTD: Float[Tensor, "N T D"], position_N: Int[Tensor, " N"]) -> None:
        """The whole pull-back in place, of vectors that are still at one position each.

        Both products are per target instead of per row: the rows of a head differ by a number of its pattern alone.
        """
        N, T, _ = v_NTD.shape
        step = max(1, N * T // self.weights.n_heads)  # so that [N, H, D] takes no more memory than v
        for start in range(0, N, step):
            v_ntd, position_n = v_NTD[start : start + step], position_N[start : start + step]
            v_nd = v_ntd[torch.arange(len(v_ntd), device=v_ntd.device), position_n]
            pattern_nth = self.kernel_HTT[:, position_n, :T].permute(1, 2, 0)
            v_ntd.baddbmm_(pattern_nth, self._by_head(v_nd @ self.weights.W_O_XD.T))

    def add_values_back_(self, z_XNT: Float[Tensor, "X N T"], v_NTD: Float[Tensor, "N T D"]) -> None:
        """Finish the pull-back in place: `v += z W_V`; `v` then sits at this layer's input, direct stream included."""
        flat_RD = v_NTD.view(-1, v_NTD.shape[2])
        flat_RD.addmm_(z_XNT.flatten(1).T, self.weights.W_V_XD)
