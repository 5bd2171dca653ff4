"""The local replacement model of one prompt: features, error terms, frozen attention. It equals the original model there.

T tokens, L layers, D d_model, S active features, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder import Crosscoder
from replacement.features import Features
from replacement.freezing import FrozenPrompt
from replacement.sites import ModelShape, Site


@dataclass(frozen=True, slots=True)
class LocalReplacement:
    """One prompt, with every MLP output written as features + decoder bias + skip + error.

    Between features it is linear: attention patterns and norm scales are fixed at their values on this prompt.
    """

    shape: ModelShape
    """Sizes of the language model."""
    crosscoder: Crosscoder
    """Whose features these are."""
    frozen: FrozenPrompt
    """Attention, norms, embeddings and clean activations."""
    features: Features
    """Active features; row = token position."""
    pre_activation_S: Float[Tensor, " S"]
    """Pre-activation of every active feature, as the crosscoder computed it."""
    errors_LTD: Float[Tensor, "L T D"]
    """MLP output minus reconstruction; the whole MLP output at a layer the crosscoder does not write."""
    W_U: Float[Tensor, "D V"]
    """Unembedding `[D, V]`."""
    b_U: Float[Tensor, " V"]
    """Unembedding bias `[V]`."""

    @property
    def n_positions(self) -> int:
        """Number of tokens T."""
        return len(self.frozen.tokens_T)

    @property
    def probabilities(self) -> Tensor:
        """Next-token probabilities `[T, V]` of the original model, soft-cap included."""
        return self.frozen.probabilities_TV

    def mlp_outputs(self, activation_S: Tensor | None = None) -> Tensor:
        """MLP outputs `[L, T, D]`: features (at the given activations, or their own) + bias + skip + error."""
        features = self.features if activation_S is None else self.features.replace_activations(activation_S)
        written = self.crosscoder.decode(features)
        skipped = self.crosscoder.skip_contribution(self.frozen.activations)
        out = self.errors_LTD.clone()
        for site, y_TD in written.items():
            out[site.layer] += y_TD + skipped.get(site, 0)
        return out

    def logits(self, activation_S: Tensor | None = None) -> Tensor:
        """Logits `[T, V]` before any soft-cap, through the frozen linear model.

        Args:
            activation_S: activations to hold the features at; their own by default, and then these are the original
                model's logits up to rounding. Skip terms keep their clean inputs.
        """
        frozen, mlp_LTD = self.frozen, self.mlp_outputs(activation_S)
        x_TD = frozen.token_embedding_TD
        if frozen.position_embedding_TD is not None:
            x_TD = x_TD + frozen.position_embedding_TD
        for attention, mlp_TD in zip(frozen.attentions, mlp_LTD, strict=True):
            x_TD = x_TD + attention.apply(x_TD) + mlp_TD
        return frozen.norm_final.apply(x_TD) @ self.W_U + self.b_U


def localize(
    *, shape: ModelShape, crosscoder: Crosscoder, frozen: FrozenPrompt, unembedding: tuple[Tensor, Tensor]
) -> LocalReplacement:
    """Encode the clean activations of a frozen prompt and set the error terms that make the sum exact."""
    with torch.no_grad():
        reads = {site: frozen.activations[site] for site in crosscoder.wiring.read_sites}
        output = crosscoder(reads)
        errors = torch.stack([frozen.activations[Site(layer, "mlp_out")] for layer in range(shape.n_layers)])
        for site, y_TD in output.reconstructions.items():
            errors[site.layer] -= y_TD
        return LocalReplacement(
            shape=shape,
            crosscoder=crosscoder,
            frozen=frozen,
            features=output.features,
            pre_activation_S=_pre_activations(crosscoder, output.features, frozen),
            errors_LTD=errors,
            W_U=unembedding[0],
            b_U=unembedding[1],
        )


def _pre_activations(crosscoder: Crosscoder, features: Features, frozen: FrozenPrompt) -> Tensor:
    """Pre-activation of the active features alone: one inner product each."""
    parts = []
    for group in range(crosscoder.n_groups):
        active = features.of(group)
        pre_S = crosscoder.b_enc[group][active.index]
        for site in crosscoder.wiring.reads[group]:
            rows_SD = frozen.activations[site][active.row]
            pre_S = pre_S + (rows_SD * crosscoder.encoder(group, site)[active.index]).sum(-1)
        parts.append(pre_S)
    return torch.cat(parts)
