"""Folders of circuit-tracer: per-layer transcoders (PLT) and cross-layer transcoders (CLT), described by `config.yaml`.

    h = x W_enc^T + b_enc        a = h * 1[h > threshold], or max(h, 0) without threshold, or the k largest h
    PLT: y_l = a_l W_dec_l + b_dec_l (+ x_l W_skip_l^T)          CLT: y_l = sum_{g <= l} a_g W_dec_g[:, l - g] + b_dec_l

x is what `feature_input_hook` names: the stream before the MLP (`hook_resid_mid`), the norm's output before its gain
(`ln2.hook_normalized`) or after it (`mlp.hook_in`). A threshold below 0 admits negative activations: this tool applies no ReLU
first. `b_dec_l` belongs to the layer that is written. Features of the first position do not count, as in that tool.

Layer files of a PLT are `layer_N.safetensors`, or whatever `transcoders` lists: also Gemma Scope's `.npz` and Gemma Scope 2's
files. `activation: topk` keeps the `k` largest pre-activations whatever their sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats import hub
from replacement.crosscoder.formats.hooks import MLP_OUT, MLP_READS, MLP_WRITES, shape_of
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.single_layers import LayerWeights, joined, read_layer
from replacement.crosscoder.formats.tensor_files import Settings, layer_files, mentions, numbered
from replacement.crosscoder.formats.writing import check_holds, common_problems, decoders_by_target, write_named
from replacement.crosscoder.topk import TopK
from replacement.crosscoder.wiring import Wiring

CONFIG_FILE = "config.yaml"
KINDS = {"circuit-tracer-plt": "transcoder_set", "circuit-tracer-clt": "cross_layer_transcoder"}
UNDECOMPOSED = 1
"""circuit-tracer sets the features of the first position to 0."""


def detect(folder: Path, *, cross_layer: bool) -> bool:
    """Whether a folder says what circuit-tracer asks for, of a CLT or of anything else, or holds the layers of its PLTs."""
    config = folder / CONFIG_FILE
    if not mentions(config, "model_kind"):  # a forgotten file is then named when the folder is opened
        return not cross_layer and (folder / "layer_0.safetensors").is_file()
    return mentions(config, KINDS["circuit-tracer-clt"]) == cross_layer


def read(folder: Path) -> Published:
    """Open a folder of either kind.

    Raises:
        ValueError: names the file: an entry or tensor is missing, unknown or of another kind, a hook or activation that is not
            known, a layer that is missing, or layers of different sizes.
    """
    settings = Settings(folder / CONFIG_FILE)
    kind = settings.take("model_kind", str)
    facts = {
        "feature_input_hook": _hook(settings, "input", MLP_READS),
        "feature_output_hook": _hook(settings, "output", MLP_WRITES),
    }
    name, scan = settings.take("model_name", str, default=""), settings.take("scan", (str, list), default="")
    facts |= {"scan": scan} if scan else {}
    chooses = settings.take("activation", str, default="relu")
    k = settings.take("k", int, default=None)
    settings.ignore("repo_id", "revision", "subfolder", "description")
    readers = {"transcoder_set": _read_plt, "cross_layer_transcoder": _read_clt}
    if kind not in readers:
        raise ValueError(f"{settings.path}: model_kind: expected {' or '.join(readers)}, got {kind!r:.50}")
    read_site = MLP_READS[facts["feature_input_hook"]]
    parts = readers[kind](folder, settings, read_site)
    settings.finish()
    return Published(
        path=folder,
        activation=_activation(settings.path, chooses, k, parts["tensors"]),
        undecomposed_positions=UNDECOMPOSED,
        model_name=name,
        facts=facts,
        **parts,
    )


def _hook(settings: Settings, side: str, known: Mapping[str, str]) -> str:
    entry = f"feature_{side}_hook"
    hook: str = settings.take(entry, str)
    if hook not in known:
        raise ValueError(f"{settings.path}: {entry}: expected one of {', '.join(known)}, got {hook!r:.50}")
    return hook


def _activation(path: Path, chooses: str, k: int | None, tensors: Mapping[str, Tensor]) -> Activation:
    if chooses not in ("relu", "topk", "jump_relu"):
        raise ValueError(f"{path}: activation: expected relu, jump_relu or topk, got {chooses!r:.50}")
    if chooses == "topk" and k is None:
        raise ValueError(f"{path}: activation topk needs the entry k, the number of features kept")
    if chooses != "topk" and k is not None:
        raise ValueError(f"{path}: k goes with activation: topk, got k {k} with activation: {chooses}")
    if k is not None:
        if "threshold" in tensors:
            raise ValueError(f"{path}: activation is topk, but the layers have thresholds")
        return TopK(k, relu=False)
    return JumpReLU() if "threshold" in tensors else ReLU()


def _read_plt(folder: Path, settings: Settings, read_site: str) -> dict[str, Any]:
    listed = settings.take("transcoders", list, default=None)
    if listed is None:
        paths = numbered(folder, "layer_", ".safetensors")
    else:
        paths = [hub.local_file(str(given), beside=folder) for given in listed]
    layers = [read_layer(path) for path in paths]
    shape = shape_of(len(layers), layers[0].encoder_FD.shape[1])
    rule = "transcoder of each layer's MLP: h = x W_enc^T + b_enc, b_dec added to the layer's output"
    return {
        "layout": "circuit-tracer-plt",
        "rule": rule,
        "wiring": Wiring.per_layer(shape, read=read_site),
        **joined(layers, paths),
    }


def _read_clt(folder: Path, settings: Settings, read_site: str) -> dict[str, Any]:
    encoders, decoders = layer_files(folder)
    n_layers = len(encoders)
    n_features, width = encoders[0].take("W_enc_0", None, None).shape
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    thresholds = []
    for layer, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
        taken = {
            f"W_enc.{layer}": encoder.take(f"W_enc_{layer}", n_features, width),
            f"b_enc.{layer}": encoder.take(f"b_enc_{layer}", n_features),
            f"b_dec.{layer}": encoder.take(f"b_dec_{layer}", width),
            f"W_dec.{layer}": decoder.take(f"W_dec_{layer}", n_features, n_layers - layer, width),
        }
        threshold_F = encoder.take_if_there(f"threshold_{layer}", n_features)
        thresholds += [] if threshold_F is None else [threshold_F]
        encoder.finish()
        decoder.finish()
        tensors |= taken
        sources |= {name: str((decoder if name.startswith("W_dec") else encoder).path) for name in taken}
    if thresholds and len(thresholds) != n_layers:
        raise ValueError(
            f"{folder}: expected thresholds in every layer or in none, got {len(thresholds)} of {n_layers}"
        )
    if thresholds:
        tensors["threshold"] = torch.stack(thresholds)
    return {
        "layout": "circuit-tracer-clt",
        "rule": "cross-layer transcoder: h = x W_enc^T + b_enc, b_dec of a layer added once to that layer's output",
        "wiring": Wiring.strictly_causal(shape_of(n_layers, width), read=read_site),
        "n_features": n_features,
        "tensors": tensors,
        "sources": sources,
        "files": [file.mapped for file in (*encoders, *decoders)],
    }


# Writing -----------------------------------------------------------------------------------------------------------------


def write_plt(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write a per-layer transcoder; see `_check_writable` for what is refused."""
    hook = _check_writable(crosscoder, "per_layer", "circuit-tracer-plt")
    for layer in range(crosscoder.n_groups):
        weights = LayerWeights.of(crosscoder, layer)
        named = {
            "W_enc": weights.encoder_FD,
            "W_dec": weights.decoder_FD,
            "b_enc": weights.encoder_bias_F,
            "b_dec": weights.decoder_bias_D,
            "W_skip": weights.skip_DD,
            "activation_function.threshold": weights.threshold_F,
        }
        write_named(folder / f"layer_{layer}.safetensors", named, dtype)
    _write_config(crosscoder, folder, KINDS["circuit-tracer-plt"], hook)


def write_clt(crosscoder: Crosscoder, folder: Path, dtype: torch.dtype) -> None:
    """Write a cross-layer transcoder; see `_check_writable` for what is refused."""
    hook = _check_writable(crosscoder, "strictly_causal", "circuit-tracer-clt")
    problems = {
        "skip connections: that tool does not load them": crosscoder.skip,
        "TopK: that tool applies a ReLU or thresholds": isinstance(crosscoder.activation, TopK),
    }
    check_holds("circuit-tracer-clt", problems)
    for layer, writes in enumerate(crosscoder.wiring.writes):
        (read,) = crosscoder.wiring.reads[layer]
        named = {
            f"W_enc_{layer}": crosscoder.encoder(layer, read),
            f"b_enc_{layer}": crosscoder.b_enc[layer],
            f"b_dec_{layer}": crosscoder.decoder_bias(writes[0]),
            f"threshold_{layer}": None if crosscoder.threshold is None else crosscoder.threshold[layer],
        }
        write_named(folder / f"W_enc_{layer}.safetensors", named, dtype)
        decoder = decoders_by_target(crosscoder, layer)
        write_named(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoder}, dtype)
    _write_config(crosscoder, folder, KINDS["circuit-tracer-clt"], hook)


def _check_writable(crosscoder: Crosscoder, family: str, layout: str) -> str:
    """The input hook's name, once it is known that the layout can hold the crosscoder.

    Raises:
        ValueError: another wiring, an activation function that the layout does not have, tied decoders, a read site without a
            hook's name, or another number of positions without features than that tool has.
    """
    wiring = crosscoder.wiring
    sites = {site.kind for site in (*wiring.read_sites, *wiring.write_sites)}
    reads = {site.kind for site in wiring.read_sites}
    hook = next((name for name, kind in MLP_READS.items() if reads == {kind}), None)
    problems = {
        f"the wiring {wiring.name}": wiring.name != family or "mlp_out" not in sites,
        f"reads of {', '.join(sorted(reads))}": hook is None,
        f"the activation {crosscoder.activation.to_dict()}": _has_no_name(crosscoder.activation),
        "tied decoders": crosscoder.tied,
    }
    check_holds(layout, problems | common_problems(crosscoder, positions=UNDECOMPOSED))
    assert hook is not None
    return hook


def _has_no_name(activation: Activation) -> bool:
    if isinstance(activation, TopK):
        return not isinstance(activation.k, int) or activation != TopK(activation.k, relu=False)
    return activation.affine or not isinstance(activation, ReLU | JumpReLU)


def _write_config(crosscoder: Crosscoder, folder: Path, kind: str, hook: str) -> None:
    config: dict[str, Any] = {
        "model_name": crosscoder.model_name,
        "model_kind": kind,
        "feature_input_hook": hook,
        "feature_output_hook": MLP_OUT,
    }
    if isinstance(crosscoder.activation, TopK):
        config |= {"activation": "topk", "k": crosscoder.activation.k}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


LAYOUTS = (
    Layout(
        name="circuit-tracer-plt",
        description="circuit-tracer: config.yaml and one transcoder per layer",
        detect=partial(detect, cross_layer=False),
        read=read,
        write=write_plt,
    ),
    Layout(
        name="circuit-tracer-clt",
        description="circuit-tracer: config.yaml, W_enc_N and W_dec_N files",
        detect=partial(detect, cross_layer=True),
        read=read,
        write=write_clt,
    ),
)
