"""Low-rank sparse attention in the layout of `llama_scope.py`: what its folders hold besides what transcoders have.

    q = n(s x W_Q + b_Q), k = n(s x W_K + b_K), both rotated        P = causal softmax of q . k / attn_scale
    h = P (s x W_V^T + b_V)        t y = a W_O + b_D

Head f of `F = d_model * expansion_factor` uses the queries and keys of group `f // (F / n_qk_heads)`. n is the identity or,
with `use_post_qk_ln`, an RMS norm in each group with gains `ln_q.w` and `ln_k.w`. `attn_scale` is `sqrt(d_qk_head)` where it is
not given; another one is folded into the queries. Rotary frequencies are `rotary_base ** (-2 i / rotary_dim)`; with
`use_NTK_by_parts_rope` those of long wavelengths are divided by a factor (Llama 3). Refused: other positions, LayerNorm of
queries and keys, `rotary_scale` above 1. Source: `llamascopium/models` of the publishers' repository, 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from replacement.crosscoder.formats.tensor_files import Settings, TensorFile
from replacement.crosscoder.formats.writing import check_holds
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.rotation import Rotary

TABLES = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
"""Tensors of a folder that follow from its settings."""
CONTEXT = 2048
"""Context length that is written: the layout asks for one, for the size of its tables."""
_NTK = "use_NTK_by_parts_rope"


def read_query_keys(settings: Settings, n_features: int) -> tuple[QueryKeys, float]:
    """Sizes of queries and keys, and the factor of queries that makes up for another scale of scores than `sqrt(C)`.

    Raises:
        ValueError: names the file and the entry that is missing, of another kind, or says what a Lorsa cannot.
    """
    n_groups, width = settings.take("n_qk_heads", int), settings.take("d_qk_head", int)
    scale = settings.take("attn_scale", (int, float, type(None)), default=None)
    scale = math.sqrt(width) if scale is None else scale
    if n_groups < 1 or width < 1 or n_features % n_groups or not 0 < scale < math.inf:
        raise ValueError(
            f"{settings.path}: expected n_qk_heads that divide {n_features} heads, and d_qk_head and attn_scale above 0, got "
            f"{n_groups}, {width} and {scale}"
        )
    epsilon = float(settings.take("eps", (int, float), default=1e-6))
    norm = settings.take("normalization_type", (str, type(None)), default=None)
    has_norm = settings.take("use_post_qk_ln", bool, default=False)
    if has_norm and norm != "RMS":
        raise ValueError(f"{settings.path}: normalization_type: expected 'RMS' with use_post_qk_ln, got {norm!r:.50}")
    settings.ignore("n_ctx")
    try:
        query_keys = QueryKeys(
            n_groups=n_groups, width=width, rotary=_rotary(settings), norm_epsilon=epsilon if has_norm else None
        )
    except ValueError as error:
        raise ValueError(f"{settings.path}: {error}") from None
    return query_keys, math.sqrt(width) / scale


def _rotary(settings: Settings) -> Rotary | None:
    kind = settings.take("positional_embedding_type", str, default="rotary")
    n_channels = settings.take("rotary_dim", int)
    base = settings.take("rotary_base", (int, float), default=10_000)
    neighbours = settings.take("rotary_adjacent_pairs", bool, default=True)
    repeats = settings.take("rotary_scale", int, default=1)
    by_parts = settings.take(_NTK, bool, default=False)
    factor, low, high = (
        float(settings.take(f"NTK_by_parts_{name}", (int, float), default=1.0))
        for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    context = settings.take("old_context_len", int, default=2048)
    if kind == "none":
        return None
    if kind != "rotary" or repeats != 1:
        raise ValueError(f"expected rotary positions of scale 1, or none, got {kind!r:.50} of scale {repeats}")
    rotary = Rotary.of_base(n_channels, base=float(base), neighbours=neighbours)
    if not by_parts:
        return rotary
    if not (factor > 0 and 0 < low < high and context > 0):
        raise ValueError(
            f"expected NTK_by_parts factors above 0, the low below the high, got {factor}, {low} and {high}"
        )
    return Rotary(tuple(_by_parts(f, factor, context / low, context / high) for f in rotary.frequencies), neighbours)


def _by_parts(frequency: float, factor: float, longest: float, shortest: float) -> float:
    """A frequency whose wavelength is long is divided by the factor, and by a part of it where it is neither long nor short."""
    wavelength = 2 * math.pi / frequency
    kept = (1 / wavelength - 1 / longest) / (1 / shortest - 1 / longest)
    kept = min(max(kept, 0.0), 1.0)
    return frequency * (kept + (1 - kept) / factor)


def take_query_keys(file: TensorFile, sizes: QueryKeys, d_model: int) -> dict[str, Tensor]:
    """Queries and keys of one layer, by the names of `Lorsa`'s parameters."""
    n_groups, width = sizes.n_groups, sizes.width
    names = {"gain_Q": "ln_q.w", "gain_K": "ln_k.w"} if sizes.norm_epsilon is not None else {}
    file.ignore(*TABLES)
    return {
        **{name: file.take(name, n_groups, d_model, width) for name in ("W_Q", "W_K")},
        **{name: file.take(name, n_groups, width) for name in ("b_Q", "b_K")},
        **{name: file.take(published, n_groups, width) for name, published in names.items()},
    }


def scaled_queries(sizes: QueryKeys, factor: float, group: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What to make of the tensors of a layer's queries on loading, so that scores have another scale."""
    if factor == 1.0:
        return {}

    def scaled(values: Tensor) -> Tensor:
        return values.double() * factor

    scaled.__name__ = f"times {factor}"  # part of the fingerprint
    names = ("W_Q", "b_Q") if sizes.norm_epsilon is None else ("gain_Q",)
    return {f"{name}.{group}": scaled for name in names}


def query_key_tensors(lorsa: Lorsa, group: int) -> dict[str, Tensor]:
    """Queries and keys of one layer by their published names."""
    names = {"b_Q": "b_Q", "b_K": "b_K"}
    names |= {"gain_Q": "ln_q.w", "gain_K": "ln_k.w"} if lorsa.query_keys.norm_epsilon is not None else {}
    tensors = {published: getattr(lorsa, name)[group] for name, published in names.items()}
    scale = lorsa.input_scale(group)
    return {"W_Q": lorsa.W_Q[group] * scale, "W_K": lorsa.W_K[group] * scale, **tensors}


def query_key_settings(layout: str, sizes: QueryKeys) -> dict[str, Any]:
    """Entries of a configuration.

    Raises:
        ValueError: rotary frequencies that are no powers of a base.
    """
    rotary, epsilon = sizes.rotary, sizes.norm_epsilon
    entries: dict[str, Any] = {
        "n_qk_heads": sizes.n_groups,
        "d_qk_head": sizes.width,
        "n_ctx": CONTEXT,
        "positional_embedding_type": "none" if rotary is None else "rotary",
        "rotary_dim": sizes.width if rotary is None else rotary.n_channels,
        "use_post_qk_ln": epsilon is not None,
        "normalization_type": None if epsilon is None else "RMS",
        "eps": 1e-6 if epsilon is None else epsilon,
    }
    if rotary is None:
        return entries
    frequencies = rotary.frequencies
    base = 10_000.0 if len(frequencies) == 1 else (frequencies[0] / frequencies[1]) ** len(frequencies)
    base = float(round(base)) if math.isclose(base, round(base), rel_tol=1e-9) else base
    expected = Rotary.of_base(rotary.n_channels, base=base).frequencies
    others = not all(math.isclose(f, g, rel_tol=1e-9) for f, g in zip(frequencies, expected, strict=True))
    check_holds(layout, {"rotary frequencies that are no powers of a base": others})
    return entries | {
        "rotary_base": int(base) if base.is_integer() else base,
        "rotary_adjacent_pairs": rotary.neighbours,
    }
