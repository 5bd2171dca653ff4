"""Start low-rank sparse attention at the language model's own heads instead of at random queries, keys and values.

Query-key group q of a layer begins as original head `q % H`: its queries and keys, with their norm and their rotary positions.
The value vectors of its heads begin as random directions that the original head's values read. What sparse heads cannot have is
left out: soft-caps of scores, windows, attention sinks.

Letters: H heads of the model, K their width; Q groups of queries and keys, C their width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.rotation import Rotary, Rotation
from replacement.language_model.bridge_scores import query_key_weights, read_rotation, value_weights
from replacement.language_model.language_model import LanguageModel
from replacement.training.scaling import Statistics


def query_keys_like(lm: LanguageModel, *, n_groups: int, width: int) -> QueryKeys:
    """Queries and keys of the kind that the model's heads have.

    They get the rotary positions of the first layer that has some, and a norm where heads have one each.

    Raises:
        ValueError: fewer channels than the model rotates.
    """
    rotations = (_rotation(lm, layer) for layer in range(lm.shape.n_layers))
    rotation = next((rotation for rotation in rotations if rotation is not None), None)
    norms = [path for path in lm.parts.head_norms(0) if lm.parts.norm_acts_on_heads(path)]
    return QueryKeys(
        n_groups=n_groups,
        width=width,
        rotary=None if rotation is None else Rotary.of_rotation(rotation),
        norm_epsilon=lm.parts.norm_epsilon(norms[0]) if norms else None,
    )


@torch.no_grad()
def start_at_heads(crosscoder: Lorsa, lm: LanguageModel, statistics: Statistics, *, seed: int) -> None:
    """Set queries, keys and values of a fresh Lorsa that lives in scaled activations; decoders stay zero.

    Args:
        crosscoder: that can begin so, see `check_can_begin`.
        seed: of the directions of the value vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    n_heads, width = lm.shape.n_heads, crosscoder.query_keys.width
    head_Q = torch.arange(crosscoder.query_keys.n_groups) % n_heads
    for group, (site,) in enumerate(crosscoder.wiring.reads):
        weights = query_key_weights(lm.parts, site.layer, fold_norm=False)
        key_head_Q = head_Q // (n_heads // len(weights.W_K_GKD))
        # Scores of a Lorsa are divided by sqrt(C), those of the model multiplied by a factor of its own.
        factor, scale = weights.scale * width**0.5, statistics.scales[site]
        gains = crosscoder.query_keys.norm_epsilon is not None
        query_factor = 1.0 if gains else factor
        crosscoder.W_Q[group].copy_(weights.W_Q_HKD[head_Q].transpose(1, 2) * query_factor / scale)
        crosscoder.b_Q[group].copy_(weights.b_Q_HK[head_Q] * query_factor)
        crosscoder.W_K[group].copy_(weights.W_K_GKD[key_head_Q].transpose(1, 2) / scale)
        crosscoder.b_K[group].copy_(weights.b_K_GK[key_head_Q])
        if weights.query_norm_HK is not None and weights.key_norm_GK is not None and gains:
            crosscoder.gain_Q[group].copy_(weights.query_norm_HK[head_Q] * factor)
            crosscoder.gain_K[group].copy_(weights.key_norm_GK[key_head_Q])
        W_V_QDK = value_weights(lm.parts, site.layer)[head_Q]
        drawn_QfK = torch.randn(len(head_Q), crosscoder.heads_per_group, W_V_QDK.shape[2], generator=generator)
        v_QfD = drawn_QfK.to(W_V_QDK) @ W_V_QDK.transpose(1, 2)
        v_FD = torch.nn.functional.normalize(v_QfD.flatten(0, 1), dim=1) / 3**0.5  # as long as random ones are
        crosscoder.encoders(group)[0].copy_(v_FD)
        crosscoder.b_enc[group].copy_(-v_FD.to(statistics.means[site]) @ statistics.means[site])


def check_can_begin(crosscoder: Lorsa, lm: LanguageModel) -> None:
    """Check that a Lorsa can have the queries and keys of the model's heads.

    Raises:
        ValueError: it has another width, rotary positions or norms than those of a layer, or their scores have other parts
            (ALiBi); names the first such layer.
    """
    sizes = crosscoder.query_keys
    for (site,) in crosscoder.wiring.reads:
        rotation, norms = _rotation(lm, site.layer), lm.parts.head_norms(site.layer)
        same_positions = (
            rotation is None if sizes.rotary is None else rotation is not None and sizes.rotary.matches(rotation)
        )
        by_head = all(lm.parts.norm_acts_on_heads(path) for path in norms)
        reasons = {
            f"they have {lm.shape.d_head} channels, not {sizes.width}": lm.shape.d_head != sizes.width,
            "their positions are not those of the first layer, or of no kind that is known": not same_positions,
            "their norms act on several heads at once, or on queries or keys alone": not by_head
            or len(norms) != 2 * (sizes.norm_epsilon is not None),
        }
        if why := [reason for reason, is_so in reasons.items() if is_so]:
            raise ValueError(f"cannot begin with queries and keys of layer {site.layer} (start='heads'): {why[0]}")
        lm.freeze_query_key(_tokens(lm), layer=site.layer)  # refuses what adds to scores besides


def _rotation(lm: LanguageModel, layer: int) -> Rotation | None:
    return read_rotation(lm.parts, layer, _tokens(lm))


def _tokens(lm: LanguageModel) -> Tensor:
    return torch.arange(min(16, lm.context_length), device=lm.device) % lm.vocabulary_size
