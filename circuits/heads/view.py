"""Head view: one active feature's pre-activation as a sum over attention heads, exactly.

    h = bias + direct + sum over (layer, head, position s) of pattern[p, s] v_h[s] . W_enc,h

p is the feature's position, v_h[s] what the head's value map makes of the prompt's own stream at s, and W_enc,h the
feature's encoder as it is seen at the head: through `W_O` (and the frozen norms and skip matrices in between) for features
that read the stream, the encoder itself for those that read `attn_z`. Heads count by last hop: what a head writes at p
belongs to it, wherever that came from. `direct` is the embedding and the MLP outputs at p; `bias` is what no activation
causes: the encoder's bias, and constants of norms and attention.

The view over heads' concatenated outputs follows Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse
Autoencoders".

T tokens, L layers, H heads, K d_head, X = H K, D d_model, P = 2 L + 1 depths (pre_l = 2 l, mid_l = 2 l + 1).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.identity import CANCELLATION
from circuits.attribution.readers import head_reads, stream_reads
from circuits.attribution.targets import FeatureTarget, active_feature
from circuits.heads.credit import Credit, credit
from circuits.heads.thresholds import feature_threshold
from replacement import Decomposition, LocalReplacement, ReplacementModel, Site
from replacement.language_model.language_model import Prompt
from replacement.splicing.intervention import PARTS
from replacement.splicing.skip import read_depth


@dataclass(frozen=True, slots=True, eq=False)
class HeadView:
    """One feature's pre-activation, split: `pre_activation = heads_LH.sum() + direct + bias`."""

    feature: FeatureTarget
    """Layer, index and position, counted from the start."""
    tokens: tuple[str, ...]
    """Text of every token of the prompt."""
    layers: tuple[int, ...]
    """Layers whose heads the feature can read; zero in the arrays elsewhere."""
    heads_LHT: np.ndarray
    """float64[L, H, T], what each head brings from each position; zero behind the feature's own."""
    heads_LH: np.ndarray
    """float64[L, H], what each head brings: the sum over positions."""
    encoder_share_LH: np.ndarray
    """float64[L, H], norm of the encoder as it is seen at each head, as shares that sum to 1 (zeros without heads)."""
    direct: float
    """From the embedding and the MLP outputs at the feature's own position; 0 for features of attention."""
    bias: float
    """From no activation."""
    pre_activation: float
    """As the crosscoder computed it."""
    activation: float
    threshold: float
    """With all other features held fixed, the activation is `h 1[h > threshold]`."""
    identity_error: float
    """|sum of the parts - pre-activation|, relative to it or to 1 % of the parts' summed magnitudes."""

    @property
    def players(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of all heads below the feature, in order."""
        return tuple((layer, head) for layer in self.layers for head in range(self.heads_LHT.shape[1]))

    @property
    def contributions(self) -> np.ndarray:
        """float64[J], of `players`, then `direct`."""
        return np.append(self.heads_LH[list(self.layers)].ravel(), self.direct)

    def credit(self, rule: str = "path", *, samples: int = 2048, seed: int = 0) -> Credit:
        """The activation divided among `players` and, last, `direct`; see `circuits.heads.credit`."""
        return credit(
            self.contributions, bias=self.bias, threshold=self.threshold, rule=rule, samples=samples, seed=seed
        )

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw heads x source positions as a heat-map (`.svg` or `.png`); see `circuits.heads.plot`."""
        from circuits.heads.plot import plot_heads

        return plot_heads(self, path)


def head_view(model: ReplacementModel, prompt: Prompt, feature: FeatureTarget) -> HeadView:
    """Split one active feature's pre-activation into heads, the direct stream and a bias.

    Args:
        prompt: text, or a list or 1-D tensor of token ids.
        feature: `FeatureTarget(layer, index, position)`, of the attention crosscoder where `part` is `attention`.

    Raises:
        ValueError: a prompt the model cannot read, or a feature that does not exist or is not active there.
    """
    lm = model.language_model
    tokens_T = lm.tokens(prompt)
    with torch.no_grad():
        local = model.localize(tokens_T)
        number = active_feature(feature, local)
        part = local.decompositions[PARTS.index(feature.part)]
        tokens = tuple(lm.token_strings(local.frozen.tokens_T.tolist()))
        return HeadViews(local, tokens).of(part, number - (len(local.features) if feature.part == "attention" else 0))


class HeadViews:
    """Head views of the features of one prompt, whose streams are computed once."""

    def __init__(self, local: LocalReplacement, tokens: tuple[str, ...]) -> None:
        """Of a localized prompt and the text of its tokens."""
        self._local, self._tokens = local, tokens
        self._streams = local.streams()

    @torch.no_grad()
    def of(self, part: Decomposition, number: int) -> HeadView:
        """The view of one feature, by its number into `part.features`."""
        split = self._split_attention if part.kind == "attn_out" else self._split_stream
        layers, heads_LHT, norm_LH, direct, bias = split(part, number)
        pre = float(part.pre_activation_S[number])
        gap = abs(math.fsum([*heads_LHT.ravel(), direct, bias]) - pre)
        size = float(np.abs(heads_LHT).sum()) + abs(direct) + abs(bias)
        features = part.features
        group, position = int(features.group[number]), int(features.row[number])
        layer = part.crosscoder.wiring.group_layer(group)
        return HeadView(
            feature=FeatureTarget(
                layer, int(features.index[number]), position, part="attention" if part.kind == "attn_out" else "mlp"
            ),
            tokens=self._tokens,
            layers=layers,
            heads_LHT=heads_LHT,
            heads_LH=heads_LHT.sum(-1),
            encoder_share_LH=norm_LH / max(float(norm_LH.sum()), 1e-30),
            direct=direct,
            bias=bias,
            pre_activation=pre,
            activation=float(features.activation[number]),
            threshold=feature_threshold(self._local, part, number),
            identity_error=gap / max(abs(pre), CANCELLATION * size, 1e-30),
        )

    def _split_stream(
        self, part: Decomposition, number: int
    ) -> tuple[tuple[int, ...], np.ndarray, np.ndarray, float, float]:
        """Layers, heads, encoder norms, direct part and bias of a feature that reads the stream."""
        local, position = self._local, int(part.features.row[number])
        above_PD, constant = _reads_from(local, part, number)
        layers = tuple(layer for layer in range(local.shape.n_layers) if bool(above_PD[2 * layer + 1].any()))
        heads_LHT, norm_LH = self._empty()
        direct = above_PD[0] @ self._streams[0][position]
        for layer in range(local.shape.n_layers):
            direct = direct + above_PD[2 * layer + 2] @ _mlp_write(local, layer, position)
        for layer in layers:
            attention, read_D = local.frozen.attentions[layer], above_PD[2 * layer + 1]
            constant = constant + read_D @ attention.constant_TD[position]
            encoder_X = attention.weights.W_O_XD @ read_D  # in front of the output norm's scale, where there is one
            heads_LHT[layer] = self._heads(layer, position, encoder_X)
            scale = 1.0 if attention.scale_out_T is None else float(attention.scale_out_T[position])
            norm_LH[layer] = _norms(encoder_X, attention.weights.n_heads) / scale
        return layers, heads_LHT, norm_LH, float(direct), float(constant)

    def _split_attention(
        self, part: Decomposition, number: int
    ) -> tuple[tuple[int, ...], np.ndarray, np.ndarray, float, float]:
        """The same for a feature that reads `attn_z` of its own layer."""
        chosen_S = torch.tensor([number], device=part.features.group.device)
        group, position = int(part.features.group[number]), int(part.features.row[number])
        read = head_reads(part, chosen_S, group)
        attention, encoder_X = self._local.frozen.attentions[read.layer], read.vectors_NX[0]
        scale = 1.0 if attention.scale_out_T is None else attention.scale_out_T[position]
        heads_LHT, norm_LH = self._empty()
        heads_LHT[read.layer] = self._heads(read.layer, position, encoder_X * scale)
        norm_LH[read.layer] = _norms(encoder_X, attention.weights.n_heads)
        b_enc = part.crosscoder.b_enc[group][part.features.index[number]]
        return (read.layer,), heads_LHT, norm_LH, 0.0, float(b_enc + encoder_X @ attention.constant_z_TX[position])

    def _heads(self, layer: int, position: int, encoder_X: Tensor) -> np.ndarray:
        """float64[H, T]: kernel[p, s] x (values of head h at s) . (encoder seen at h), without constants."""
        attention = self._local.frozen.attentions[layer]
        shape_HK = (attention.weights.n_heads, -1)
        values_THK = (self._streams[layer] @ attention.weights.W_V_XD.T).unflatten(1, shape_HK)
        read_HT = torch.einsum("thk,hk->ht", values_THK, encoder_X.unflatten(0, shape_HK))
        return (read_HT * attention.kernel_HTT[:, position]).double().cpu().numpy()

    def _empty(self) -> tuple[np.ndarray, np.ndarray]:
        shape = self._local.shape
        return np.zeros((shape.n_layers, shape.n_heads, len(self._tokens))), np.zeros((shape.n_layers, shape.n_heads))


def _reads_from(local: LocalReplacement, part: Decomposition, number: int) -> tuple[Tensor, Tensor]:
    """`[P, D]`, what a feature reads of a vector that enters the stream of its own position at each depth, through skip
    matrices where there are any; and the part of its pre-activation that biases of encoder and norms make."""
    crosscoder, shape = local.crosscoder, local.shape
    chosen_S = torch.tensor([number], device=part.features.group.device)
    _, targets, constant_S = stream_reads(local, part, chosen_S)
    position_N, constant = targets.position_N[:1], constant_S[0]
    read_PD = targets.vectors_ND.new_zeros(2 * shape.n_layers + 1, shape.d_model)
    read_PD.index_add_(0, targets.depth_N, targets.vectors_ND)
    for layer in reversed(range(shape.n_layers)) if crosscoder.skip else ():
        written, above_D = Site(layer, "mlp_out"), read_PD[2 * layer + 2 :].sum(0)
        for group in crosscoder.wiring.writers(written):
            for site in crosscoder.wiring.reads[group]:
                u_D = above_D @ crosscoder.skip_matrix(group, site, written)
                if site.kind == "mlp_in":
                    norm = local.frozen.norms_mlp[site.layer]
                    constant = constant + u_D @ norm.bias_D
                    u_D = norm.pull_back(u_D[None], position_N)[0]
                read_PD[read_depth(site, shape)] += u_D
    return read_PD.flip(0).cumsum(0).flip(0), constant


def _mlp_write(local: LocalReplacement, layer: int, position: int) -> Tensor:
    """`[D]`, an MLP output at one position, without what skip matrices carry over from the stream."""
    here, site = slice(position, position + 1), Site(layer, "mlp_out")
    written_D = local.frozen.activations[site][position]
    read = {site: local.frozen.activations[site][here] for site in local.crosscoder.wiring.read_sites}
    skipped = local.crosscoder.skip_contribution(read) if local.crosscoder.skip else {}
    return written_D - skipped[site][0] if site in skipped else written_D


def _norms(encoder_X: Tensor, n_heads: int) -> np.ndarray:
    return encoder_X.unflatten(0, (n_heads, -1)).norm(dim=1).double().cpu().numpy()
