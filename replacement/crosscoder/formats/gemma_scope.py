"""Gemma Scope (for Gemma 2) and Gemma Scope 2 (for Gemma 3): JumpReLU SAEs, transcoders, CLTs and crosscoders of Google.

    h = x W_enc + b_enc        a = max(h, 0) * 1[h > threshold]        y = a W_dec + b_dec (+ x affine_skip_connection)

Encoders are `[D, F]`. A threshold below 0 means 0, because a ReLU comes first. The skip matrix is applied without
transposing it, as in Google's own code and in circuit-tracer 0.5 (SAELens 6.49 transposes it).

| files | what |
|---|---|
| `layer_N/width_W/average_l0_N/params.npz` | Gemma Scope: SAEs and transcoders, `W_enc`, `W_dec`, `threshold`, ... |
| `layer_N_width_W_l0_SIZE[_affine]/params.safetensors` | Gemma Scope 2: SAEs and transcoders, `w_enc`, `w_dec`, ... |
| `clt/width_W_l0_SIZE[_affine]/params_layer_N.safetensors` | CLT, `w_dec [F, L, D]` by written layer |
| `crosscoder/layer_A_B_C_D_width_.../params_layer_N.safetensors` | weakly causal crosscoder of some layers |

Where they read and write: the reference says it (`?read=...&write=...&layer=...`), else a `config.json` beside the file
(Gemma Scope 2: `hf_hook_point_in`, `hf_hook_point_out`), else names in the path, such as `gemma-scope-2b-pt-transcoders` or
`transcoder_all`. Gemma Scope's transcoders read the norm's output before its gain and write the MLP's output behind its norm
(arXiv 2408.05147, and `ln2.hook_normalized` in SAELens); Gemma Scope 2's read behind the gain. Decoders of a CLT or crosscoder
to layers before their own are left out, as circuit-tracer does: `facts` holds the largest value among a sample of them, which
should be 0. The first position has no features: they were trained without the beginning-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from replacement.crosscoder.activation import JumpReLU
from replacement.crosscoder.formats.gemma_scope_description import SUFFIX, Description
from replacement.crosscoder.formats.gemma_scope_writing import MULTI, UNDECOMPOSED, write
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.reference import Asked
from replacement.crosscoder.formats.single_layers import (
    joined,
    layer_wiring,
    read_layer,
)
from replacement.crosscoder.formats.tensor_files import TensorFile, listed, numbered
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring

PLACES = ("layer_*/width_*/average_l0_*/params.npz", "width_*/average_l0_*/params.npz", "average_l0_*/params.npz")
PLACES_2 = ("layer_*/params.safetensors",)


def detect(path: Path, *, suffix: str) -> bool:
    """Whether there are files of the release that has them end like this."""
    if path.is_file():
        return path.suffix == suffix and (suffix == ".npz" or path.name.startswith("params"))
    if (path / f"{MULTI}0{SUFFIX}").is_file():
        return suffix == SUFFIX
    return [file.suffix for file in _single_files(path)[:1]] == [suffix]


def read(path: Path, asked: Asked) -> Published:
    """Open one file, a folder of one for each layer, or the folder of a CLT or crosscoder.

    Raises:
        ValueError: names the file: it does not say what it reads and writes and nothing else does, several files for one layer,
            tensors or settings that are missing, misshapen or not known.
    """
    if path.is_dir() and (path / f"{MULTI}0{SUFFIX}").is_file():
        return _read_multi(path, asked)
    if path.name.startswith(MULTI):
        raise ValueError(f"{path} is one layer of a CLT or crosscoder: name its folder, {path.parent}")
    return _read_single([path] if path.is_file() else _single_files(path), path, asked)


def _single_files(path: Path) -> list[Path]:
    """Files of one layer each, in a folder that is searched no deeper than the published ones."""
    for name in ("params.npz", "params.safetensors"):
        if (path / name).is_file():
            return [path / name]
    return sorted(file for pattern in (*PLACES, *PLACES_2) for file in path.glob(pattern))


def _read_single(files: Sequence[Path], path: Path, asked: Asked) -> Published:
    described = [Description.of(file, asked) for file in files]
    by_layer: dict[int, Description] = {}
    for entry in sorted(described, key=lambda entry: entry.layer):
        if entry.layer in by_layer:
            names = [str(other.path.relative_to(path)) for other in described if other.layer == entry.layer]
            raise ValueError(
                f"{path} holds {len(names)} files for layer {entry.layer}: {listed(names)}; name one of them, or list one for "
                f"each layer under `transcoders` of a circuit-tracer config.yaml"
            )
        by_layer[entry.layer] = entry
    entries = list(by_layer.values())
    layers = [read_layer(entry.path, threshold_after_relu=True) for entry in entries]
    parts = joined(layers, [entry.path for entry in entries])
    for entry, layer in zip(entries, layers, strict=True):
        if layer.threshold_F is None:
            raise ValueError(f"{entry.path} lacks the tensor threshold")
        entry.check_skip(layer.skip_DD is not None)
    rule = "h = x W_enc + b_enc, a = max(h, 0) where h > threshold, b_dec added to the output"
    return Published(
        layout="gemma-scope" if files[0].suffix == ".npz" else "gemma-scope-2",
        path=path,
        rule=rule + (" and x affine_skip_connection" if parts["skip"] else ""),
        wiring=layer_wiring([entry.read for entry in entries], [entry.write for entry in entries], layers),
        activation=JumpReLU(),
        undecomposed_positions=UNDECOMPOSED,
        model_name=entries[0].model_name,
        facts=entries[0].facts if len(entries) == 1 else {},
        **parts,
    )


def _read_multi(folder: Path, asked: Asked) -> Published:
    files = [TensorFile(path) for path in numbered(folder, MULTI, SUFFIX)]
    n_layers = len(files)
    config = Description.of(files[0].path, asked, n_layers=n_layers)
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    thresholds, below, skips = [], 0.0, []
    for group, file in enumerate(files):
        encoder_DF = file.take("w_enc", None, None)
        width, n_features = encoder_DF.shape
        decoder_FLD = file.take("w_dec", n_features, n_layers, width)
        taken = {
            f"W_enc.{group}": encoder_DF.T,
            f"b_enc.{group}": file.take("b_enc", n_features),
            f"b_dec.{group}": file.take("b_dec", width),
            f"W_dec.{group}": decoder_FLD[:, group:],
        }
        thresholds.append(file.take("threshold", n_features).clamp(min=0))
        skips.append(file.take_if_there("affine_skip_connection", width, width))
        file.finish()
        if group:
            below = max(below, float(decoder_FLD[:: max(1, n_features // 8), :group].abs().max()))
        tensors |= taken
        sources |= dict.fromkeys(taken, str(file.path))
    if any((skip is None) != (skips[0] is None) for skip in skips):
        raise ValueError(f"{folder}: affine_skip_connection is in some layers' files only: expected it in all or none")
    config.check_skip(skips[0] is not None)
    if len({value.shape for value in thresholds}) > 1:
        raise ValueError(f"{folder}: expected as many features in every layer, got {[len(t) for t in thresholds]}")
    if skips[0] is not None:
        tensors |= _skips_to_own_layer([skip.T for skip in skips if skip is not None])
    return Published(
        layout="gemma-scope-2",
        path=folder,
        rule="h = x W_enc + b_enc, a = max(h, 0) where h > threshold, b_dec of a layer added once to that layer's output, "
        "x affine_skip_connection to the layer that is read",
        wiring=_multi_wiring(config, width),
        n_features=n_features,
        activation=JumpReLU(),
        tensors=tensors | {"threshold": torch.stack(thresholds)},
        sources=sources,
        files=[file.mapped for file in files],
        skip=skips[0] is not None,
        undecomposed_positions=UNDECOMPOSED,
        model_name=config.model_name,
        facts=config.facts | {"largest decoder value to an earlier layer (sample)": below},
    )


def _skips_to_own_layer(skips: Sequence[Tensor]) -> dict[str, Tensor]:
    """Skip matrices by (group, written site), as a crosscoder numbers them: those to later layers are 0 and take no memory."""
    named: dict[str, Tensor] = {}
    for group, skip_DD in enumerate(skips):
        for place in range(len(skips) - group):
            zero = torch.zeros((), dtype=skip_DD.dtype).expand(skip_DD.shape)
            named[f"W_skip.{len(named)}"] = zero if place else skip_DD
    return named


def _multi_wiring(config: Description, width: int) -> Wiring:
    layers = config.layers
    name = "strictly_causal" if config.read.kind != config.write.kind else "weakly_causal"
    if list(layers) != list(range(len(layers))):
        name += "_of_some_layers"
    reads = tuple((Site(layer, config.read.kind),) for layer in layers)
    writes = tuple(tuple(Site(layer, config.write.kind) for layer in layers if layer >= own) for own in layers)
    return Wiring(name, reads, writes, dict.fromkeys((config.read.kind, config.write.kind), width))


LAYOUTS = (
    Layout(
        name="gemma-scope",
        description="Gemma Scope: params.npz of SAEs and transcoders of Gemma 2",
        detect=partial(detect, suffix=".npz"),
        read=lambda path: read(path, Asked()),
        read_asked=read,
    ),
    Layout(
        name="gemma-scope-2",
        description="Gemma Scope 2: safetensors of SAEs, transcoders, CLTs and crosscoders of Gemma 3",
        detect=partial(detect, suffix=SUFFIX),
        read=lambda path: read(path, Asked()),
        read_asked=read,
        write=write,
    ),
)
