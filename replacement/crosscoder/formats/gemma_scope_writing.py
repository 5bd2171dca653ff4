"""Writes the layout of Gemma Scope 2; `gemma_scope.py` says what its files hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.hooks import MODULES
from replacement.crosscoder.formats.writing import (
    check_holds,
    common_problems,
    decoders_by_target,
    write_json,
    write_named,
)

MULTI = "params_layer_"
"""Files of a CLT or crosscoder begin so; a number and `.safetensors` follow."""
UNDECOMPOSED = 1


def write(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write Gemma Scope 2's files: a folder for each layer, or one file for each layer of a CLT or crosscoder.

    Raises:
        ValueError: names what the layout cannot say.
    """
    wiring = crosscoder.wiring
    single = all(len(sites) == 1 for sites in wiring.writes)
    _check_writable(crosscoder, single=single)
    for group, ((read,), writes) in enumerate(zip(wiring.reads, wiring.writes, strict=True)):
        decoder = decoders_by_target(crosscoder, group)
        before = decoder.new_zeros((len(decoder), wiring.n_groups - len(writes), decoder.shape[2]))
        named = {
            "w_enc": crosscoder.encoder(group, read).T,
            "w_dec": decoder[:, 0] if single else torch.cat([before, decoder], dim=1),
            "b_enc": crosscoder.b_enc[group],
            "b_dec": crosscoder.decoder_bias(writes[0]),
            "threshold": torch.zeros(crosscoder.n_features)
            if crosscoder.threshold is None
            else crosscoder.threshold[group],
            "affine_skip_connection": crosscoder.skip_matrix(group, read, writes[0]).T if crosscoder.skip else None,
        }
        place = folder / f"layer_{read.layer}_width_{crosscoder.n_features}" if single else folder
        place.mkdir(exist_ok=True)
        write_named(place / f"{'params' if single else f'{MULTI}{group}'}.safetensors", named, dtype)
        if single:
            _write_config(crosscoder, place, [group])
    if not single:
        _write_config(crosscoder, folder, range(wiring.n_groups))


def _write_config(crosscoder: Crosscoder, folder: Path, groups: Sequence[int]) -> None:
    layers = [crosscoder.wiring.reads[group][0].layer for group in groups]
    kinds = [side[groups[0]][0].kind for side in (crosscoder.wiring.reads, crosscoder.wiring.writes)]
    points = {kind: point for point, kind in MODULES.items()}
    numbers = str(layers[0]) if len(groups) == 1 else "{" + ",".join(map(str, layers)) + "}"
    config = {
        "hf_hook_point_in": f"model.layers.{numbers}.{points[kinds[0]]}",
        "hf_hook_point_out": f"model.layers.{numbers}.{points[kinds[1]]}",
        "width": crosscoder.n_features * len(groups),
        "model_name": crosscoder.model_name,
        "architecture": "jump_relu",
        "affine_connection": crosscoder.skip,
        "type": ("transcoder" if len(groups) == 1 else "clt")
        if kinds[0] != kinds[1]
        else ("sae" if len(groups) == 1 else "crosscoder"),
    }
    write_json(folder / "config.json", config)


def _check_writable(crosscoder: Crosscoder, *, single: bool) -> None:
    wiring, threshold = crosscoder.wiring, crosscoder.threshold
    layers = [sites[0].layer for sites in wiring.reads]
    fits = all(len(sites) == 1 for sites in wiring.reads) and len(set(layers)) == len(layers)
    for group, sites in enumerate(wiring.writes):
        expected = [layers[group]] if single else layers[group:]
        fits = fits and [site.layer for site in sites] == expected
    kinds = sorted({site.kind for site in (*wiring.read_sites, *wiring.write_sites)} - set(MODULES.values()))
    activation = crosscoder.activation
    is_plain = isinstance(activation, ReLU | JumpReLU) and not activation.affine
    problems = {
        f"the wiring {wiring.name}": not fits,
        f"the site {', '.join(kinds)}": bool(kinds),
        f"the activation {activation.to_dict()}": not is_plain,
        "thresholds below 0": threshold is not None and bool((threshold < 0).any()),
        "tied decoders": crosscoder.tied,
        "skip connections to later layers": crosscoder.skip and not single and _skips_further(crosscoder),
    }
    check_holds("gemma-scope-2", problems | common_problems(crosscoder, positions=UNDECOMPOSED))


def _skips_further(crosscoder: Crosscoder) -> bool:
    return any(
        bool(crosscoder.skip_matrix(group, reads[0], site).any())
        for group, (reads, writes) in enumerate(zip(crosscoder.wiring.reads, crosscoder.wiring.writes, strict=True))
        for site in writes[1:]
    )
