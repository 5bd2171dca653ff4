"""Freeze one prompt: run the original model once, fix its attention patterns and norm scales, and prove nothing was lost.

Letters: T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.crosscoder.sites import Site
from replacement.language_model.bridge_parts import BridgeParts
from replacement.language_model.frozen_layers import FrozenAttention, FrozenNorm
from replacement.language_model.queries_and_keys import FrozenQueryKey, QueryKeyWeights

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
    _require_exact_dtype(parts)
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


@torch.no_grad()
def freeze_query_key(parts: BridgeParts, tokens_T: Tensor, *, layer: int) -> FrozenQueryKey:
    """Run one prompt and fix what makes one layer's attention scores: norm scales (of the stream, and of queries and keys
    where the model has such norms) and the rotation of every position.

    Raises:
        ValueError: no such layer, or the frozen parts do not give the model's own scores back (the architecture is named):
            scores that something besides queries and keys adds to (ALiBi), or a rotation of another kind.
    """
    _require_exact_dtype(parts)
    if not 0 <= layer < parts.shape.n_layers:
        raise ValueError(f"the language model has no layer {layer}: it has {parts.shape.n_layers} layers")
    weights, block = parts.query_key_weights(layer), f"blocks.{layer}"
    _, cache = parts.capture(tokens_T, parts.query_key_hook_names(layer))
    attention = {name.removeprefix(f"{block}.attn."): x for name, x in cache.items()}
    shown_HTT, pattern_HTT = attention["hook_attn_scores"], attention["hook_pattern"]
    # Where the wrapped module computes attention itself, TransformerLens has only the pattern to show at the scores' hook.
    shows_pattern = torch.equal(shown_HTT, pattern_HTT)
    visible_TT = torch.ones_like(pattern_HTT[0], dtype=torch.bool).tril()
    if not shows_pattern:
        visible_TT &= shown_HTT[0] > torch.finfo(shown_HTT.dtype).min / 2
    own_HTT = _own_scores(weights, attention) if shows_pattern or weights.soft_cap is not None else shown_HTT
    frozen = FrozenQueryKey(
        weights=weights,
        scale_in_T=cache[f"{block}.ln1.hook_scale"][:, 0],
        query_gain_HTK=weights.query_gain(attention.get("q_norm.hook_scale"), len(tokens_T)),
        key_gain_GTK=weights.key_gain(attention.get("k_norm.hook_scale"), len(tokens_T)),
        cos_TR=attention.get("hook_cos"),
        sin_TR=attention.get("hook_sin"),
        scores_HTT=own_HTT.masked_fill(~visible_TT, -torch.inf),
        pattern_HTT=pattern_HTT,
        visible_TT=visible_TT,
    )
    rebuilt_HTT = frozen.scores(cache[f"{block}.hook_resid_pre"])
    capped_HTT = weights.cap(rebuilt_HTT)
    if shows_pattern:
        capped_HTT = capped_HTT.masked_fill(~visible_TT, -torch.inf).softmax(-1)
    for rebuilt, actual in ((rebuilt_HTT, own_HTT), (capped_HTT, shown_HTT)):
        rebuilt, actual = rebuilt[:, visible_TT], actual[:, visible_TT]
        gap = float((rebuilt - actual).abs().max() / actual.abs().max().clamp(min=1e-12))
        if not gap <= _EXACT[parts.dtype]:
            raise ValueError(
                f"attention scores of {parts.architecture} cannot be attributed exactly: those of layer {layer}, rebuilt "
                f"from frozen queries and keys, are off by {gap:.1e} relative"
            )
    return frozen


def _own_scores(weights: QueryKeyWeights, attention: Mapping[str, Tensor]) -> Tensor:
    """The model's own scores before any soft-cap, from its own queries and keys (rotated ones where it has those)."""
    q_THK, k_TGK = (attention.get(f"hook_rot_{name}", attention[f"{name}.hook_out"]) for name in "qk")
    k_THK = k_TGK.repeat_interleave(q_THK.shape[1] // k_TGK.shape[1], 1)
    return torch.einsum("thk,shk->hts", q_THK, k_THK) * weights.scale


def _require_exact_dtype(parts: BridgeParts) -> None:
    if parts.dtype not in _EXACT:
        raise ValueError(f"exact attribution needs float32 or float64 weights, the model is loaded in {parts.dtype}")


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
