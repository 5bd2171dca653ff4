"""What a graph predicts of logits when the final norm follows the change instead of being held.

With everything else frozen the last residual stream x is linear in what nodes write, and a logit is

    logit(x) = direction . (gain * centre(x) / scale(x)) + constant

A graph holds `scale` at its value on the prompt. What it knows of the nodes gives the changed stream x' as well, and with it

    logit(x') - logit(x) = (value + change - constant) * scale(x) / scale(x') - (value - constant)

where `change` is the prediction with the scale held. A norm divides by `sqrt(mean(centre(x)^2) + epsilon)`, with or without a
centre, so that the difference of squares gives `scale(x')` whatever epsilon is.

B changes, N nodes, S nodes that change in any of them, M logit targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.grounding import Grounding
from circuits.graph.nodes import NodeKind
from replacement import LocalReplacement


def with_final_norm(
    grounding: Grounding, changes: Sequence[Mapping[int, float]], change_BN: np.ndarray, *, total: bool
) -> np.ndarray:
    """float64[B, N], predicted changes with those of logits as the final norm makes them.

    Args:
        changes: in each case, the nodes that are scaled together and the relative change of each.
        change_BN: what `predicted_changes` makes of them, with the scale held.
        total: whether features react, as in `change_BN`; otherwise nothing writes anything else than the scaled nodes.
    """
    nodes, local = grounding.graph.nodes, grounding.local
    if not grounding.logits:
        return change_BN
    relative_BN = np.zeros_like(change_BN)
    if total:
        reacts = nodes.mask(NodeKind.FEATURE) & (nodes.activation != 0)
        relative_BN[:, reacts] = change_BN[:, reacts] / nodes.activation[reacts]
    for relative_N, change in zip(relative_BN, changes, strict=True):
        relative_N[list(change)] = list(change.values())
    position = torch.tensor([logit.position for logit in grounding.logits], device=local.device)
    offset_D = local.frozen.norm_final.bias_D
    constant = np.array([float(logit.direction_D @ offset_D) + logit.bias for logit in grounding.logits])
    linear = np.array([logit.value for logit in grounding.logits]) - constant
    logit_nodes, found_BN = np.flatnonzero(nodes.mask(NodeKind.LOGIT)), change_BN.copy()
    clean_MD = local.streams()[-1][position]
    for row, changed in enumerate(_changed(grounding, relative_BN)):
        ratio = _scale_ratio(local, position, clean_MD, changed.streams()[-1][position])
        found_BN[row, logit_nodes] = (linear + change_BN[row, logit_nodes]) * ratio - linear
    return found_BN


def _changed(grounding: Grounding, relative_BN: np.ndarray) -> Iterator[LocalReplacement]:
    """The local replacement model with all that nodes write changed by a share of it, for every change."""
    local, chosen = grounding.local, np.flatnonzero(relative_BN.any(0))
    position_S = torch.from_numpy(grounding.graph.nodes.position[chosen].astype(np.int64)).to(local.device)
    written, (token_S, embedding_SD) = grounding.writes(chosen), grounding.embeddings(chosen)
    for relative_N in relative_BN:
        relative_S = torch.from_numpy(relative_N[chosen]).to(local.device, local.dtype)
        parts = []
        for part, layers in zip(local.decompositions, written, strict=True):
            errors_LTD = part.errors_LTD.clone()
            for errors_TD, (place_S, vectors_SD) in zip(errors_LTD, layers, strict=True):
                errors_TD.index_add_(0, position_S[place_S], vectors_SD * relative_S[place_S, None])
            parts.append(replace(part, errors_LTD=errors_LTD))
        embedding_TD = local.frozen.token_embedding_TD.clone()
        embedding_TD.index_add_(0, position_S[token_S], embedding_SD * relative_S[token_S, None])
        frozen = replace(local.frozen, token_embedding_TD=embedding_TD)
        yield replace(local, frozen=frozen, mlp=parts[0], attention=parts[1] if len(parts) > 1 else None)


def _scale_ratio(local: LocalReplacement, position: Tensor, clean_MD: Tensor, stream_MD: Tensor) -> np.ndarray:
    """`scale(x) / scale(x')` at every logit's position; 1 in a model without a final norm."""
    norm = local.frozen.norm_final
    scale = norm.scale_T[position].double()
    before, after = (_mean_square(x_MD.double(), centred=norm.centred) for x_MD in (clean_MD, stream_MD))
    epsilon = scale.square() - before
    has_norm = epsilon.abs() <= 1e-2 * scale.square() + 1e-3
    ratio = scale / (after + epsilon).clamp(min=1e-12).sqrt()
    return np.asarray(torch.where(has_norm, ratio, torch.ones_like(ratio)).cpu())


def _mean_square(x_MD: Tensor, *, centred: bool) -> Tensor:
    return (x_MD - x_MD.mean(-1, keepdim=True) if centred else x_MD).square().mean(-1)
