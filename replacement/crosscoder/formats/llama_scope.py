"""Llama Scope 2 and whatever else OpenMOSS's Language-Model-SAEs saves: transcoders, cross-layer transcoders, sparse attention.

    h = s x W_E + b_E        a = h * gate(h ||W_D||), or h * gate(h) without `sparsity_include_decoder_norm`
    transcoder: t y = a W_D + b_D                CLT: t_m y_m = sum_{l <= m} a_l W_D.m[l] + b_D.m

The gate keeps what is positive (`relu`), above `exp(log_jumprelu_threshold)` (`jumprelu`), or among the `top_k` largest
positive values of a layer (`topk`) or of all layers together (`layertopk`). `||W_D||` is the norm of all that a feature writes:
for a CLT over all its target layers. With `norm_activation: dataset-wise` the scales s and t of a hook are
`sqrt(D) / dataset_average_activation_norm`; with `inference` they are 1. x is what `hook_point_in` names, y what
`hook_point_out` names. `b_D` of a CLT belongs to the layer that is written. For low-rank sparse attention see
`llama_scope_lorsa.py`. Padding and the token in front of every text were left out of the training: the first position has no
features.

A folder `layerN_...` for each layer makes a per-layer transcoder or a `Lorsa`, one folder alone either of that layer, or a CLT.
Refused: gated encoders, `batchtopk` (it depends on the batch; its publishers convert it to `jumprelu`),
`token-wise` and `batch-wise` scales. Source: `llamascopium/models` of that repository, 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.formats.decoder_norms import decoder_norms
from replacement.crosscoder.formats.hooks import shape_of
from replacement.crosscoder.formats.llama_scope_folder import CONFIG_FILE, KINDS, Part, read_part
from replacement.crosscoder.formats.llama_scope_lorsa import scaled_queries
from replacement.crosscoder.formats.llama_scope_writing import NAME, UNDECOMPOSED, write
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.tensor_files import mentions
from replacement.crosscoder.mapped_file import MappedFile
from replacement.crosscoder.topk import JointTopK
from replacement.crosscoder.wiring import Wiring

_LAYER_FOLDER = re.compile(r"layer_?(\d{1,6})(?!\d)")
_RULES = {
    **{
        kind: f"{KINDS[kind]} of MLPs: h = x W_E + b_E, gate on {{}}, b_D added to what is written"
        for kind in ("sae", "clt")
    },
    "lorsa": "low-rank sparse attention: h = P (x W_V + b_V) with P of W_Q and W_K, gate on {}, b_D added to what is written",
}
_NEVER_ACTIVE = 1e17
"""Threshold of features that write nothing, which the gate never lets through; twice that would be refused as too large."""


def detect(folder: Path) -> bool:
    """Whether a folder, or the folders of layers in it, have this project's configuration."""
    return any(_says_kind(path / CONFIG_FILE) for path in (folder, *_layer_folders(folder)))


def _says_kind(config: Path) -> bool:
    return mentions(config, '"sae_type"')


def _layer_folders(folder: Path) -> list[Path]:
    """Folders of layers, by rising number."""
    if not folder.is_dir():
        return []
    found = ((_LAYER_FOLDER.match(path.name), path) for path in folder.iterdir() if (path / CONFIG_FILE).is_file())
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def read(folder: Path) -> Published:
    """Open one folder, or the folder of a folder for each layer.

    Raises:
        ValueError: names the file: an entry or tensor is missing, unknown or of another kind; a structure, activation function,
            scaling or hook that is not known; a layer that is missing or given twice; layers that do not agree.
    """
    is_single = _says_kind(folder / CONFIG_FILE)
    parts = [read_part(path) for path in ([folder] if is_single else _layer_folders(folder))]
    first = parts[0]
    if not is_single:
        _check_layers(folder, parts)
    groups = [(part, group) for part in parts for group in range(len(part.encoders))]
    decoders = {
        (number, place): decoder
        for number, (part, group) in enumerate(groups)
        for (source, place), decoder in part.decoders.items()
        if source == group
    }
    files = [part.file.mapped for part in parts]
    tensors, sources = _tensors(groups)
    derived = {
        name: make
        for number, (part, _) in enumerate(groups)
        if part.query_keys is not None
        for name, make in scaled_queries(part.query_keys, part.query_factor, number).items()
    }
    norms = _Norms([[d for (g, _), d in decoders.items() if g == number] for number in range(len(groups))], files)
    _add_choice(tensors, derived, parts, norms, n_groups=len(groups))
    scales = {site: scale for part in parts for site, scale in part.scales.items()}
    reads = {site for part in parts for site in part.reads}
    writes = {site for part in parts for site in part.writes}
    gated = "h ||W_D||" if first.is_scored else "h"
    return Published(
        layout=NAME,
        path=folder,
        rule=_RULES[first.kind].format(gated),
        wiring=_wiring(first, len(groups), is_single=is_single),
        n_features=first.n_features,
        activation=first.activation,
        tensors=tensors,
        decoders=decoders,
        derived=derived,
        files=files,
        sources=sources,
        query_keys=first.query_keys,
        undecomposed_positions=UNDECOMPOSED,
        input_scale={site: scale for site, scale in scales.items() if site in reads},
        output_scale={site: scale for site, scale in scales.items() if site in writes},
        facts=_facts(folder, first.activation, len(groups)),
    )


def _tensors(groups: Sequence[tuple[Part, int]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Encoders, biases, queries and keys of every group by the names of a crosscoder's parameters, and the file of each."""
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for number, (part, group) in enumerate(groups):
        named = {
            "W_enc": part.encoders[group],
            "b_enc": part.encoder_biases[group],
            "b_dec": part.decoder_biases[group],
            **part.query_key_tensors,
        }
        tensors |= {f"{name}.{number}": value for name, value in named.items()}
        sources |= {f"{name}.{number}": str(part.file.path) for name in (*named, "W_dec")}
    return tensors, sources


def _add_choice(
    tensors: dict[str, Tensor],
    derived: dict[str, Callable[[Tensor], Tensor]],
    parts: Sequence[Part],
    norms: _Norms,
    *,
    n_groups: int,
) -> None:
    """Add what features are chosen by: thresholds, or factors of scores, and how they are made of what the files hold."""
    first = parts[0]
    if isinstance(first.activation, JumpReLU):
        tensors["threshold"] = torch.stack([log_F for part in parts for log_F in part.log_thresholds])
        derived["threshold"] = norms.under if first.is_scored else _exp
    elif first.is_scored and not isinstance(first.activation, ReLU):
        tensors["score_factor"] = torch.ones(1, 1).expand(n_groups, first.n_features)
        derived["score_factor"] = norms.times


def _facts(folder: Path, activation: Activation, n_groups: int) -> dict[str, Any]:
    """How many features are kept, where the configuration or the folder's name says it."""
    k = getattr(activation, "k", None) or _k_of_name(folder)
    if k is None:
        return {}
    return {"k": k, "l0": k / n_groups} if isinstance(activation, JointTopK) else {"k": k}


def _k_of_name(folder: Path) -> int | None:
    """The number of active features in folder names such as `8x/k64/layer0_transcoder_8x_k64`."""
    match = re.search(r"(?:^|[_/])k(\d{1,6})(?:$|[_/])", f"{folder.parent.name}/{folder.name}")
    return int(match[1]) if match else None


def _check_layers(folder: Path, parts: Sequence[Part]) -> None:
    for layer, part in enumerate(parts):
        if part.kind == "clt" or part.kind != parts[0].kind:
            raise ValueError(
                f"{part.file.path}: expected transcoders, or sparse attention, in all folders of layers, got {KINDS[part.kind]}"
            )
        given = part.reads[0].layer
        if given != layer:
            problem = "layer {0} twice" if given == layer - 1 else f"no layer {layer}, but layer {{0}}"
            raise ValueError(f"{folder} has {problem.format(given)} ({part.file.path.parent.name})")
        for name in ("width", "n_features", "activation", "is_scored", "query_keys"):
            if getattr(part, name) != getattr(parts[0], name):
                values = f"{getattr(parts[0], name)} and {getattr(part, name)}"
                raise ValueError(f"{part.file.path}: layers differ in {name.replace('_', ' ')}: {values}")
        if part.reads[0].kind != parts[0].reads[0].kind:
            raise ValueError(f"{part.file.path}: layers read {parts[0].reads[0].kind} and {part.reads[0].kind}")


def _wiring(first: Part, n_groups: int, *, is_single: bool) -> Wiring:
    layer, read_site = first.reads[0].layer, first.reads[0].kind
    n_layers = layer + 1 if is_single and first.kind != "clt" else n_groups
    shape = shape_of(n_layers, first.width)
    if first.kind == "lorsa":
        return Wiring.lorsa(shape, layer=layer if is_single else None, read=read_site)
    if first.kind == "clt":
        return Wiring.strictly_causal(shape, read=read_site)
    if is_single:
        return Wiring.transcoder(shape, layer=layer, read=read_site)
    return Wiring.per_layer(shape, read=read_site)


@dataclass
class _Norms:
    """What depends on the norms of decoders, which take a pass over all of them."""

    groups: Sequence[Sequence[Tensor]]
    files: Sequence[MappedFile]

    def times(self, value_GF: Tensor) -> Tensor:
        """Values times the norms."""
        return value_GF * decoder_norms(self.groups, self.files)

    def under(self, log_GF: Tensor) -> Tensor:
        """Thresholds of h for logarithms of thresholds of `h ||W_D||`."""
        norms_GF = decoder_norms(self.groups, self.files)
        divided_GF = (_exp(log_GF) / norms_GF).clamp(max=_NEVER_ACTIVE)
        return torch.where(norms_GF > 0, divided_GF, _NEVER_ACTIVE)


def _exp(log_GF: Tensor) -> Tensor:
    """Thresholds for their logarithms."""
    return log_GF.double().exp()


LAYOUTS = (
    Layout(
        name=NAME,
        description="OpenMOSS, Llama Scope 2: sae_weights.safetensors, for every layer or of a CLT; attention (Lorsa) too",
        detect=detect,
        read=read,
        write=write,
        holds_lorsa=True,
    ),
)
