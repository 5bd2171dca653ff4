"""Writes the layout of `llama_scope.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.decoder_norms import decoder_norms
from replacement.crosscoder.formats.hooks import ATTENTION_OUT, ATTENTION_READS, MLP_OUT, MLP_READS
from replacement.crosscoder.formats.llama_scope_folder import CONFIG_FILE, TENSOR_FILE, THRESHOLD
from replacement.crosscoder.formats.llama_scope_lorsa import query_key_settings, query_key_tensors
from replacement.crosscoder.formats.writing import check_holds, common_problems, write_json
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.mapped_file import write_tensors
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import JointTopK, TopK

NAME = "llama-scope-2"
UNDECOMPOSED = 1


def write(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write a transcoder or sparse attention of one layer or of every one, or a cross-layer transcoder; scales folded in.

    Thresholds are logarithms, in float64 so that their exponentials are exact.

    Raises:
        ValueError: what the layout has no place for (named): another wiring, read site or activation function, scores that are
            not decoder norms, thresholds below 0, skip connections, tied decoders, another number of positions without
            features than 1, or rotary frequencies that are no powers of a base.
    """
    hook, of_heads = _check_writable(crosscoder), isinstance(crosscoder, Lorsa)
    if crosscoder.wiring.name not in ("per_layer", "lorsa"):
        _write_part(crosscoder, range(crosscoder.n_groups), folder, dtype, hook)
        return
    for group in range(crosscoder.n_groups):
        layer = crosscoder.wiring.group_layer(group)
        target = folder / f"layer{layer}_{'lorsa' if of_heads else 'transcoder'}"
        target.mkdir()
        _write_part(crosscoder, range(group, group + 1), target, dtype, hook)


def _check_writable(crosscoder: Crosscoder) -> str:
    wiring, activation = crosscoder.wiring, crosscoder.activation
    reads, writes = ({site.kind for site in sites} for sites in (wiring.read_sites, wiring.write_sites))
    of_heads = isinstance(crosscoder, Lorsa)
    hooks = ATTENTION_READS if of_heads else MLP_READS
    hook = next((name for name, kind in hooks.items() if reads == {kind}), None)
    is_clt = wiring.name == "strictly_causal"
    plain: tuple[type, ...] = (TopK, JointTopK) if is_clt else (TopK,)
    has_name = isinstance(activation, ReLU | JumpReLU)
    if isinstance(activation, TopK | JointTopK):
        has_name = isinstance(activation, plain) and activation.relu and isinstance(activation.k, int)
    theta = crosscoder.threshold
    problems = {
        f"the wiring {wiring.name}": wiring.name
        not in (("lorsa", "lorsa_layer") if of_heads else ("transcoder", "per_layer", "strictly_causal"))
        or writes != {"attn_out" if of_heads else "mlp_out"},
        f"reads of {', '.join(sorted(reads))}": hook is None,
        f"the activation {activation.to_dict()}": not has_name or activation.affine,
        "skip connections": crosscoder.skip,
        "tied decoders": crosscoder.tied,
        "thresholds below 0": theta is not None and bool((theta < 0).any()),
    }
    check_holds(NAME, problems | common_problems(crosscoder, positions=UNDECOMPOSED))
    if crosscoder.score_factor is not None:
        check_holds(NAME, {"scores other than decoder norms": not _scores_are_norms(crosscoder)})
    assert hook is not None
    return hook


def _scores_are_norms(crosscoder: Crosscoder) -> bool:
    """Whether features are chosen by norms of decoders, up to a common factor of those that compete."""
    assert crosscoder.score_factor is not None
    groups = (
        (crosscoder.decoder(group, site) for site in sites) for group, sites in enumerate(crosscoder.wiring.writes)
    )
    norms_GF, scores_GF = decoder_norms(groups), crosscoder.score_factor.double()
    dims = (0, 1) if isinstance(crosscoder.activation, JointTopK) else (1,)
    factor = scores_GF.sum(dim=dims, keepdim=True) / norms_GF.sum(dim=dims, keepdim=True)
    return torch.allclose(scores_GF, norms_GF * factor, rtol=1e-3, atol=0)


def _write_part(crosscoder: Crosscoder, groups: range, folder: Path, dtype: torch.dtype, hook: str) -> None:
    """Write some groups as one folder."""
    is_clt, wiring = crosscoder.wiring.name == "strictly_causal", crosscoder.wiring
    width, n_features, first = wiring.width(wiring.write_sites[0]), crosscoder.n_features, groups[0]
    layers = [wiring.group_layer(group) for group in groups]

    def encoder(group: int) -> Tensor:
        return crosscoder.encoder(group, wiring.reads[group][0]).T

    def decoders(target: int) -> Tensor:
        return torch.stack([crosscoder.decoder(group, Site(target, "mlp_out")) for group in range(target + 1)])

    made: dict[str, Callable[[], Tensor]]
    if is_clt:
        made = {
            "W_E": lambda: torch.stack([encoder(group) for group in groups]),
            "b_E": lambda: torch.stack(list(crosscoder.b_enc)),
            **{f"W_D.{target}": partial(decoders, target) for target in groups},
            **{f"b_D.{target}": partial(crosscoder.decoder_bias, Site(target, "mlp_out")) for target in groups},
        }
        shapes = {"W_E": (len(groups), width, n_features), "b_E": (len(groups), n_features)}
        shapes |= {f"W_D.{target}": (target + 1, n_features, width) for target in groups}
        shapes |= {f"b_D.{target}": (width,) for target in groups}
    else:
        (site,) = wiring.writes[first]
        made = {
            "W_E": partial(encoder, first),
            "b_E": lambda: crosscoder.b_enc[first],
            "W_D": partial(crosscoder.decoder, first, site),
            "b_D": partial(crosscoder.decoder_bias, site),
        }
        shapes = {"W_E": (width, n_features), "b_E": (n_features,), "W_D": (n_features, width), "b_D": (width,)}
    if isinstance(crosscoder, Lorsa):
        made["W_V"], made["b_V"], made["W_O"] = (made.pop(name) for name in ("W_E", "b_E", "W_D"))
        made["W_V"] = partial(crosscoder.encoder, first, wiring.reads[first][0])
        shapes |= {"W_V": (n_features, width), "b_V": (n_features,), "W_O": (n_features, width)}
        for name, value in query_key_tensors(crosscoder, first).items():
            made[name], shapes[name] = partial(Tensor.detach, value), tuple(value.shape)
    if isinstance(crosscoder.activation, JumpReLU):
        assert crosscoder.threshold is not None
        log_GF = crosscoder.threshold.double().log().expand(-1, n_features)
        kept = log_GF if is_clt else log_GF[first]
        made[THRESHOLD], shapes[THRESHOLD] = (lambda: kept), tuple(kept.shape)
    listed = [(name, torch.Size(shapes[name]), values) for name, values in made.items()]
    write_tensors(folder / TENSOR_FILE, listed, dtype, dtypes={THRESHOLD: torch.float64})
    write_json(folder / CONFIG_FILE, _config(crosscoder, layers, dtype, hook))


def _config(crosscoder: Crosscoder, layers: Sequence[int], dtype: torch.dtype, hook: str) -> dict[str, Any]:
    activation, width = crosscoder.activation, crosscoder.wiring.width(crosscoder.wiring.write_sites[0])
    is_clt, of_heads = crosscoder.wiring.name == "strictly_causal", isinstance(crosscoder, Lorsa)
    factor = crosscoder.n_features / width
    if int(width * factor) != crosscoder.n_features:  # rounded down
        factor = math.nextafter(factor, math.inf)
    names = {ReLU: "relu", JumpReLU: "jumprelu", TopK: "topk", JointTopK: "layertopk"}
    config: dict[str, Any] = {
        "dtype": str(dtype),
        "sae_type": "clt" if is_clt else "lorsa" if of_heads else "sae",
        "d_model": width,
        "expansion_factor": factor,
        "use_decoder_bias": True,
        "act_fn": names[type(activation)],
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": crosscoder.score_factor is not None,
    }
    config |= {"top_k": activation.k} if isinstance(activation, TopK | JointTopK) else {}
    if isinstance(crosscoder, Lorsa):
        config |= query_key_settings(NAME, crosscoder.query_keys)
    for side, name in (("in", hook), ("out", ATTENTION_OUT if of_heads else MLP_OUT)):
        hooks = [f"blocks.{layer}.{name}" for layer in layers]
        config |= {f"hook_points_{side}": hooks} if is_clt else {f"hook_point_{side}": hooks[0]}
    return config
