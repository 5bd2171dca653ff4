"""Cross-layer transcoders that choose features of all layers jointly: ByteDance-Seed's Cross-Layer-TopK-CLT (2026).

    a_l = ReLU(x_l W_enc_l^T), of which the k * L with the largest a * ||W_dec|| over all layers are kept
    y_m = sum_{l <= m} a_l W_dec_l[:, m - l]

x is the stream before the MLP's norm, y the MLP's output; there are no biases. `||W_dec||` is the norm of all that a feature
writes, which `W_dec_norm.safetensors` holds. The scales of the training are folded into the weights already, so that
`factors.safetensors`, their record, must not be applied again: it is not read. Tokens with a norm of 20 times their layer's
mean or more were left out of the training, in practice the first of a text: the first position has no features.

Files: `W_enc_{l}` `[F, D]`; `W_dec_{l}` `[F, L - l, D]` with `W_dec_norm_{l}` `[F]`; `W_dec_norm` `[L, F]`; `config.json` with
`d_feature` and `k`. Source: the model card of that repository on the Hugging Face hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.hooks import shape_of
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.tensor_files import Settings, TensorFile, layer_files, mentions
from replacement.crosscoder.formats.writing import (
    check_holds,
    common_problems,
    decoders_by_target,
    write_json,
    write_named,
)
from replacement.crosscoder.topk import JointTopK
from replacement.crosscoder.wiring import Wiring

NAME = "cross-layer-topk"
CONFIG_FILE = "config.json"
NORM_FILE = "W_dec_norm.safetensors"
UNDECOMPOSED = 1
RULE = (
    "cross-layer transcoder of the stream before each MLP's norm, without biases: h = x W_enc^T, the k L best of all layers "
    "together by max(h, 0) ||W_dec||"
)


def detect(folder: Path) -> bool:
    """Whether a folder has this layout's configuration beside encoders."""
    return mentions(folder / CONFIG_FILE, '"d_feature"') and any(folder.glob("W_enc_*.safetensors"))


def read(folder: Path) -> Published:
    """Open a folder.

    Raises:
        ValueError: names the file: a layer, tensor or entry that is missing, has another shape or is not known.
    """
    settings = Settings(folder / CONFIG_FILE)
    n_features, k = settings.take("d_feature", int), settings.take("k", int)
    encoders, decoders = layer_files(folder)
    n_layers = len(encoders)
    width = encoders[0].take("W_enc_0", n_features, None).shape[1]
    norms = TensorFile(folder / NORM_FILE)
    tensors: dict[str, Tensor] = {"score_factor": norms.take("W_dec_norm", n_layers, n_features)}
    if bool((tensors["score_factor"] < 0).any()):
        raise ValueError(f"{norms.path}: the tensor W_dec_norm holds values below 0, which no norms are")
    sources = {"score_factor": str(norms.path)}
    for layer, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
        tensors[f"W_enc.{layer}"] = encoder.take(f"W_enc_{layer}", n_features, width)
        tensors[f"W_dec.{layer}"] = decoder.take(f"W_dec_{layer}", n_features, n_layers - layer, width)
        tensors |= {f"b_enc.{layer}": torch.zeros(n_features), f"b_dec.{layer}": torch.zeros(width)}
        decoder.ignore(f"W_dec_norm_{layer}")  # the same numbers as in the file of all norms
        sources |= {f"W_enc.{layer}": str(encoder.path), f"W_dec.{layer}": str(decoder.path)}
    files = (norms, *encoders, *decoders)
    for file in files:
        file.finish()
    model_name = _base_model(settings, {n_layers, width, n_features, k, k * n_layers})
    return Published(
        layout=NAME,
        path=folder,
        rule=RULE,
        wiring=Wiring.strictly_causal(shape_of(n_layers, width), read="resid_mid"),
        n_features=n_features,
        activation=JointTopK(k * n_layers, scored=True),
        tensors=tensors,
        files=[file.mapped for file in files],
        sources=sources,
        undecomposed_positions=UNDECOMPOSED,
        model_name=model_name,
        facts={"k": k, "left out of the training": "tokens of 20 times their layer's mean norm or more (the first)"},
    )


def _base_model(settings: Settings, sizes: set[int]) -> str:
    """The model's name; other entries may name things and repeat sizes, and nothing else."""
    for name in settings.names():
        value = json.loads(json.dumps(settings.take(name, object)))
        if not isinstance(value, str) and value not in sizes:
            raise ValueError(
                f"{settings.path}: the entry {name!r} is neither a text nor one of the sizes {sorted(sizes)}: {value!r:.50}"
            )
    known = ("base_model", "base_model_name", "model_name", "model")
    return next((settings.take(name, str) for name in known if name in settings), "")


# Writing -----------------------------------------------------------------------------------------------------------------


def write(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write a cross-layer transcoder whose activation function is a scored `JointTopK`.

    Raises:
        ValueError: another wiring or activation function, biases, skip connections, tied decoders, a k that is no multiple of
            the number of layers, or another number of positions without features than 1.
    """
    wiring, activation, n_layers = crosscoder.wiring, crosscoder.activation, crosscoder.n_groups
    reads = {site.kind for site in wiring.read_sites}
    k = activation.k if isinstance(activation, JointTopK) and isinstance(activation.k, int) else 0
    is_joint = k > 0 and activation == JointTopK(k, scored=True)
    problems = {
        f"the wiring {wiring.name}": wiring.name != "strictly_causal",
        f"reads of {', '.join(sorted(reads))}": reads != {"resid_mid"},
        f"the activation {activation.to_dict()}": not is_joint,
        f"k={k}, which is no multiple of {n_layers} layers": k % n_layers != 0,
        "biases": any(bool(bias.any()) for bias in (*crosscoder.b_enc, *crosscoder.b_dec)),
        "skip connections": crosscoder.skip,
        "tied decoders": crosscoder.tied,
    }
    check_holds(NAME, problems | common_problems(crosscoder, positions=UNDECOMPOSED))
    assert crosscoder.score_factor is not None
    norms_GF = crosscoder.score_factor

    def save(name: str, **tensors: Tensor) -> None:
        write_named(folder / f"{name}.safetensors", tensors, dtype)

    for layer, (read_site,) in enumerate(wiring.reads):
        save(f"W_enc_{layer}", **{f"W_enc_{layer}": crosscoder.encoder(layer, read_site)})
        decoder = decoders_by_target(crosscoder, layer)
        save(f"W_dec_{layer}", **{f"W_dec_{layer}": decoder, f"W_dec_norm_{layer}": norms_GF[layer]})
    save("W_dec_norm", W_dec_norm=norms_GF)
    config: dict[str, Any] = {"d_feature": crosscoder.n_features, "k": k // n_layers}
    config |= {"base_model": crosscoder.model_name, "n_layers": n_layers, "d_model": wiring.widths["mlp_out"]}
    write_json(folder / CONFIG_FILE, config)


LAYOUTS = (
    Layout(
        name=NAME,
        description="ByteDance-Seed: a CLT in W_enc_N and W_dec_N files, whose layers compete",
        detect=detect,
        read=read,
        write=write,
    ),
)
