"""SAELens: SAEs and transcoders, `cfg.json` and `sae_weights.safetensors` in a folder for each layer.

    h = (x - b_dec) W_enc + b_enc, where `apply_b_dec_to_input`, else x W_enc + b_enc
    a = max(h, 0), for `jumprelu` where h > threshold, for `topk` where h is among the k largest
    y = a W_dec + b_dec (+ x W_skip^T)

The subtracted `b_dec` is folded into `b_enc`, for which the encoder is read once. A threshold below 0 means 0, because a ReLU
comes first. `batchtopk` is JumpReLU at inference. With `rescale_acts_by_decoder_norm` the k largest `h ||W_dec||` are chosen;
activations are those of h (SAELens gives `h ||W_dec||`, and divides by the norm again when it decodes). Hooks are
TransformerLens's, or modules of the Hugging Face model where `hf_hook_name` names one (Gemma Scope 2 saved by SAELens gives
`hook_mlp_in`, which is another place). The first position has no features where `exclude_special_tokens` left BOS out.
Source: SAELens 6.49, which also says what versions before 6 mean.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.decoder_norms import decoder_norms
from replacement.crosscoder.formats.hooks import HOOKS, MODULES, hook_of
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.single_layers import (
    SAELENS,
    LayerWeights,
    bias_for_shifted_input,
    joined,
    layer_wiring,
    take_layer,
)
from replacement.crosscoder.formats.tensor_files import Settings, TensorFile
from replacement.crosscoder.formats.writing import check_holds, common_problems, write_json, write_named
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import TopK

NAME = "saelens"
CONFIG_FILE, TENSOR_FILE = "cfg.json", "sae_weights.safetensors"
SAES = ("standard", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
HARMLESS = [
    "dtype",
    "device",
    "metadata",
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "dataset_trust_remote_code",
    "sae_lens_version",
    "sae_lens_training_version",
    "hook_layer",
    "hook_layer_out",
    "d_out",
    "d_sae",
    "d_in",
    "hook_point_layer",
    "seed",
    "verbose",
]
"""Settings of the training, and sizes that the tensors have, too."""


def detect(path: Path) -> bool:
    """Whether there are both files, in the folder or in folders of it."""
    return path.is_dir() and bool(_folders(path))


def _folders(path: Path) -> list[Path]:
    candidates = (
        [path] if (path / TENSOR_FILE).is_file() else sorted(file.parent for file in path.glob(f"*/{TENSOR_FILE}"))
    )
    return [folder for folder in candidates if (folder / CONFIG_FILE).is_file()]


def read(path: Path) -> Published:
    """Open one folder, or a folder of one for each layer.

    Raises:
        ValueError: names the file: an architecture, hook or setting that is not supported, tensors or entries that are
            missing, misshapen or not known, or layers that do not fit together.
    """
    parts = sorted((_Layer(folder) for folder in _folders(path)), key=lambda layer: (layer.read, layer.write))
    for first, second in itertools.pairwise(parts):
        if first.read == second.read:
            raise ValueError(
                f"{path}: {first.folder.name} and {second.folder.name} both read {first.read}: name one folder"
            )
    for layer in parts:
        if layer.shared != parts[0].shared:
            raise ValueError(f"{layer.folder} has {layer.shared}, {parts[0].folder.name} has {parts[0].shared}")
    tensors = joined([layer.weights for layer in parts], [layer.folder / TENSOR_FILE for layer in parts])
    if parts[0].scored:
        tensors["tensors"]["score_factor"] = decoder_norms([[layer.weights.decoder_FD] for layer in parts])
    return Published(
        layout=NAME,
        path=path,
        rule="h = x W_enc + b_enc, x - b_dec where apply_b_dec_to_input; a = max(h, 0), above the threshold or among the "
        "k largest; b_dec added to the output",
        wiring=layer_wiring([p.read for p in parts], [p.write for p in parts], [p.weights for p in parts]),
        activation=parts[0].activation,
        undecomposed_positions=parts[0].undecomposed_positions,
        model_name=parts[0].model_name,
        **tensors,
    )


class _Layer:
    """One folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cfg = Settings(folder / CONFIG_FILE)
        metadata = cfg.take("metadata", dict, default={})
        where = Settings(cfg.path, metadata) if {"hook_name", "hf_hook_name"} & metadata.keys() else cfg
        architecture, kwargs = _read_architecture(cfg)
        is_transcoder = architecture in TRANSCODERS
        self._refuse(cfg, where)
        self.read = _site(where, "", cfg.path)
        self.write = _site(where, "_out", cfg.path) if is_transcoder else self.read
        subtracts = cfg.take("apply_b_dec_to_input", bool, default=not is_transcoder)
        self.scored = cfg.take("rescale_acts_by_decoder_norm", bool, default=False)
        if self.scored and architecture != "topk":
            raise ValueError(f"{cfg.path}: rescale_acts_by_decoder_norm is supported with the architecture topk only")
        k = cfg.take("k", (int, float), default=kwargs.get("k"))
        excluded = where.take("exclude_special_tokens", (bool, list), default=False)
        self.undecomposed_positions = int(bool(excluded))
        self.model_name = where.take("model_name", str, default="")
        cfg.ignore(*HARMLESS)
        cfg.finish()
        weights, has_threshold = _read_weights(TensorFile(folder / TENSOR_FILE), architecture)
        if subtracts and is_transcoder:
            raise ValueError(f"{cfg.path}: apply_b_dec_to_input is not possible in a transcoder")
        if subtracts:
            shift = weights.encoder_FD, weights.encoder_bias_F, weights.decoder_bias_D, weights.mapped
            weights = replace(weights, encoder_bias_F=bias_for_shifted_input(*shift))
        self.weights = weights
        self.activation: Activation = JumpReLU() if has_threshold else ReLU()
        if architecture == "topk":
            if not isinstance(k, int):
                raise ValueError(f"{cfg.path}: expected a whole number k with architecture topk, got {k!r:.50}")
            self.activation = TopK(k, scored=self.scored)
        self.shared = (self.activation, self.model_name, self.undecomposed_positions)

    def _refuse(self, cfg: Settings, where: Settings) -> None:
        """Refuse settings that change the function in ways that a crosscoder here does not have."""
        allowed: dict[str, tuple[Any, ...]] = {
            "normalize_activations": ("none", None, False),
            "reshape_activations": ("none", "hook_z"),
            "finetuning_scaling_factor": (False, None),
        }
        for name, values in allowed.items():
            value = cfg.take(name, (str, bool, type(None)), default=values[0])
            if value not in values:
                raise ValueError(f"{cfg.path}: {name} {value!r:.50} is not supported")
        for name in ("hook_head_index", "hook_head_index_out", "hook_point_head_index"):
            if where.take(name, (int, type(None)), default=None) is not None:
                raise ValueError(f"{cfg.path}: {name}: a single head is not supported")


def _read_architecture(cfg: Settings) -> tuple[str, dict[str, Any]]:
    """The architecture, and the parameters of its activation function."""
    architecture = cfg.take("architecture", str, default="standard")
    activation_fn = cfg.take("activation_fn", str, default=cfg.take("activation_fn_str", str, default="relu"))
    kwargs = cfg.take("activation_fn_kwargs", dict, default={})
    if architecture == "standard" and activation_fn == "topk":  # before version 6
        architecture = "topk"
    if architecture not in (*SAES, *TRANSCODERS):
        expected = ", ".join((*SAES, *TRANSCODERS))
        raise ValueError(f"{cfg.path}: architecture: expected one of {expected}, got {architecture!r:.50}")
    if activation_fn not in ("relu", "topk") or set(kwargs) - {"k"}:
        raise ValueError(f"{cfg.path}: activation_fn: expected relu or topk, got {activation_fn!r:.50} with {kwargs}")
    return architecture, kwargs


def _read_weights(file: TensorFile, architecture: str) -> tuple[LayerWeights, bool]:
    """The tensors of one folder, which must be those of its architecture, and whether a threshold is among them."""
    factor_F = file.take_if_there("scaling_factor", None)
    if factor_F is not None and not bool((factor_F == 1).all()):
        raise ValueError(f"{file.path}: the tensor scaling_factor (finetuning) is not 1, which is not supported")
    weights = take_layer(file, SAELENS)
    file.finish()
    has_threshold = "jumprelu" in architecture or "batchtopk" in architecture
    for name, needed in {"threshold": has_threshold, "W_skip": "skip" in architecture}.items():
        if needed != (name in file):
            verb = "lacks" if needed else "has"
            raise ValueError(
                f"{file.path} {verb} the tensor {name}, which does not fit the architecture {architecture}"
            )
    return weights, has_threshold


def _site(where: Settings, suffix: str, path: Path) -> Site:
    named = where.take(f"hf_hook_name{suffix}", (str, type(None)), default=None)
    match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d{1,9})\.(.+)", named or "")
    if match is not None and match[2] in MODULES:
        where.ignore(f"hook_name{suffix}")
        return Site(int(match[1]), MODULES[match[2]])
    old = "hook_point" if not suffix and "hook_point" in where else f"hook_name{suffix}"
    hook = where.take(old, str)
    match = re.fullmatch(r"blocks\.(\d{1,9})\.(.+)", hook)
    if match is None or match[2] not in HOOKS:
        raise ValueError(f"{path}: {old}: expected blocks.N. and one of {', '.join(HOOKS)}, got {hook!r:.80}")
    return Site(int(match[1]), HOOKS[match[2]])


# Writing -----------------------------------------------------------------------------------------------------------------


def write(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write both files, in folders `layer_N` where there are several layers.

    Raises:
        ValueError: names what the layout cannot say.
    """
    architecture = _architecture(crosscoder)
    for group in range(crosscoder.n_groups):
        (read,), (write,) = crosscoder.wiring.reads[group], crosscoder.wiring.writes[group]
        weights = LayerWeights.of(crosscoder, group)
        named = {
            "W_enc": weights.encoder_FD.T,
            "W_dec": weights.decoder_FD,
            "b_enc": weights.encoder_bias_F,
            "b_dec": weights.decoder_bias_D,
            "threshold": weights.threshold_F,
            "W_skip": weights.skip_DD,
        }
        place = folder if crosscoder.n_groups == 1 else folder / f"layer_{read.layer}"
        place.mkdir(exist_ok=True)
        write_named(place / TENSOR_FILE, named, dtype)
        config: dict[str, Any] = {
            "architecture": architecture,
            "d_in": weights.encoder_FD.shape[1],
            "d_sae": crosscoder.n_features,
            "dtype": str(dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "hook_z" if read.kind == "attn_z" else "none",
            "metadata": {
                "sae_lens_version": "6.49.0",
                "model_name": crosscoder.model_name,
                "hook_name": f"blocks.{read.layer}.{hook_of(read.kind)}",
                "exclude_special_tokens": bool(crosscoder.undecomposed_positions),
            },
        }
        if isinstance(crosscoder.activation, TopK):
            config |= {"k": crosscoder.activation.k, "rescale_acts_by_decoder_norm": False}
        if read != write:
            config["d_out"] = weights.decoder_FD.shape[1]
            config["metadata"]["hook_name_out"] = f"blocks.{write.layer}.{hook_of(write.kind)}"
        write_json(place / CONFIG_FILE, config)


def _architecture(crosscoder: Crosscoder) -> str:
    wiring, activation = crosscoder.wiring, crosscoder.activation
    single = all(len(group) == 1 for side in (wiring.reads, wiring.writes) for group in side)
    names = {ReLU: "standard", JumpReLU: "jumprelu", TopK: "topk"}
    plain = type(activation) in names and activation.to_dict().keys() <= {"name", "k", "threshold", "bandwidth"}
    is_sae = list(wiring.reads) == list(wiring.writes)
    problems = {
        f"the wiring {wiring.name}": not single
        or len({group[0].layer for group in wiring.reads}) < wiring.n_groups
        or wiring.writes_differences,
        f"the activation {activation.to_dict()}": not plain or isinstance(getattr(activation, "k", 0), tuple),
        "TopK in a transcoder": isinstance(activation, TopK) and not is_sae,
        "thresholds below 0": crosscoder.threshold is not None and bool((crosscoder.threshold < 0).any()),
        "tied decoders": crosscoder.tied,
        "skip connections in an SAE": crosscoder.skip and is_sae,
    }
    check_holds(NAME, problems | common_problems(crosscoder, positions=range(2)))
    if is_sae:
        return names[type(activation)]
    jump = "jumprelu_" if isinstance(activation, JumpReLU) else ""
    return jump + ("skip_transcoder" if crosscoder.skip else "transcoder")


LAYOUTS = (
    Layout(
        name=NAME,
        description="SAELens: cfg.json and sae_weights.safetensors, one folder for each layer",
        detect=detect,
        read=read,
        write=write,
    ),
)
