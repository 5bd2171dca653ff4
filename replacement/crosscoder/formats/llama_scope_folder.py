"""One folder of the layout of `llama_scope.py`: a transcoder or sparse attention of one layer, or a cross-layer transcoder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.formats.hooks import ATTENTION_OUT, ATTENTION_READS, MLP_READS, MLP_WRITES
from replacement.crosscoder.formats.llama_scope_lorsa import read_query_keys, take_query_keys
from replacement.crosscoder.formats.tensor_files import Settings, TensorFile, norm_scale
from replacement.crosscoder.query_keys import QueryKeys
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import JointTopK, TopK

CONFIG_FILE, TENSOR_FILE = "config.json", "sae_weights.safetensors"
KINDS = {"sae": "transcoder", "clt": "cross-layer transcoder", "lorsa": "low-rank sparse attention"}
THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm."
_HOOK = re.compile(r"blocks\.(\d{1,6})\.(.+)")
_TRAINING = (
    *(
        "device",
        "dtype",
        "use_triton_kernel",
        "sparsity_threshold_for_triton_spmm_kernel",
        "sparsity_threshold_for_csr",
    ),
    *("decode_with_csr", "init_cross_layer_decoder_all_zero", "jumprelu_threshold_window", "force_unit_decoder_norm"),
    *("sae_pretrained_name_or_path", "strict_loading"),
)
"""Settings that do not change the function of a trained model."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The configuration and tensors of one folder: one layer's transcoder or sparse attention, or a CLT."""

    kind: str
    reads: Sequence[Site]
    writes: Sequence[Site]
    width: int
    n_features: int
    activation: Activation
    is_scored: bool
    file: TensorFile
    encoders: Sequence[Tensor]
    encoder_biases: Sequence[Tensor]
    decoders: Mapping[tuple[int, int], Tensor]
    """By (group, place among the sites it writes)."""
    decoder_biases: Sequence[Tensor]
    log_thresholds: Sequence[Tensor]
    scales: Mapping[Site, float] = field(default_factory=dict)
    query_keys: QueryKeys | None = None
    """Of low-rank sparse attention: sizes of queries and keys; their tensors; and the factor of queries."""
    query_key_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    query_factor: float = 1.0


class _Weights(NamedTuple):
    """Fields of a `Part`, by group and place of the written layer."""

    encoders: list[Tensor]
    encoder_biases: list[Tensor]
    decoders: dict[tuple[int, int], Tensor]
    decoder_biases: list[Tensor]


def read_part(folder: Path) -> Part:
    """Open one folder; see `llama_scope.read` for what is refused."""
    settings = Settings(folder / CONFIG_FILE)
    kind = settings.take("sae_type", str)
    if kind not in KINDS:
        raise ValueError(f"{settings.path}: sae_type: expected {', '.join(KINDS)}, got {kind!r:.50}")
    width, factor = settings.take("d_model", int), settings.take("expansion_factor", (int, float))
    if width < 1 or not 0 < factor < math.inf:
        raise ValueError(f"{settings.path}: expected a d_model and expansion_factor above 0, got {width} and {factor}")
    n_features = int(width * factor)
    reads, writes = _sites(settings, kind)
    n_layers = len(reads)
    activation, is_scored = _activation(settings, kind)
    norm = _norm_activation(settings)
    has_bias = settings.take("use_decoder_bias", bool, default=True)
    query_keys, query_factor = read_query_keys(settings, n_features) if kind == "lorsa" else (None, 1.0)
    settings.ignore(*_TRAINING)
    settings.finish()
    file = TensorFile(folder / TENSOR_FILE)
    if kind == "clt":
        weights = _clt_weights(file, n_layers, width, n_features)
    else:
        weights = _layer_weights(file, width, n_features, of_heads=kind == "lorsa", has_bias=has_bias)
    thresholds: list[Tensor] = []
    if isinstance(activation, JumpReLU):
        shape = (n_layers, n_features) if kind == "clt" else (n_features,)
        thresholds = list(file.take(THRESHOLD, *shape).view(-1, n_features))
    scales: dict[Site, float] = {}
    if norm != "inference":
        scales = {site: norm_scale(file, NORM + hook, width=width) for site, hook in {**reads, **writes}.items()}
    query_key_tensors = {} if query_keys is None else take_query_keys(file, query_keys, width)
    file.ignore(*(name for name in file.names() if name.startswith(NORM)))
    file.finish()
    return Part(
        kind=kind,
        reads=list(reads),
        writes=list(writes),
        width=width,
        n_features=n_features,
        activation=activation,
        is_scored=is_scored,
        file=file,
        encoders=weights.encoders,
        encoder_biases=weights.encoder_biases,
        decoders=weights.decoders,
        decoder_biases=weights.decoder_biases,
        log_thresholds=thresholds,
        scales=scales,
        query_keys=query_keys,
        query_key_tensors=query_key_tensors,
        query_factor=query_factor,
    )


def _clt_weights(file: TensorFile, n_layers: int, width: int, n_features: int) -> _Weights:
    encoders = [matrix.T for matrix in file.take("W_E", n_layers, width, n_features)]
    encoder_biases = list(file.take("b_E", n_layers, n_features))
    targets = [file.take(f"W_D.{layer}", layer + 1, n_features, width) for layer in range(n_layers)]
    decoders = {(g, m - g): targets[m][g] for g in range(n_layers) for m in range(g, n_layers)}
    decoder_biases = [file.take(f"b_D.{layer}", width) for layer in range(n_layers)]
    return _Weights(encoders, encoder_biases, decoders, decoder_biases)


def _layer_weights(file: TensorFile, width: int, n_features: int, *, of_heads: bool, has_bias: bool) -> _Weights:
    encoder = file.take("W_V", n_features, width) if of_heads else file.take("W_E", width, n_features).T
    encoder_bias = file.take("b_V" if of_heads else "b_E", n_features)
    decoder = file.take("W_O" if of_heads else "W_D", n_features, width)
    decoder_bias = file.take("b_D", width) if has_bias else torch.zeros(width)
    return _Weights([encoder], [encoder_bias], {(0, 0): decoder}, [decoder_bias])


def _norm_activation(settings: Settings) -> str:
    """How activations are scaled; what a crosscoder cannot express is refused."""
    norm = settings.take("norm_activation", str, default="dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        raise ValueError(
            f"{settings.path}: norm_activation: expected dataset-wise or inference, got {norm!r:.50}: its scale would "
            "change from token to token"
        )
    for name in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if settings.take(name, bool, default=False):
            raise ValueError(f"{settings.path}: {name} is true, which a crosscoder cannot express")
    return norm


def _sites(settings: Settings, kind: str) -> tuple[dict[Site, str], dict[Site, str]]:
    """Sites read and written with their hooks, which must be those of one MLP, or one layer's attention, each; a CLT's of
    layers 0, 1, 2 and so on."""
    sides = []
    reads, writes = (ATTENTION_READS, {ATTENTION_OUT: "attn_out"}) if kind == "lorsa" else (MLP_READS, MLP_WRITES)
    for side, known in (("in", reads), ("out", writes)):
        entry = f"hook_points_{side}" if kind == "clt" else f"hook_point_{side}"
        hooks = settings.take(entry, list if kind == "clt" else str)
        sites: dict[Site, str] = {}
        for hook in hooks if kind == "clt" else [hooks]:
            match = _HOOK.fullmatch(str(hook))
            if match is None or match[2] not in known:
                expected = ", ".join(f"blocks.N.{name}" for name in known)
                raise ValueError(f"{settings.path}: {entry}: expected {expected}, got {hook!r:.80}")
            sites[Site(int(match[1]), known[match[2]])] = str(hook)
        sides.append(sites)
    layers = [[site.layer for site in sites] for sites in sides]
    expected_layers = list(range(len(layers[0]))) if kind == "clt" else layers[0]
    if (
        not expected_layers
        or layers != [expected_layers, expected_layers]
        or len({site.kind for site in sides[0]}) != 1
    ):
        raise ValueError(
            f"{settings.path}: expected hooks of the same layers, in order, that are read and written; got layers "
            f"{layers[0]} and {layers[1]}"
        )
    return sides[0], sides[1]


def _activation(settings: Settings, kind: str) -> tuple[Activation, bool]:
    """The activation function, and whether its gate acts on pre-activations times decoder norms."""
    name = settings.take("act_fn", str, default="relu").lower()
    k = settings.take("top_k", int, default=50)
    is_scored = settings.take("sparsity_include_decoder_norm", bool, default=True)
    known: dict[str, Callable[[], Activation]] = {
        "relu": ReLU,
        "jumprelu": JumpReLU,
        "topk": lambda: TopK(k, scored=is_scored),
    }
    if kind == "clt":
        known["layertopk"] = lambda: JointTopK(k, scored=is_scored)
    if name not in known:
        about = ", whose choice depends on the batch: convert it to jumprelu first" if "batch" in name else ""
        raise ValueError(f"{settings.path}: act_fn: expected {', '.join(known)}, got {name!r:.50}{about}")
    return known[name](), is_scored
