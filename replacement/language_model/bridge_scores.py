"""Access to the parts of a TransformerLens bridge that attention scores are made of: queries, keys, their norms and rotation.

Letters: T tokens, D d_model, H heads, K d_head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformer_lens.utilities.hf_utils import get_rotary_pct_from_config

from replacement.crosscoder.rotation import Rotation
from replacement.language_model.bridge_parts import BridgeParts
from replacement.language_model.queries_and_keys import QueryKeyWeights


def query_key_weights(parts: BridgeParts, layer: int, *, fold_norm: bool = True) -> QueryKeyWeights:
    """Query and key weights of one layer with the input norm folded in; without, they read `attn_in`."""
    attention = parts.bridge.blocks[layer].attn
    b_Q, b_K = attention.b_Q, attention.b_K
    scale, soft_cap = parts.score_scale_and_cap(layer)
    norms = {path.rpartition(".")[2]: parts.norm_weights(path) for path in parts.head_norms(layer)}
    return QueryKeyWeights.fold(
        W_Q=attention.W_Q.detach().to(parts.exact_dtype),
        W_K=attention.W_K.detach().to(parts.exact_dtype),
        b_Q=None if b_Q is None else b_Q.detach().to(parts.exact_dtype),
        b_K=None if b_K is None else b_K.detach().to(parts.exact_dtype),
        norm_in=parts.norm_weights(parts.norm_before(layer, "attention") if fold_norm else None),
        query_norm=norms.get("q_norm"),
        key_norm=norms.get("k_norm"),
        scale=scale,
        soft_cap=soft_cap,
    )


def query_key_hook_names(parts: BridgeParts, layer: int) -> set[str]:
    """Hooks that frozen queries and keys are made of and checked against, as far as this model has them."""
    hooks = ["hook_attn_scores", "hook_pattern", "hook_cos", "hook_sin", "hook_rot_q", "hook_rot_k"]
    hooks += ["q.hook_out", "k.hook_out", "q_norm.hook_scale", "k_norm.hook_scale"]
    names = {f"blocks.{layer}.{hook}" for hook in ("hook_resid_pre", "ln1.hook_scale")}
    return (names | {f"blocks.{layer}.attn.{hook}" for hook in hooks}) & set(parts.bridge.hook_dict)


def rotation_of(parts: BridgeParts, layer: int, shown: Mapping[str, Tensor], n_positions: int) -> Rotation | None:
    """Rotary embedding of one layer, from what its hooks showed, or from the table of a module that has it inside."""
    attention, cfg = parts.bridge.blocks[layer].attn, parts.bridge.cfg
    cos_TR, sin_TR = shown.get("hook_cos"), shown.get("hook_sin")
    table = getattr(attention.original_component, "embed_positions", None)
    if cos_TR is None and isinstance(table, Tensor):  # GPT-J
        sin_TR, cos_TR = table[:n_positions].to(parts.exact_dtype).repeat_interleave(2, -1).chunk(2, -1)
        return Rotation(cos_TR, sin_TR, neighbours=True)
    if cos_TR is None or sin_TR is None:
        return None
    if getattr(cfg, "rotary_interleaved_cos_sin", False):
        return Rotation(cos_TR, sin_TR, neighbours=True)
    if getattr(cfg, "rotary_adjacent_pairs", False):
        cos_TR, sin_TR = (x.chunk(2, -1)[0].repeat_interleave(2, -1) for x in (cos_TR, sin_TR))
        return Rotation(cos_TR, sin_TR, neighbours=True)
    if 2 * cos_TR.shape[-1] == parts.shape.d_head and get_rotary_pct_from_config(cfg) == 1:  # GPT-OSS
        cos_TR, sin_TR = torch.cat([cos_TR, cos_TR], -1), torch.cat([sin_TR, sin_TR], -1)
    return Rotation(cos_TR, sin_TR, neighbours=False)


def read_rotation(parts: BridgeParts, layer: int, tokens_T: Tensor) -> Rotation | None:
    """Rotary embedding of one layer at the positions of a prompt, from a run of the model."""
    prefix = f"blocks.{layer}.attn."
    _, cache = parts.capture(tokens_T, query_key_hook_names(parts, layer))
    shown = {name.removeprefix(prefix): x for name, x in cache.items()}
    return rotation_of(parts, layer, shown, len(tokens_T))


def value_weights(parts: BridgeParts, layer: int) -> Tensor:
    """Value weights `[H, D, K]` of one layer, those of shared heads repeated; they read `attn_in`."""
    W_V_GDK = parts.bridge.blocks[layer].attn.W_V.detach().to(parts.exact_dtype)
    return W_V_GDK.repeat_interleave(parts.shape.n_heads // len(W_V_GDK), 0)


def head_norm_scale(parts: BridgeParts, layer: int, name: str, shown: Mapping[str, Tensor]) -> Tensor | None:
    """Scale `[H or 1, T, 1]` of the norm of queries (`q_norm`) or keys (`k_norm`); None where there is none."""
    scale = shown.get(f"{name}.hook_scale")
    if scale is None or scale.ndim == 2:  # one norm of all heads at once: OLMo 2
        return None if scale is None else scale[None]
    # A norm with a gain for every head sees the positions first: Cohere.
    heads_last = getattr(parts.bridge.blocks[layer].attn, name).weight.ndim == 2
    return scale.transpose(0, 1) if heads_last else scale
