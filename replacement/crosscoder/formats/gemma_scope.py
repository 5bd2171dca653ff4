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

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.reference import Asked
from replacement.crosscoder.formats.single_layers import (
    joined,
    layer_wiring,
    read_layer,
)
from replacement.crosscoder.formats.tensor_files import Settings, TensorFile, listed, numbered
from replacement.crosscoder.mapped_file import write_tensors
from replacement.crosscoder.sites import Site
from replacement.crosscoder.wiring import Wiring

UNDECOMPOSED = 1
PLACES = ("layer_*/width_*/average_l0_*/params.npz", "width_*/average_l0_*/params.npz", "average_l0_*/params.npz")
PLACES_2 = ("layer_*/params.safetensors",)
MULTI = "params_layer_"
SUFFIX = ".safetensors"
HOOKS = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
"""Our site for each point of Gemma 3 in the configurations."""
NAMES = (
    (r"gemma-scope-\d+b-\w+-transcoders", "mlp_normalized", "mlp_out"),
    (r"gemma-scope-\d+b-\w+-res", "resid_post", "resid_post"),
    (r"gemma-scope-\d+b-\w+-mlp", "mlp_out", "mlp_out"),
    (r"gemma-scope-\d+b-\w+-att", "attn_z", "attn_z"),
    (r"transcoder(_all)?|clt", "mlp_in", "mlp_out"),
    (r"(resid_post(_all)?|crosscoder)", "resid_post", "resid_post"),
    (r"mlp_out(_all)?", "mlp_out", "mlp_out"),
    (r"attn_out(_all)?", "attn_z", "attn_z"),
)
"""A part of the path (on the hub's cache, the repository is one), what is read, and what is written."""
_POINT = re.compile(r"model\.(?:language_model\.)?layers\.(\d+|\{all\}|\{\d+(?:,\s*\d+)*\})\.(.+)")
_MODEL = re.compile(r"gemma-scope-(2-)?(\d+[bm])-(pt|it)")


def detect(path: Path) -> bool:
    """Whether there are files of either release."""
    if path.suffix == ".npz" or (path.name.startswith("params") and path.suffix == SUFFIX):
        return path.is_file()
    return path.is_dir() and ((path / f"{MULTI}0{SUFFIX}").is_file() or bool(_single_files(path)))


def _detect_npz(path: Path) -> bool:
    files = [path] if path.is_file() else _single_files(path)
    return bool(files) and files[0].suffix == ".npz"


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
    described = [_Description.of(file, asked) for file in files]
    by_layer: dict[int, _Description] = {}
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
    config = _Description.of(files[0].path, asked, n_layers=n_layers)
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


def _multi_wiring(config: _Description, width: int) -> Wiring:
    layers = config.layers
    name = "strictly_causal" if config.read.kind != config.write.kind else "weakly_causal"
    if list(layers) != list(range(len(layers))):
        name += "_of_some_layers"
    reads = tuple((Site(layer, config.read.kind),) for layer in layers)
    writes = tuple(tuple(Site(layer, config.write.kind) for layer in layers if layer >= own) for own in layers)
    return Wiring(name, reads, writes, dict.fromkeys((config.read.kind, config.write.kind), width))


class _Description:
    """What a file's surroundings say of it."""

    def __init__(
        self, path: Path, read: str, write: str, layers: Sequence[int], *, affine: bool | None, facts: dict[str, Any]
    ) -> None:
        self.path, self.layers, self.affine, self.facts = path, layers, affine, facts
        self.layer = layers[0]
        self.read, self.write = Site(self.layer, read), Site(self.layer, write)
        match = next((match for part in reversed(path.parts) if (match := _MODEL.search(part))), None)
        named = "" if match is None else f"google/gemma-{'3' if match[1] else '2'}-{match[2]}-{match[3]}"
        self.model_name: str = facts.pop("model_name", "") or named.removesuffix(
            "-pt" if match and not match[1] else ""
        )

    @classmethod
    def of(cls, path: Path, asked: Asked, *, n_layers: int | None = None) -> _Description:
        config = path.parent / "config.json"
        if config.is_file() and path.suffix == SUFFIX and not asked:
            return cls._configured(path, Settings(config), n_layers)
        named = next(
            (
                (read, write)
                for part in reversed(path.parts)
                for name, read, write in NAMES
                if re.fullmatch(name, _repo(part))
            ),
            (None, None),
        )
        layers = asked.layers or _layers_of(path, n_layers)
        read, write = asked.read or named[0], asked.write or asked.read or named[1]
        asked.require(path, read=read, write=write, layer=layers or None)
        assert read is not None
        assert write is not None
        return cls(path, read, write, layers, affine=None, facts={})

    @classmethod
    def _configured(cls, path: Path, settings: Settings, n_layers: int | None) -> _Description:
        architecture = settings.take("architecture", str)
        if architecture != "jump_relu":
            raise ValueError(f"{settings.path}: architecture: expected jump_relu, got {architecture!r:.50}")
        layers, read = _point(settings, "hf_hook_point_in", n_layers)
        written, write = _point(settings, "hf_hook_point_out", n_layers, default=settings.take("hf_hook_point_in", str))
        if layers != written or len(layers) != (n_layers or 1):
            raise ValueError(
                f"{settings.path}: expected {n_layers or 1} layers that are read and written, got {layers} and {written}"
            )
        facts = {
            "type": settings.take("type", str, default=""),
            "l0": settings.take("l0", (int, float), default=None),
            "model_name": settings.take("model_name", str, default=""),
        }
        affine = settings.take("affine_connection", bool, default=None)
        settings.ignore("width")
        settings.finish()
        return cls(path, read, write, layers, affine=affine, facts={k: v for k, v in facts.items() if v})

    def check_skip(self, has_skip: bool) -> None:
        """Compare with what the configuration says."""
        if self.affine is not None and self.affine != has_skip:
            given = "has one" if has_skip else "has none"
            raise ValueError(f"{self.path} {given}, but its config.json says affine_connection {self.affine}")


def _repo(part: str) -> str:
    """A folder's name; of the hub's cache, the repository's."""
    return part.rpartition("--")[2] if part.startswith("models--") else part


def _layers_of(path: Path, n_layers: int | None) -> list[int]:
    if n_layers is not None and path.parent.parent.name == "clt":
        return list(range(n_layers))
    match = next(
        (m for part in reversed(path.parts[:-1]) if (m := re.match(r"layer_(\d+(?:_\d+)*)(?:_|$)", part))), None
    )
    layers = [] if match is None else [int(number) for number in match[1].split("_")]
    return layers if len(layers) == (n_layers or 1) else []


def _point(settings: Settings, entry: str, n_layers: int | None, **options: Any) -> tuple[list[int], str]:
    point = settings.take(entry, str, **options)
    match = _POINT.fullmatch(point)
    if match is None or match[2] not in HOOKS:
        raise ValueError(
            f"{settings.path}: {entry}: expected model.layers.N. and one of {', '.join(HOOKS)}, got {point!r:.80}"
        )
    if match[1] == "{all}":
        return list(range(n_layers or 1)), HOOKS[match[2]]
    return [int(number) for number in match[1].strip("{}").split(",")], HOOKS[match[2]]


# Writing -----------------------------------------------------------------------------------------------------------------


def write(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write Gemma Scope 2's files: a folder for each layer, or one file for each layer of a CLT or crosscoder.

    Raises:
        ValueError: names what the layout cannot say.
    """
    wiring = crosscoder.wiring
    single = all(len(sites) == 1 for sites in wiring.writes)
    _check_writable(crosscoder, single=single)
    for group, ((read,), writes) in enumerate(zip(wiring.reads, wiring.writes, strict=True)):
        decoder = crosscoder.decoder(group, writes[0])
        if not single:
            before = torch.zeros((), dtype=decoder.dtype).expand(*decoder.shape)
            columns = [before] * (wiring.n_groups - len(writes)) + [crosscoder.decoder(group, site) for site in writes]
            decoder = torch.stack(columns, dim=1)
        named = {
            "w_enc": crosscoder.encoder(group, read).T,
            "w_dec": decoder,
            "b_enc": crosscoder.b_enc[group],
            "b_dec": crosscoder.decoder_bias(writes[0]),
            "threshold": torch.zeros(crosscoder.n_features)
            if crosscoder.threshold is None
            else crosscoder.threshold[group],
        }
        if crosscoder.skip:
            named["affine_skip_connection"] = crosscoder.skip_matrix(group, read, writes[0]).T
        place = folder / f"layer_{read.layer}_width_{crosscoder.n_features}" if single else folder
        place.mkdir(exist_ok=True)
        tensors = [(name, value.shape, partial(Tensor.detach, value)) for name, value in named.items()]
        write_tensors(place / ("params.safetensors" if single else f"{MULTI}{group}{SUFFIX}"), tensors, dtype)
        if single:
            _write_config(crosscoder, place, [group])
    if not single:
        _write_config(crosscoder, folder, range(wiring.n_groups))


def _write_config(crosscoder: Crosscoder, folder: Path, groups: Sequence[int]) -> None:
    layers = [crosscoder.wiring.reads[group][0].layer for group in groups]
    kinds = [side[groups[0]][0].kind for side in (crosscoder.wiring.reads, crosscoder.wiring.writes)]
    points = {kind: point for point, kind in HOOKS.items()}
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
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _check_writable(crosscoder: Crosscoder, *, single: bool) -> None:
    wiring, threshold = crosscoder.wiring, crosscoder.threshold
    layers = [sites[0].layer for sites in wiring.reads]
    fits = all(len(sites) == 1 for sites in wiring.reads) and len(set(layers)) == len(layers)
    for group, sites in enumerate(wiring.writes):
        expected = [layers[group]] if single else layers[group:]
        fits = fits and [site.layer for site in sites] == expected
    kinds = sorted({site.kind for site in (*wiring.read_sites, *wiring.write_sites)} - set(HOOKS.values()))
    activation = crosscoder.activation
    is_plain = isinstance(activation, ReLU | JumpReLU) and not activation.affine
    problems = {
        f"the wiring {wiring.name}": not fits,
        f"the site {', '.join(kinds)}": bool(kinds),
        f"the activation {activation.to_dict()}": not is_plain,
        "thresholds below 0": threshold is not None and bool((threshold < 0).any()),
        "tied decoders": crosscoder.tied,
        f"{crosscoder.undecomposed_positions} positions without features": crosscoder.undecomposed_positions
        != UNDECOMPOSED,
        "skip connections to later layers": crosscoder.skip and not single and _skips_further(crosscoder),
    }
    refused = [problem for problem, found in problems.items() if found]
    if refused:
        raise ValueError(f"the layout gemma-scope-2 has no place for {refused[0]}")


def _skips_further(crosscoder: Crosscoder) -> bool:
    return any(
        bool(crosscoder.skip_matrix(group, reads[0], site).any())
        for group, (reads, writes) in enumerate(zip(crosscoder.wiring.reads, crosscoder.wiring.writes, strict=True))
        for site in writes[1:]
    )


LAYOUTS = (
    Layout(
        name="gemma-scope",
        description="Gemma Scope: params.npz of SAEs and transcoders of Gemma 2",
        detect=_detect_npz,
        read=lambda path: read(path, Asked()),
        read_asked=read,
    ),
    Layout(
        name="gemma-scope-2",
        description="Gemma Scope 2: safetensors of SAEs, transcoders, CLTs and crosscoders of Gemma 3",
        detect=detect,
        read=lambda path: read(path, Asked()),
        read_asked=read,
        write=write,
    ),
)
