"""EleutherAI's sparsify: autoencoders and transcoders with TopK, one folder per hookpoint such as `layers.3.mlp`.

    h = s_in x W_enc^T + b_enc     a = TopK_k(max(h, 0))     s_out y = a W_dec + b_dec (+ s_in x W_skip^T)

An autoencoder (without `transcode`) reads and writes the output of the module that its folder is named after, and has `b_dec`
subtracted from its input: `b_enc` then becomes `b_enc - W_enc b_dec`. A transcoder maps an MLP's input (after the norm) to its
output, and nothing is subtracted. The ReLU comes first in every version but the earliest with `signed`, which is refused.

clt-training's transcoders of one layer add a map behind the activation function, `(a + post_enc) * post_enc_scale` where a is
above 0, scales (`in_norm`, `out_norm`: `s = sqrt(D) / norm`), and, in the settings of the whole training, the input that was
read (`hookpoints_in`). All positions have features, unless these settings say that BOS was left out (`filter_bos`). Where a
model has a norm behind its MLP (Gemma 2 and 3), the output of the module in front of that norm is not our `mlp_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.single_layers import LayerWeights, joined, layer_wiring
from replacement.crosscoder.formats.sparsify_files import (
    CONFIG_FILE,
    RUN_FILE,
    TENSOR_FILE,
    Coder,
    described,
    detect,
    open_coders,
    run_of,
)
from replacement.crosscoder.formats.writing import check_holds, common_problems, write_json, write_named
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import TopK

NAME = "sparsify"
READ_HOOKS = {"mlp_in": "layers.{}.mlp", "resid_mid": "layers.{}.post_attention_layernorm"}
"""Module whose input is each site, as `hookpoints_in` names it."""


def read(folder: Path) -> Published:
    """Open a folder of hookpoints, or one of them.

    Raises:
        ValueError: names the file and what is missing, misshapen, not known or not supported.
    """
    coders, left_out = open_coders(folder)
    run = run_of(folder, coders)
    read_kind = run.read if coders[0].transcode else coders[0].written
    reads = [Site(coder.layer, read_kind) for coder in coders]
    writes = [Site(coder.layer, coder.written) for coder in coders]
    layers = [_weights(coder) for coder in coders]
    parts = joined(layers, [coder.file.path for coder in coders])
    what = "transcoder of each layer's MLP" if coders[0].transcode else "autoencoder, b_dec subtracted from its input"
    return Published(
        layout=NAME,
        rule=f"{what}: h = x W_enc^T + b_enc, the k largest where above 0, b_dec added to the layer's output",
        wiring=layer_wiring(reads, writes, layers),
        sources=parts["sources"],
        **described(folder, coders, left_out, read_kind, run, parts["tensors"]),
    )


def _weights(coder: Coder) -> LayerWeights:
    n_features, width = coder.n_features, coder.width
    bias_D = coder.file.take("b_dec", width)
    return LayerWeights(
        encoder_FD=coder.encoder(),
        decoder_FD=coder.file.take("W_dec", n_features, width),
        encoder_bias_F=coder.encoder_bias(None if coder.transcode else bias_D),
        decoder_bias_D=bias_D,
        skip_DD=coder.file.take("W_skip", width, width) if coder.skip else None,
        mapped=coder.file.mapped,
    )


# Writing -----------------------------------------------------------------------------------------------------------------


def write(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write a per-layer transcoder; see `check_writable` for what is refused."""
    check_writable(crosscoder, NAME)
    reads = crosscoder.wiring.reads
    writes = [(Site(read.layer, "mlp_out"),) for (read,) in reads]
    problems = {
        f"the wiring {crosscoder.wiring.name}": list(crosscoder.wiring.writes) != writes,
        "tied decoders": crosscoder.tied,
    }
    check_holds(NAME, problems)
    for group, (read,) in enumerate(reads):
        weights = LayerWeights.of(crosscoder, group)
        tensors = {
            "encoder.weight": weights.encoder_FD,
            "encoder.bias": weights.encoder_bias_F,
            "W_dec": weights.decoder_FD,
            "b_dec": weights.decoder_bias_D,
            "W_skip": weights.skip_DD,
        }
        write_hookpoint(crosscoder, folder, group, read.layer, tensors, dtype, {})
    write_run(crosscoder, folder)


def check_writable(crosscoder: Crosscoder, layout: str) -> None:
    """What both projects' files ask of a crosscoder.

    Raises:
        ValueError: another activation function than TopK with a ReLU, other reads than one MLP input or stream in front of an
            MLP, writes to other sites than outputs of MLPs, or more than one position without features.
    """
    wiring = crosscoder.wiring
    reads, writes = ({site.kind for site in sites} for sites in (wiring.read_sites, wiring.write_sites))
    single = all(len(sites) == 1 for sites in wiring.reads)
    problems = {
        f"the activation {crosscoder.activation.to_dict()}": type(crosscoder.activation) is not TopK
        or not crosscoder.activation.is_trainable,
        f"the wiring {wiring.name}": not single or writes != {"mlp_out"} or len(wiring.layers) < wiring.n_groups,
        f"reads of {', '.join(sorted(reads))}": len(reads) != 1 or not reads <= READ_HOOKS.keys(),
    }
    check_holds(layout, problems | common_problems(crosscoder, positions=range(2)))


def write_hookpoint(
    crosscoder: Crosscoder,
    folder: Path,
    group: int,
    layer: int,
    tensors: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> None:
    """The two files of one group."""
    activation = crosscoder.activation
    assert isinstance(activation, TopK)
    path = folder / f"layers.{layer}.mlp"
    path.mkdir()
    write_named(path / TENSOR_FILE, tensors, dtype)
    config = {
        "activation": "topk",
        "num_latents": crosscoder.n_features,
        "normalize_decoder": False,
        "k": activation.k if isinstance(activation.k, int) else activation.k[group],
        "multi_topk": False,
        "skip_connection": crosscoder.skip,
        "transcode": True,
        **settings,
        "d_in": crosscoder.encoders(group)[0].shape[1],
    }
    write_json(path / CONFIG_FILE, config)


def write_run(crosscoder: Crosscoder, folder: Path) -> None:
    """Settings of the whole training: the model, what was read, and whether BOS was left out."""
    sites = [read for (read,) in crosscoder.wiring.reads]
    config: dict[str, Any] = {
        "model": crosscoder.model_name,
        "hookpoints": [f"layers.{site.layer}.mlp" for site in sites],
        "hookpoints_in": [READ_HOOKS[site.kind].format(site.layer) for site in sites],
        "filter_bos": crosscoder.undecomposed_positions == 1,
    }
    write_json(folder / RUN_FILE, config)


LAYOUTS = (
    Layout(
        name=NAME,
        description="EleutherAI sparsify: layers.N.mlp folders with cfg.json and sae.safetensors",
        detect=partial(detect, cross_layer=False),
        read=read,
        write=write,
    ),
)
