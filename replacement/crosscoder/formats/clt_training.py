"""EleutherAI's clt-training: cross-layer transcoders with TopK, one folder per layer such as `layers.3.mlp`.

    h_l = s_l x_l W_enc_l^T + b_enc_l     a_l = TopK_k(max(h_l, 0))     t_m y_m = sum_{l writes m} a_l W(l, m) + b_m (+ skip)

`s = sqrt(D) / in_norm` of the layer that reads, `t = sqrt(D) / out_norm` of the layer that is written. Layer l writes the
`n_targets` layers from l on. `coalesce_topk` says how layers are joined:

| value | decoder `W(l, m)` | `b_m` | skip |
|---|---|---|---|
| `none` | `W_decs.{m - l}` of l, or its `W_dec` (`per_source_tied`) | sum over l of `b_decs.{m - l}` | `W_skips.{m - l}` of l |
| `concat` | `W_dec` of m, whatever l: tied by written layer | `b_dec` of m | `W_skip` of m, on `x_m` |
| `per-layer` | of m: the n-th F rows of `W_dec` for its n-th source l | `b_dec` of m | `W_skip` of m, on `x_m` |

`group` was never implemented there. Joined layers may choose features again for each written layer (`topk_coalesced`), and
`post_encs.{m - l}` and `post_enc_scales.{m - l}` may give each written layer other activations: both are refused, since a
feature has one activation here. Where they are equal for all written layers they are the map behind the activation function.
A tensor without a number is that of index 0. For the rest see `sparsify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats import sparsify
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.sparsify_files import Coder, described, detect, open_coders, run_of
from replacement.crosscoder.formats.writing import check_holds
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring

NAME = "clt-training"


def read(folder: Path) -> Published:
    """Open a folder of hookpoints that write several layers.

    Raises:
        ValueError: names the file and what is missing, misshapen, not known or not supported.
    """
    coders, left_out = open_coders(folder)
    run = run_of(folder, coders)
    _check_targets(coders)
    tied = coders[0].coalesce_topk == "concat"
    wiring = _wiring(coders, run.read)
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for place, coder in enumerate(coders):
        taken = {
            f"W_enc.{place}": coder.encoder(),
            f"b_enc.{place}": coder.encoder_bias(),
            f"b_dec.{place}": _decoder_bias(coders, place),
        }
        if tied:
            taken[f"W_dec.{place}"] = coder.file.take("W_dec", coder.n_features, coder.width)
        tensors |= taken
        sources |= dict.fromkeys(taken, str(coder.file.path))
    decoders = {} if tied else _decoders(coders)
    skips = _skips(coders) if coders[0].skip else []
    tensors |= {f"W_skip.{number}": matrix for number, matrix in enumerate(skips)}
    parts = described(folder, coders, left_out, run.read, run, tensors)
    parts["facts"] |= {"coalesce_topk": coders[0].coalesce_topk}
    return Published(
        layout=NAME,
        rule="cross-layer transcoder: h = x W_enc^T + b_enc, the k largest of each layer where above 0, "
        f"coalesce_topk {coders[0].coalesce_topk}, b_dec of "
        + ("all layers that write one are added" if coders[0].coalesce_topk == "none" else "a layer is added once"),
        wiring=wiring,
        decoders=decoders,
        sources=sources,
        tied=tied,
        **parts,
    )


def _check_targets(coders: Sequence[Coder]) -> None:
    for place, coder in enumerate(coders):
        above = len(coders) - place
        if not 1 <= coder.n_targets <= above:
            raise ValueError(
                f"{coder.file.path.parent}: n_targets: expected 1 to {above} for {above} hookpoints from this layer on, "
                f"got {coder.n_targets}"
            )


def _wiring(coders: Sequence[Coder], read_kind: str) -> Wiring:
    layers = [coder.layer for coder in coders]
    reads = tuple((Site(layer, read_kind),) for layer in layers)
    writes = tuple(
        tuple(Site(layer, "mlp_out") for layer in layers[place : place + coder.n_targets])
        for place, coder in enumerate(coders)
    )
    whole = layers == list(range(len(layers))) and all(
        coder.n_targets == len(layers) - place for place, coder in enumerate(coders)
    )
    widths = dict.fromkeys((read_kind, "mlp_out"), coders[0].width)
    return Wiring("strictly_causal" if whole else "cross_layer", reads, writes, widths)


def _writers(coders: Sequence[Coder], target: int) -> list[int]:
    """Places of the coders that write the layer of another."""
    return [place for place in range(target + 1) if place + coders[place].n_targets > target]


def _indexed(coder: Coder, name: str, index: int, *shape: int) -> Tensor:
    """Tensor `{name}s.{index}`, which is `{name}` where index 0 has no number."""
    if index == 0 and f"{name}s.0" not in coder.file:
        return coder.file.take(name, *shape)
    coder.file.ignore(name)  # the same as that of index 0
    return coder.file.take(f"{name}s.{index}", *shape)


def _decoder_bias(coders: Sequence[Coder], place: int) -> Tensor:
    coder = coders[place]
    if coder.coalesce_topk != "none":
        return coder.file.take("b_dec", coder.width)
    parts = [
        _indexed(coders[writer], "b_dec", place - writer, coder.width).double() for writer in _writers(coders, place)
    ]
    return torch.stack(parts).sum(dim=0)


def _decoders(coders: Sequence[Coder]) -> dict[tuple[int, int], Tensor]:
    """Decoders by (group, place among its written layers)."""
    made: dict[tuple[int, int], Tensor] = {}
    for target, coder in enumerate(coders):
        n_features, width = coder.n_features, coder.width
        writers = _writers(coders, target)
        rows_FD = None
        if coder.coalesce_topk == "per-layer":
            n_sources = max(1, coder.n_sources)
            if n_sources < len(writers):
                path, needed = coder.file.path, len(writers)
                raise ValueError(f"{path}: n_sources: expected at least {needed} layers that write it, got {n_sources}")
            rows_FD = coder.file.take("W_dec", n_sources * n_features, width)
        for number, writer in enumerate(writers):
            key, source = (writer, target - writer), coders[writer]
            if rows_FD is not None:
                made[key] = rows_FD[number * n_features : (number + 1) * n_features]
            elif source.per_source_tied:
                made[key] = source.file.take("W_dec", n_features, width)
            else:
                made[key] = _indexed(source, "W_dec", target - writer, n_features, width)
    return made


def _skips(coders: Sequence[Coder]) -> list[Tensor]:
    """Skip matrices of every layer that is read, for each layer that it writes."""
    made = []
    for coder in coders:
        shape = (coder.width, coder.width)
        if coder.coalesce_topk == "none":
            made += [_indexed(coder, "W_skip", index, *shape) for index in range(coder.n_targets)]
        else:
            own_DD = coder.file.take("W_skip", *shape)
            made += [own_DD] + [own_DD.new_zeros(()).expand(shape)] * (coder.n_targets - 1)
    return made


# Writing -----------------------------------------------------------------------------------------------------------------


def write(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write a cross-layer transcoder, with `coalesce_topk` `concat` where decoders are tied and `none` elsewhere.

    Raises:
        ValueError: what `sparsify.check_writable` names, writes to other layers than some from the one read on without a gap,
            or skip connections of tied decoders.
    """
    sparsify.check_writable(crosscoder, NAME)
    wiring = crosscoder.wiring
    layers = [read.layer for (read,) in wiring.reads]
    for group, writes in enumerate(wiring.writes):
        skips_some = [site.layer for site in writes] != layers[group : group + len(writes)]
        check_holds(NAME, {f"the wiring {wiring.name}": skips_some})
    check_holds(NAME, {"tied decoders with skip connections between layers": crosscoder.tied and crosscoder.skip})
    for group, ((read,), writes) in enumerate(zip(wiring.reads, wiring.writes, strict=True)):
        bias_D = crosscoder.decoder_bias(writes[0])
        tensors = {"encoder.weight": crosscoder.encoder(group, read), "encoder.bias": crosscoder.b_enc[group]}
        if crosscoder.tied:
            tensors |= {"W_dec": crosscoder.decoder(group, writes[0]), "b_dec": bias_D}
        else:
            for index, site in enumerate(writes):
                tensors[f"W_decs.{index}"] = crosscoder.decoder(group, site)
                tensors[f"b_decs.{index}"] = torch.zeros_like(bias_D) if index else bias_D
                if crosscoder.skip:
                    tensors[f"W_skips.{index}"] = crosscoder.skip_matrix(group, read, site)
        settings: dict[str, Any] = {
            "n_targets": len(writes),
            "n_sources": len(wiring.writers(writes[0])),
            "coalesce_topk": "concat" if crosscoder.tied else "none",
            "topk_coalesced": False,
        }
        sparsify.write_hookpoint(crosscoder, folder, group, read.layer, tensors, dtype, settings)
    sparsify.write_run(crosscoder, folder)


LAYOUTS = (
    Layout(
        name=NAME,
        description="EleutherAI clt-training: layers.N.mlp folders whose cfg.json has n_targets",
        detect=partial(detect, cross_layer=True),
        read=read,
        write=write,
    ),
)
