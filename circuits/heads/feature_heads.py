"""One active feature's pre-activation as an exact sum over attention heads.

    h = bias + direct + sum over (layer, head, position s) of pattern[p, s] v_h[s] . W_enc,h

p is the feature's position, v_h[s] the head's value vector of the prompt's residual stream at s, and W_enc,h the feature's
encoder as it is seen at the head: through `W_O` (and the frozen norms and skip connections in between) for features that read
the stream, the encoder itself for those that read `attn_z`. Heads count by last hop: what a head writes at p belongs to it,
wherever that came from. `direct` is the embedding and the MLP outputs at p; `bias` is what no activation causes: the encoder's
bias, and constants of norms and attention.

The view over heads' concatenated outputs follows Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse
Autoencoders".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Group
from torch import Tensor

from circuits.attribution.identity import check_identity
from circuits.attribution.readers import head_reads, reading_sizes, stream_reads
from circuits.attribution.targets import FeatureTarget, active_feature, check_model, parse_feature
from circuits.graph.text import head_name
from circuits.heads.node_credit import feature_threshold
from circuits.heads.relu_credit import DEFAULT_RULE, Credit, credit
from circuits.heads.writes_and_reads import TargetReads
from replacement import Decomposition, LocalReplacement, Lorsa, ReplacementModel
from replacement.console import section, table
from replacement.language_model.prompts import Prompt
from replacement.notebook import repr_html
from replacement.splicing.intervention import PARTS
from replacement.token_texts import visible

SHOWN = 10
"""Heads that are shown."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadView:
    """One feature's pre-activation, split: `pre_activation = heads_LH.sum() + direct + bias`."""

    feature: FeatureTarget
    """Layer, index and position, counted from the start."""
    heads: str
    """Whose heads: `original` ones of the model or, for a feature of low-rank sparse attention, `replaced`: the query-key
    groups in their place, one of which it reads."""
    tokens: tuple[str, ...]
    """Text of every token of the prompt."""
    layers: tuple[int, ...]
    """Layers whose heads the feature can read; zero in the arrays elsewhere."""
    heads_LHT: np.ndarray
    """float64[L, H, T], what each head contributes from each position; zero behind the feature's position."""
    heads_LH: np.ndarray
    """float64[L, H], what each head contributes: the sum over positions."""
    encoder_share_LH: np.ndarray
    """float64[L, H], norm of the encoder as it is seen at each head, as shares that sum to 1 (zeros without heads)."""
    direct: float
    """From the embedding and the MLP outputs at the feature's position; 0 for features of attention."""
    bias: float
    """From no activation."""
    pre_activation: float
    """As the crosscoder computed it."""
    activation: float
    threshold: float
    """With all other features held fixed, the activation is `h 1[h > threshold]`."""
    identity_error: float
    """|sum of the parts - pre-activation|, relative to it or to 1 % of the parts' summed magnitudes."""

    def __repr__(self) -> str:
        return f"HeadView({self.feature}: activation {self.activation:.4g}, {len(self.players)} heads)"

    def __rich__(self) -> Group:
        size = float(np.abs(self.contributions).sum()) or 1.0
        order = sorted(self.players, key=lambda player: -abs(self.heads_LH[player]))
        rows = [self._cells(self.name(player), self.heads_LH[player], size) for player in order[:SHOWN]]
        for cells, player in zip(rows, order, strict=False):
            source = int(np.abs(self.heads_LHT[player]).argmax())
            cells.append(f"{visible(self.tokens[source])} at {source}")
        rest = sum(self.heads_LH[player] for player in order[SHOWN:])
        rows += [self._cells(f"{len(order) - SHOWN} other heads", rest, size)] if len(order) > SHOWN else []
        rows += [self._cells("direct", self.direct, size), ["bias", f"{self.bias:+.4f}"]]
        token = visible(self.tokens[self.feature.position])
        title = (
            f"Feature {self.feature} “{token}”: activation {self.activation:.4g}, pre-activation {self.pre_activation:.4g} "
            f"= sum of all rows"
        )
        heads = ("head", "to pre-activation", "share", "mostly from")
        return section(title, table(*heads, rows=rows, texts=("mostly from",)))

    _repr_html_ = repr_html

    @staticmethod
    def _cells(name: str, contribution: float, size: float) -> list[str]:
        return [name, f"{contribution:+.4f}", f"{100 * abs(contribution) / size:.1f} %"]

    def name(self, player: tuple[int, int]) -> str:
        """Name of one of `players`, such as `L2H3`; `L2Q3` for a query-key group."""
        return head_name(*player, heads=self.heads)

    @property
    def players(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of all heads below the feature, in order."""
        return tuple((layer, head) for layer in self.layers for head in range(self.heads_LHT.shape[1]))

    @property
    def contributions(self) -> np.ndarray:
        """float64[J], of `players`, then `direct`."""
        return np.append(self.heads_LH[list(self.layers)].ravel(), self.direct)

    def credit(self, rule: str = DEFAULT_RULE, *, samples: int = 2048, seed: int = 0) -> Credit:
        """The activation divided among `players` and, last, `direct`; see `circuits.heads.relu_credit`."""
        return credit(
            self.contributions, bias=self.bias, threshold=self.threshold, rule=rule, samples=samples, seed=seed
        )


def head_view(model: ReplacementModel, prompt: Prompt, feature: FeatureTarget | str) -> HeadView:
    """Split one active feature's pre-activation into heads, the direct stream and a bias.

    Args:
        model: language model with a crosscoder spliced in.
        prompt: text, a list of token ids or a 1-D tensor of them.
        feature: `FeatureTarget(layer, index, position)`, or its name: `2/345@7`, `attention:2/345@7`.

    Raises:
        ValueError: a prompt the model cannot read, or a feature that does not exist or is not active there.
        IdentityError: the parts do not sum to the pre-activation.
    """
    check_model(model)
    if not isinstance(feature, str | FeatureTarget):
        raise ValueError(f"expected a FeatureTarget or the name of a feature such as 2/345@7, got {feature!r:.50}")
    lm = model.language_model
    with torch.no_grad():
        target = parse_feature(feature) if isinstance(feature, str) else feature
        local = model.localize(lm.tokens(prompt))
        number = active_feature(target, local)
        part = local.decompositions[PARTS.index(target.part)]
        tokens = tuple(lm.prompt_strings(local.frozen.tokens_T.tolist()))
        return HeadViews(local, tokens).of(part, number - (len(local.features) if target.part == "attention" else 0))


class HeadViews:
    """Head views of the features of one prompt, whose residual streams are computed once."""

    def __init__(self, local: LocalReplacement, tokens: tuple[str, ...]) -> None:
        """Of a localized prompt and the text of its tokens."""
        self._local, self._tokens = local, tokens
        self._streams, self._mlp_LTD = local.streams(), local.mlp.outputs()

    @torch.no_grad()
    def of(self, part: Decomposition, number: int) -> HeadView:
        """The view of one feature.

        Args:
            part: whose feature it is, one of `local.decompositions`.
            number: number into `part.features`.

        Raises:
            IdentityError: the parts do not sum to the pre-activation.
        """
        features, of_attention = part.features, part.kind == "attn_out"
        group, row, index = (int(column[number]) for column in (features.group, features.row, features.index))
        layer = part.crosscoder.wiring.group_layer(group)
        feature = FeatureTarget(layer, index, row, part="attention" if of_attention else "mlp")
        read, direct, bias = (self._read_attention if of_attention else self._read_stream)(part, number)
        shape = self._local.shape
        n_heads = next((len(seen_H) for _, seen_H in read.values()), shape.n_heads)
        heads_LHT = np.zeros((shape.n_layers, n_heads, len(self._tokens)))
        norm_LH = np.zeros((shape.n_layers, n_heads))
        for layer, (parts_HT, seen_H) in read.items():
            heads_LHT[layer], norm_LH[layer] = (x.double().cpu().numpy() for x in (parts_HT, seen_H))
        pre_activation, chosen_S = (
            float(part.pre_activation_S[number]),
            torch.tensor([number], device=features.row.device),
        )
        identity_error = check_identity(
            pre_activation,
            math.fsum([*heads_LHT.ravel(), direct, bias]),
            float(np.abs(heads_LHT).sum() + reading_sizes(self._local, part, chosen_S)) + abs(direct) + abs(bias),
            dtype=part.pre_activation_S.dtype,
            n_layers=shape.n_layers,
            name=lambda _: f"feature {feature}, split by heads,",
        )
        return HeadView(
            feature=feature,
            heads="replaced" if isinstance(part.crosscoder, Lorsa) else "original",
            tokens=self._tokens,
            layers=tuple(read),
            heads_LHT=heads_LHT,
            heads_LH=heads_LHT.sum(-1),
            encoder_share_LH=norm_LH / max(float(norm_LH.sum()), 1e-30),
            direct=direct,
            bias=bias,
            pre_activation=pre_activation,
            activation=float(features.activation[number]),
            threshold=feature_threshold(self._local, part, number),
            identity_error=identity_error,
        )

    def _read_stream(self, part: Decomposition, number: int) -> tuple[dict[int, tuple[Tensor, Tensor]], float, float]:
        """Layer by layer what a feature that reads the stream gets through every head from every position, `[H, T]`, and the
        norm of its encoder as it is seen there, `[H]`; its direct part and its bias."""
        local, position = self._local, int(part.features.row[number])
        chosen_S = torch.tensor([number], device=part.features.row.device)
        target_R, targets, constant_S = stream_reads(local, part, chosen_S)
        reads = {depth: read_MD[0] for depth, read_MD in TargetReads(local, 1, target_R, targets).at_own_position()}
        direct, bias = reads[0] @ self._streams[0][position], constant_S[0]
        read = {}
        for layer, attention in enumerate(local.frozen.attentions):
            of_attention_D, of_mlp_D = reads[2 * layer + 1], reads[2 * layer + 2]
            direct = direct + of_mlp_D @ self._mlp_LTD[layer, position]
            bias = bias + (of_mlp_D * local.skips.bias(layer)).sum() + of_attention_D @ attention.constant_TD[position]
            if bool(of_attention_D.any()):
                encoder_X = attention.weights.W_O_XD @ of_attention_D
                scale = 1.0 if attention.scale_out_T is None else attention.scale_out_T[position]
                read[layer] = self._heads(layer, position, encoder_X), self._by_head(encoder_X).norm(dim=1) / scale
        return read, float(direct), float(bias)

    def _read_attention(
        self, part: Decomposition, number: int
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], float, float]:
        """The same for a feature of attention, which has no direct part."""
        group, chosen_S = int(part.features.group[number]), torch.tensor([number], device=part.features.row.device)
        targets = head_reads(self._local, part, chosen_S, group)
        (site,), heads_P = part.crosscoder.wiring.reads[group], targets.head_NP[0]
        encoder_X = part.crosscoder.encoder_vectors(group, part.features.index[chosen_S], site)[0]
        parts_HT = targets.kernel_HTT.new_zeros(len(targets.kernel_HTT), len(self._tokens))
        seen_H = parts_HT.new_zeros(len(parts_HT))
        parts_HT[heads_P] = targets.read(self._streams[targets.layer])[0]
        seen_H[heads_P] = encoder_X.unflatten(0, (len(heads_P), -1)).norm(dim=1)
        return {targets.layer: (parts_HT, seen_H)}, 0.0, float(targets.constant_N[0])

    def _heads(self, layer: int, position: int, encoder_X: Tensor) -> Tensor:
        """`[H, T]`: kernel[p, s] x (values of head h at s) . (encoder seen at h), without constants."""
        attention = self._local.frozen.attentions[layer]
        values_THK = (self._streams[layer] @ attention.weights.W_V_XD.T).unflatten(1, (attention.weights.n_heads, -1))
        read_HT = torch.einsum("thk,hk->ht", values_THK, self._by_head(encoder_X))
        return read_HT * attention.kernel_HTT[:, position]

    def _by_head(self, encoder_X: Tensor) -> Tensor:
        return encoder_X.unflatten(0, (self._local.shape.n_heads, -1))
