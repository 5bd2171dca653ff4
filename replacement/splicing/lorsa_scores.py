"""Attention scores of low-rank sparse attention on one prompt, as the bilinear maps that the model's own heads have."""

from __future__ import annotations

import torch
from torch import Tensor

from replacement.crosscoder.lorsa import Lorsa
from replacement.language_model.frozen_layers import NormWeights
from replacement.language_model.queries_and_keys import FrozenQueryKey, QueryKeyWeights
from replacement.splicing.local_replacement import LocalReplacement


@torch.no_grad()
def freeze_query_key_groups(local: LocalReplacement, *, layer: int) -> FrozenQueryKey:
    """Queries and keys of the query-key groups of one layer, with norm scales and rotations fixed; groups stand for heads.

    Raises:
        ValueError: attention is not replaced by low-rank sparse attention, or not in this layer.
    """
    if local.attention is None or not isinstance(local.attention.crosscoder, Lorsa):
        raise ValueError(
            "this model has no query-key groups: its attention is not replaced by low-rank sparse attention"
        )
    lorsa, frozen = local.attention.crosscoder, local.frozen
    group = lorsa.wiring.group_of(layer)
    (site,), attention, sizes = lorsa.wiring.reads[group], frozen.attentions[layer], lorsa.query_keys
    x_TD, scale = frozen.activations[site], lorsa.input_scale(group)
    norms, norm_scales = dict[str, NormWeights | None](), dict[str, Tensor | None]()
    for name in ("Q", "K"):
        norms[name] = norm_scales[name] = None
        if sizes.norm_epsilon is not None:
            gain_X = getattr(lorsa, f"gain_{name}")[group].flatten()
            norms[name] = NormWeights(gain_X, torch.zeros_like(gain_X), centred=False)
            made_QTC = torch.einsum("td,qdc->qtc", x_TD * scale, getattr(lorsa, f"W_{name}")[group])
            made_QTC = made_QTC + getattr(lorsa, f"b_{name}")[group][:, None]
            norm_scales[name] = (made_QTC.square().mean(-1, keepdim=True) + sizes.norm_epsilon).sqrt()
    weights = QueryKeyWeights.fold(
        W_Q=lorsa.W_Q[group] * scale,
        W_K=lorsa.W_K[group] * scale,
        b_Q=lorsa.b_Q[group],
        b_K=lorsa.b_K[group],
        norm_in=attention.weights.norm_before(site.kind),
        query_norm=norms["Q"],
        key_norm=norms["K"],
        scale=sizes.width**-0.5,
        soft_cap=None,
    )
    T = len(x_TD)
    q_QTC, k_QTC = (channels[0] for channels in lorsa.queries_and_keys(x_TD[None] * scale, group))
    visible_TT = torch.ones(T, T, dtype=torch.bool, device=x_TD.device).tril()
    rotary = sizes.rotary
    return FrozenQueryKey(
        weights=weights,
        scale_in_T=attention.scale_in_T,
        query_gain_HTK=weights.query_gain(norm_scales["Q"], T),
        key_gain_GTK=weights.key_gain(norm_scales["K"], T),
        rotation=None if rotary is None else rotary.rotation(T, dtype=x_TD.dtype, device=x_TD.device),
        scores_HTT=(q_QTC @ k_QTC.transpose(1, 2)).masked_fill(~visible_TT, -torch.inf),
        pattern_HTT=local.attention.patterns[group],
        visible_TT=visible_TT,
    )
