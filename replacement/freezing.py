"""Freeze one prompt: run the original model once, fix its attention patterns and norm scales, and prove nothing was lost.

Letters: T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.bridge_parts import BridgeParts
from replacement.frozen import FrozenAttention, FrozenNorm
from replacement.sites import Site

# Rounding of the rebuilt activations, relative to their largest entry; anything above is a different computation.
_EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True)
class FrozenPrompt:
    """One prompt's run through the original model, with everything the linear maps need."""

    tokens_T: Int[Tensor, " T"]
    """Token ids."""
    logits_TV: Float[Tensor, "T V"]
    """Logits of the original model, before any soft-cap."""
    probabilities_TV: Float[Tensor, "T V"]
    """Next-token probabilities of the original model, soft-cap included."""
    token_embedding_TD: Float[Tensor, "T D"]
    """Token embeddings as they enter the residual stream."""
    position_embedding_TD: Float[Tensor, "T D"] | None
    """Learned position embeddings; None for rotary models."""
    attentions: tuple[FrozenAttention, ...]
    """One per layer."""
    norms_mlp: tuple[FrozenNorm, ...]
    """The norm in front of each MLP."""
    norm_final: FrozenNorm
    """The norm in front of the unembedding."""
    activations: Mapping[Site, Tensor]
    """Clean activations `[T, D]` at `mlp_out` of every layer and at the sites asked for (`attn_z`: heads concatenated)."""


def freeze(parts: BridgeParts, tokens_T: Tensor, *, sites: Iterable[Site] = ()) -> FrozenPrompt:
    """Run one prompt and fix its attention patterns and norm scales.

    Args:
        parts: the model.
        tokens_T: token ids of one prompt.
        sites: sites whose clean activations are wanted besides `mlp_out`.

    Raises:
        ValueError: the frozen parts do not give the model's own activations back (the architecture is named).
    """
    if parts.dtype not in _EXACT:
        raise ValueError(f"exact attribution needs float32 or float64 weights, the model is loaded in {parts.dtype}")
    layers = range(parts.shape.n_layers)
    names = {parts.hook_name(site): site for site in {*sites, *(Site(layer, "mlp_out") for layer in layers)}}
    output_TV, cache = parts.capture(tokens_T, set(names) | parts.frozen_hook_names())
    W_U, b_U = parts.unembedding()
    frozen = FrozenPrompt(
        tokens_T=tokens_T,
        logits_TV=cache["ln_final.hook_out"] @ W_U + b_U,
        probabilities_TV=output_TV.softmax(-1),
        token_embedding_TD=cache["hook_embed"],
        position_embedding_TD=cache.get("hook_pos_embed"),
        attentions=tuple(_freeze_attention(parts, layer, cache) for layer in layers),
        norms_mlp=tuple(_freeze_norm(parts, f"blocks.{layer}.ln2", cache) for layer in layers),
        norm_final=_freeze_norm(parts, "ln_final", cache),
        activations={site: cache[name].flatten(1) for name, site in names.items()},
    )
    _check_exact(frozen, output_TV, cache, parts)
    return frozen


def _freeze_attention(parts: BridgeParts, layer: int, cache: Mapping[str, Tensor]) -> FrozenAttention:
    block = f"blocks.{layer}"
    scale_out = cache.get(f"{block}.ln1_post.hook_scale")
    return parts.attention_weights[layer].freeze(
        cache[f"{block}.attn.hook_pattern"],
        cache[f"{block}.ln1.hook_scale"][:, 0],
        None if scale_out is None else scale_out[:, 0],
    )


def _freeze_norm(parts: BridgeParts, path: str, cache: Mapping[str, Tensor]) -> FrozenNorm:
    return parts.norm_weights(path).freeze(cache[f"{path}.hook_scale"][:, 0])


def _check_exact(frozen: FrozenPrompt, output_TV: Tensor, cache: Mapping[str, Tensor], parts: BridgeParts) -> None:
    """Compare each rebuilt activation with the one the model computed."""
    embedding = frozen.token_embedding_TD
    if frozen.position_embedding_TD is not None:
        embedding = embedding + frozen.position_embedding_TD
    pairs = [("embedding", embedding, cache["blocks.0.hook_resid_pre"])]
    for layer, attention in enumerate(frozen.attentions):
        pre = cache[f"blocks.{layer}.hook_resid_pre"]
        written = cache[f"blocks.{layer}.hook_attn_out"]
        post = pre + written + frozen.activations[Site(layer, "mlp_out")]
        mlp_reads = pre if parts.shape.parallel else pre + written
        pairs.append((f"attention of layer {layer}", attention.apply(pre), written))
        if (z := frozen.activations.get(Site(layer, "attn_z"))) is not None:
            pairs.append((f"mixed values of layer {layer}", attention.z(pre), z))
        pairs.append((f"residual sum of layer {layer}", post, cache[f"blocks.{layer}.hook_resid_post"]))
        pairs.append(
            (
                f"MLP norm of layer {layer}",
                frozen.norms_mlp[layer].apply(mlp_reads),
                cache[f"blocks.{layer}.mlp.hook_in"],
            )
        )
    final = cache["ln_final.hook_in"]
    pairs.append(("final norm", frozen.norm_final.apply(final), cache["ln_final.hook_out"]))
    pairs.append(("unembedding", parts.soft_cap(frozen.logits_TV), output_TV))
    for part, rebuilt, actual in pairs:
        gap = float((rebuilt - actual).abs().max() / actual.abs().max().clamp(min=1e-12))
        if not gap <= _EXACT[parts.dtype]:
            raise ValueError(
                f"{parts.architecture} cannot be linearised exactly: the {part}, rebuilt from frozen parts, "
                f"is off by {gap:.1e} relative"
            )
