"""Freeze one prompt: run the original model once, fix its attention patterns and norm scales, and prove nothing was lost.

Everything that is rebuilt from frozen parts is compared with what the model computed, at every position by the scale of that
position. One scale for the whole prompt would be that of the first token, whose activations are 1,000 times larger than all
others in many models (attention sinks: GPT-2, Llama, Gemma), and would hide any error behind it.

Arithmetic has at least 32 bits. The weights of a 16-bit model stay as they are and are raised to float32 while a layer
computes (`sixteen_bits.py`): the prompt is frozen in the model "these weights, float32 arithmetic".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.crosscoder.rotation import Rotation
from replacement.crosscoder.sites import Site
from replacement.language_model.bridge_parts import BridgeParts
from replacement.language_model.bridge_scores import (
    head_norm_scale,
    query_key_hook_names,
    query_key_weights,
    rotation_of,
)
from replacement.language_model.frozen_layers import FrozenAttention, FrozenNorm
from replacement.language_model.queries_and_keys import FrozenQueryKey, QueryKeyWeights

# Rounding of a rebuilt activation, relative to the largest term of its sum; anything above is a different computation.
_EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
# Attention may write next to nothing at a position (heads that cancel, or that look at a sink whose value is about zero). Its
# rounding there is still that of the products it is summed from, so the scale of a position is no less than this share of
# what the layer writes to a typical stream. That size comes from the weights: no outlier and no silent layer changes it.
_QUIET = 0.01


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
    logit_gap_16bit: float | None = None
    """Largest difference, at any position, between these logits (soft-cap included) and those of the model in its own 16-bit
    arithmetic; None for float32 and float64 models, whose logits these are."""


def freeze(parts: BridgeParts, tokens_T: Tensor, *, sites: Iterable[Site] = ()) -> FrozenPrompt:
    """Run one prompt and fix its attention patterns and norm scales.

    Args:
        parts: the model.
        tokens_T: token ids of one prompt.
        sites: sites whose clean activations are wanted besides `mlp_out`.

    Raises:
        ValueError: the frozen parts do not give the model's own activations back (the architecture is named).
    """
    layers = range(parts.shape.n_layers)
    names = {site: parts.hook_name(site) for site in {*sites, *(Site(layer, "mlp_out") for layer in layers)}}
    with parts.exact_arithmetic():
        output_TV, cache = parts.capture(tokens_T, set(names.values()) | parts.frozen_hook_names())
    frozen = FrozenPrompt(
        tokens_T=tokens_T,
        logits_TV=parts.unembedding().logits(cache["ln_final.hook_out"]),
        probabilities_TV=output_TV.softmax(-1),
        token_embedding_TD=cache["hook_embed"],
        position_embedding_TD=cache.get("hook_pos_embed"),
        attentions=tuple(_freeze_attention(parts, layer, cache) for layer in layers),
        norms_mlp=tuple(_freeze_norm(parts, parts.norm_before(layer, "mlp"), cache) for layer in layers),
        norm_final=_freeze_norm(parts, "ln_final", cache),
        activations={site: cache[name].flatten(1) for site, name in names.items()},
        logit_gap_16bit=_logit_gap(parts, tokens_T, output_TV),
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
    if not 0 <= layer < parts.shape.n_layers:
        raise ValueError(f"the language model has no layer {layer}: it has {parts.shape.n_layers} layers")
    weights, block = query_key_weights(parts, layer), f"blocks.{layer}"
    with parts.exact_arithmetic():
        _, cache = parts.capture(tokens_T, query_key_hook_names(parts, layer))
    attention = {name.removeprefix(f"{block}.attn."): x for name, x in cache.items()}
    shown_HTT, pattern_HTT = attention["hook_attn_scores"], attention["hook_pattern"]
    # Where the wrapped module computes attention itself, TransformerLens has only the pattern to show at the scores' hook.
    shows_pattern = torch.equal(shown_HTT, pattern_HTT)
    visible_TT = torch.ones_like(pattern_HTT[0], dtype=torch.bool).tril()
    if not shows_pattern:
        visible_TT &= shown_HTT[0] > torch.finfo(shown_HTT.dtype).min / 2
    rotation = rotation_of(parts, layer, attention, len(tokens_T))
    own_HTT = _own_scores(weights, rotation, attention) if shows_pattern or weights.soft_cap is not None else shown_HTT
    frozen = FrozenQueryKey(
        weights=weights,
        scale_in_T=_norm_scale(parts, parts.norm_before(layer, "attention"), cache, len(tokens_T)),
        query_gain_HTK=weights.query_gain(head_norm_scale(parts, layer, "q_norm", attention), len(tokens_T)),
        key_gain_GTK=weights.key_gain(head_norm_scale(parts, layer, "k_norm", attention), len(tokens_T)),
        rotation=rotation,
        scores_HTT=own_HTT.masked_fill(~visible_TT, -torch.inf),
        pattern_HTT=pattern_HTT,
        visible_TT=visible_TT,
    )
    gap, head, query = _scores_gap(frozen, cache[f"{block}.hook_resid_pre"], own_HTT, shown_HTT)
    if not gap <= _EXACT[parts.exact_dtype]:
        raise ValueError(
            f"attention scores of {parts.architecture} cannot be attributed exactly: those of layer {layer}, rebuilt from "
            f"frozen queries and keys, are off by {gap:.1e} relative in head {head} at position {query}"
        )
    return frozen


def _own_scores(weights: QueryKeyWeights, rotation: Rotation | None, attention: Mapping[str, Tensor]) -> Tensor:
    """The model's own scores before any soft-cap, from its own queries and keys (rotated here if it does not show them so)."""
    q_HTK, k_GTK = (
        rotated.transpose(0, 1)
        if (rotated := attention.get(f"hook_rot_{name}")) is not None
        else _rotated(attention[f"{name}.hook_out"].transpose(0, 1), rotation)
        for name in "qk"
    )
    return q_HTK @ k_GTK.repeat_interleave(len(q_HTK) // len(k_GTK), 0).transpose(1, 2) * weights.scale


def _rotated(x_HTK: Tensor, rotation: Rotation | None) -> Tensor:
    return x_HTK if rotation is None else rotation.apply(x_HTK)


def _logit_gap(parts: BridgeParts, tokens_T: Tensor, output_TV: Tensor) -> float | None:
    """Largest distance of the logits from those of the model's own 16-bit arithmetic; None where it has none."""
    if parts.dtype == parts.exact_dtype:
        return None
    own_TV, _ = parts.capture(tokens_T, set())
    return max(
        float((own_V.to(output_V) - output_V).abs().max()) for own_V, output_V in zip(own_TV, output_TV, strict=True)
    )


def _freeze_attention(parts: BridgeParts, layer: int, cache: Mapping[str, Tensor]) -> FrozenAttention:
    block = f"blocks.{layer}"
    scale_out = cache.get(f"{block}.ln1_post.hook_scale")
    return parts.attention_weights(layer).freeze(
        cache[f"{block}.attn.hook_pattern"],
        _norm_scale(parts, parts.norm_before(layer, "attention"), cache, len(cache["ln_final.hook_in"])),
        None if scale_out is None else scale_out[:, 0],
    )


def _freeze_norm(parts: BridgeParts, path: str | None, cache: Mapping[str, Tensor]) -> FrozenNorm:
    return parts.norm_weights(path).freeze(_norm_scale(parts, path, cache, len(cache["ln_final.hook_in"])))


def _norm_scale(parts: BridgeParts, path: str | None, cache: Mapping[str, Tensor], n_positions: int) -> Tensor:
    """Scale `[T]` of a norm; ones where there is none."""
    if path is None:
        return torch.ones(n_positions, dtype=parts.exact_dtype, device=parts.device)
    return cache[f"{path}.hook_scale"][:, 0]


def _check_exact(frozen: FrozenPrompt, output_TV: Tensor, cache: Mapping[str, Tensor], parts: BridgeParts) -> None:
    """Compare every rebuilt activation with the one the model computed."""
    for part, rebuilt, actual, terms in _rebuilt(frozen, output_TV, cache, parts):
        scale_T1 = torch.stack([term.abs().amax(-1) for term in (actual, *terms)]).amax(0)[:, None]
        gap, (position, _) = _largest_gap(rebuilt - actual, scale_T1)
        if not gap <= _EXACT[parts.exact_dtype]:
            raise ValueError(
                f"{parts.architecture} cannot be linearised exactly: the {part}, rebuilt from frozen parts, "
                f"is off by {gap:.1e} relative at position {position}"
            )


def _rebuilt(
    frozen: FrozenPrompt, output_TV: Tensor, cache: Mapping[str, Tensor], parts: BridgeParts
) -> Iterator[tuple[str, Tensor, Tensor, tuple[Tensor, ...]]]:
    """Each rebuilt activation: its name, its value, what the model computed, and the terms it is the sum of."""
    position = frozen.position_embedding_TD
    embeddings = (frozen.token_embedding_TD,) if position is None else (frozen.token_embedding_TD, position)
    yield "embedding", sum(embeddings[1:], embeddings[0]), cache["blocks.0.hook_resid_pre"], embeddings
    for layer, attention in enumerate(frozen.attentions):
        block, weights = f"blocks.{layer}", attention.weights
        pre, written = cache[f"{block}.hook_resid_pre"], cache[f"{block}.hook_attn_out"]
        quiet_T1 = torch.full_like(pre[:, :1], _QUIET)
        scale_out_T1 = 1 if attention.scale_out_T is None else attention.scale_out_T[:, None]
        typical_z, typical_output = weights.typical_sizes()
        quiet_output_T1 = quiet_T1 * typical_output / scale_out_T1
        yield f"attention of layer {layer}", attention.apply(pre), written, (quiet_output_T1,)
        if (z := frozen.activations.get(Site(layer, "attn_z"))) is not None:
            yield f"mixed values of layer {layer}", attention.z(pre), z, (quiet_T1 * typical_z,)
        for kind in ("attn_in", "attn_normalized"):
            if (read := frozen.activations.get(Site(layer, kind))) is not None:
                rebuilt = weights.norm_before(kind).freeze(attention.scale_in_T).apply(pre)
                yield f"{kind} of layer {layer}", rebuilt, read, ()
        mlp_reads = pre if parts.shape.parallel else pre + written
        norm = frozen.norms_mlp[layer]
        yield f"MLP norm of layer {layer}", norm.apply(mlp_reads), cache[f"{block}.mlp.hook_in"], ()
        if (shown := frozen.activations.get(Site(layer, "mlp_normalized"))) is not None:
            yield f"MLP norm of layer {layer} before its gain", norm.without_gain.apply(mlp_reads), shown, ()
        terms = (pre, written, frozen.activations[Site(layer, "mlp_out")])
        last = layer + 1 == parts.shape.n_layers
        for name in (f"{block}.hook_resid_post", "ln_final.hook_in" if last else f"blocks.{layer + 1}.hook_resid_pre"):
            yield f"residual sum of layer {layer}", pre + written + terms[2], cache[name], terms
    yield "final norm", frozen.norm_final.apply(cache["ln_final.hook_in"]), cache["ln_final.hook_out"], ()
    yield "unembedding", parts.soft_cap(frozen.logits_TV), output_TV, ()


def _scores_gap(
    frozen: FrozenQueryKey, stream_TD: Tensor, own_HTT: Tensor, shown_HTT: Tensor
) -> tuple[float, int, int]:
    """Largest relative gap, its head and its query: of rebuilt scores, and of what the softmax makes of them or reads."""
    visible_TT = frozen.visible_TT
    rebuilt_HTT, bound_HTT = frozen.scores(stream_TD), frozen.largest_scores(stream_TD)
    capped_HTT, capped_bound_HTT = frozen.weights.cap(rebuilt_HTT), bound_HTT
    if torch.equal(shown_HTT, frozen.pattern_HTT):
        capped_HTT = capped_HTT.masked_fill(~visible_TT, -torch.inf).softmax(-1)
        # A change d of the scores changes the softmax p by p (d - sum p d).
        mean_HT1 = (capped_HTT * bound_HTT).sum(-1, keepdim=True)
        capped_bound_HTT = (capped_HTT * (1 + bound_HTT + mean_HT1)).clamp(min=1e-3)
    pairs = ((rebuilt_HTT, own_HTT, bound_HTT), (capped_HTT, shown_HTT, capped_bound_HTT))
    gaps = [_largest_gap((x - y).masked_fill(~visible_TT, 0), bound) for x, y, bound in pairs]
    gap, (head, query, _) = max(gaps)
    return gap, head, query


def _largest_gap(difference: Tensor, scale: Tensor) -> tuple[float, list[int]]:
    """The largest `|difference| / scale`, infinite where it is NaN, and its place."""
    gap = (difference.abs() / scale.clamp(min=1e-12)).nan_to_num(torch.inf, torch.inf)
    place = torch.unravel_index(gap.argmax(), gap.shape)
    return float(gap[place]), [int(index) for index in place]
