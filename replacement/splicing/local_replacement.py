"""The local replacement model of one prompt: features, error terms, frozen attention. It equals the original model there.

T tokens, L layers, D d_model, S active features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.sites import ModelShape, Site
from replacement.language_model.freezing import FrozenPrompt
from replacement.language_model.sixteen_bits import Unembedding
from replacement.splicing.skip import SkipTerms, read_depth


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The outputs of one kind of part, written as features + decoder bias + skip + error at every layer and position."""

    kind: str
    """Kind of site that is written: `mlp_out` or `attn_out`."""
    crosscoder: Crosscoder
    """Whose features these are."""
    features: Features
    """Active features; row = token position."""
    pre_activation_S: Float[Tensor, " S"]
    """Pre-activation of every active feature, as the crosscoder computed it."""
    errors_LTD: Float[Tensor, "L T D"]
    """Output minus reconstruction; the whole output at a layer the crosscoder does not write."""
    patterns: tuple[Float[Tensor, "Q T T"], ...] = ()
    """Of low-rank sparse attention (`Lorsa`): by group, the patterns of its query-key groups on this prompt."""

    def __repr__(self) -> str:
        return f"Decomposition({self.kind}: {self.features!r})"

    @classmethod
    def of(cls, kind: str, crosscoder: Crosscoder, frozen: FrozenPrompt) -> Decomposition:
        """Encode the clean activations and set the error terms that make the sum exact."""
        inputs = {site: frozen.activations[site] for site in crosscoder.wiring.read_sites}
        output = crosscoder(inputs)
        errors = torch.stack([frozen.activations[Site(layer, kind)] for layer in range(len(frozen.attentions))])
        for site, y_TD in output.reconstructions.items():
            errors[site.layer] -= y_TD
        groups = range(crosscoder.n_groups)
        patterns = [crosscoder.patterns(inputs, group)[0] for group in groups] if isinstance(crosscoder, Lorsa) else []
        part = cls(kind, crosscoder, output.features, output.features.activation, errors, tuple(patterns))
        return replace(part, pre_activation_S=torch.cat([part._pre_activations(group, inputs) for group in groups]))

    def rows_read(self, group: int, index_S: Tensor, row_S: Tensor, x_TD: Tensor) -> Float[Tensor, "S D"]:
        """What the encoders of features act on, of rows at a site that they read: each feature's own row or, in low-rank
        sparse attention, the mean of the rows up to its own that its pattern on this prompt weighs."""
        if not isinstance(self.crosscoder, Lorsa):
            return x_TD[row_S]
        return self.patterns[group][self.crosscoder.query_key_group(index_S), row_S].to(x_TD) @ x_TD

    def _pre_activations(self, group: int, inputs: Mapping[Site, Tensor]) -> Tensor:
        """Pre-activations of the active features of a group alone: one inner product each."""
        active = self.features.of(group)
        pre_S = self.crosscoder.b_enc[group][active.index]
        for site in self.crosscoder.wiring.reads[group]:
            rows_SD = self.rows_read(group, active.index, active.row, inputs[site])
            pre_S = pre_S + (rows_SD * self.crosscoder.encoder_vectors(group, active.index, site)).sum(-1)
        return pre_S

    def outputs(self, activation_S: Tensor | None = None) -> Float[Tensor, "L T D"]:
        """Features (at the given activations, by default those of the prompt) + decoder bias + error, without skip terms."""
        features = self.features if activation_S is None else self.features.replace_activations(activation_S)
        outputs_LTD = self.errors_LTD.clone()
        for site, y_TD in self.crosscoder.decode(features).items():
            outputs_LTD[site.layer] += y_TD
        return outputs_LTD


@dataclass(frozen=True, slots=True)
class LocalReplacement:
    """One prompt, with every MLP output (and every attention output, if a crosscoder writes those) decomposed.

    Between features it is linear: attention patterns and norm scales are fixed at their values on this prompt.
    """

    shape: ModelShape
    """Sizes of the language model."""
    frozen: FrozenPrompt
    """Attention, norms, embeddings and clean activations."""
    mlp: Decomposition
    """MLP outputs as features and errors."""
    attention: Decomposition | None
    """Attention outputs as features and errors; None where attention is linear between its patterns."""
    unembedding: Unembedding
    """From the final norm's output to the logits."""

    def __repr__(self) -> str:
        return f"LocalReplacement({self.n_positions} tokens: {', '.join(map(repr, self.decompositions))})"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that everything is computed in: float32 where the weights have 16 bits."""
        return self.frozen.logits_TV.dtype

    @property
    def device(self) -> torch.device:
        """Device that everything is computed on."""
        return self.frozen.logits_TV.device

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of this dtype on this device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def W_U(self) -> Float[Tensor, "D V"]:  # noqa: N802
        """Unembedding `[D, V]`; a copy where the model stores it in 16 bits."""
        return self.unembedding.matrix()

    @property
    def decompositions(self) -> tuple[Decomposition, ...]:
        """Of the MLPs, then of attention where it has one."""
        return (self.mlp,) if self.attention is None else (self.mlp, self.attention)

    @property
    def crosscoder(self) -> Crosscoder:
        """The crosscoder of the MLPs."""
        return self.mlp.crosscoder

    @property
    def features(self) -> Features:
        """Active features of the MLPs' crosscoder; row = token position."""
        return self.mlp.features

    @property
    def skips(self) -> SkipTerms:
        """The skip connections of the MLPs' crosscoder as maps on the frozen residual stream."""
        return SkipTerms(self.crosscoder, self.frozen.norms_mlp, self.shape)

    @property
    def n_positions(self) -> int:
        """Number of tokens T."""
        return len(self.frozen.tokens_T)

    @property
    def probabilities(self) -> Tensor:
        """Next-token probabilities `[T, V]` of the original model, soft-cap included."""
        return self.frozen.probabilities_TV

    def logits(self, activation_S: Tensor | None = None) -> Tensor:
        """Logits `[T, V]` before any soft-cap, through the frozen linear model.

        Args:
            activation_S: activations to hold the MLPs' features at; their own by default, and then these are the original
                model's logits up to rounding. Skip terms follow the stream, attention features keep their activations.
        """
        frozen = self.frozen
        x_TD = self.streams(activation_S)[-1]
        return self.unembedding.logits(frozen.norm_final.apply(x_TD))

    def streams(self, activation_S: Tensor | None = None) -> list[Tensor]:
        """Residual stream `[T, D]` in front of every layer and behind the last one (L + 1 of them); see `logits`."""
        frozen, skips = self.frozen, self.skips
        mlp_LTD = self.mlp.outputs(activation_S)
        attention_LTD = None if self.attention is None else self.attention.outputs()
        positions_T = torch.arange(self.n_positions, device=mlp_LTD.device)
        x_TD = frozen.token_embedding_TD
        if frozen.position_embedding_TD is not None:
            x_TD = x_TD + frozen.position_embedding_TD
        streams = [x_TD]
        for layer, attention in enumerate(frozen.attentions):
            attention_TD = attention.apply(x_TD) if attention_LTD is None else attention_LTD[layer]
            for written, y_TD in skips.apply(x_TD, 2 * layer, positions_T):
                mlp_LTD[written] += y_TD
            for written, y_TD in skips.apply(x_TD + attention_TD, 2 * layer + 1, positions_T):
                mlp_LTD[written] += y_TD
            x_TD = x_TD + attention_TD + mlp_LTD[layer] + skips.bias(layer)
            streams.append(x_TD)
        return streams


@torch.no_grad()
def localize(
    *,
    shape: ModelShape,
    crosscoder: Crosscoder,
    attention: Crosscoder | None,
    frozen: FrozenPrompt,
    unembedding: Unembedding,
) -> LocalReplacement:
    """Decompose the clean activations of a frozen prompt.

    Raises:
        ValueError: a crosscoder that is no affine function of the frozen residual stream.
    """
    check_localizable(crosscoder, attention, shape)
    return LocalReplacement(
        shape=shape,
        frozen=frozen,
        mlp=Decomposition.of("mlp_out", crosscoder, frozen),
        attention=None if attention is None else Decomposition.of("attn_out", attention, frozen),
        unembedding=unembedding,
    )


def check_localizable(crosscoder: Crosscoder, attention: Crosscoder | None, shape: ModelShape) -> None:
    """Refuse crosscoders whose features the frozen linear model cannot attribute; they can be spliced all the same.

    Raises:
        ValueError: the crosscoder of the MLPs reads a site off the residual stream, or that of attention has skip connections,
            groups that read several layers, or groups that are not in the order of their layers.
    """
    for site in crosscoder.wiring.read_sites:
        try:
            read_depth(site, shape)
        except ValueError as error:
            raise ValueError(f"cannot attribute features of a crosscoder for MLPs that reads {site}: {error}") from None
    if attention is None:
        return
    if attention.skip:
        raise ValueError("cannot attribute features of an attention crosscoder with skip connections")
    if any(len(reads) > 1 for reads in attention.wiring.reads):
        raise ValueError(
            "cannot attribute features of an attention crosscoder whose groups read attn_z of several layers"
        )
    layers = [attention.wiring.group_layer(group) for group in range(attention.n_groups)]
    if sorted(set(layers)) != layers:
        raise ValueError(
            f"cannot name features by layer: the attention crosscoder's groups belong to the layers {layers}"
        )
