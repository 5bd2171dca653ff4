"""EleutherAI's folders of hookpoints, written here from their published keys and shapes, against the formulas in float64."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import Change, RandomTensors, assert_computes, cut_off, entries_changed, tensors_changed
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement import Crosscoder, TopK, Wiring, checkpoint
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.formats.layouts import open_published
from replacement.crosscoder.sites import ModelShape, Site

L, F, D, K = 3, 12, 6, 4
SHAPE = ModelShape(n_layers=L, d_model=D, n_heads=2, d_head=3)
CFG = {
    "activation": "topk",
    "expansion_factor": 2,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": True,
    "d_in": D,
}


def write_hookpoint(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**CFG, **config}))


def write_coders(
    folder: Path,
    *,
    hookpoint: str = "layers.{}.mlp",
    layers: tuple[int, ...] = (0, 1, 2),
    tuned: bool = False,
    **config: Any,
) -> Path:
    """Coders of single hookpoints; `tuned` adds what clt-training does besides."""
    random = RandomTensors()
    for layer in layers:
        tensors = {"encoder.weight": random(F, D), "encoder.bias": random(F), "W_dec": random(F, D), "b_dec": random(D)}
        if config.get("skip_connection"):
            tensors["W_skip"] = random(D, D)
        if tuned:
            tensors |= {"in_norm": random(1).abs() + 1, "out_norm": random(1).abs() + 1}
            tensors |= {"post_enc": random(F), "post_enc_scale": random(F)}
            config |= {"normalize_io": True, "post_encoder_scale": True, "n_targets": 0, "coalesce_topk": "none"}
        write_hookpoint(folder / hookpoint.format(layer), tensors, **config)
    return folder


def doubles(path: Path) -> dict[str, Tensor]:
    return {name: value.double() for name, value in load_file(path / "sae.safetensors").items()}


def top_k(pre_BF: Tensor, k: int) -> Tensor:
    """As there: the ReLU first, then the largest."""
    pre_BF = pre_BF.relu()
    return pre_BF * torch.zeros_like(pre_BF).scatter_(1, pre_BF.topk(k, dim=1).indices, 1.0)


def coder_reference(folder: Path, hookpoint: str, read: str, written: str, layers: tuple[int, ...] = (0, 1, 2)) -> Any:
    def compute(inputs: Any) -> Any:
        acts, outputs = [], {}
        for layer in layers:
            weights = doubles(folder / hookpoint.format(layer))
            cfg = json.loads((folder / hookpoint.format(layer) / "cfg.json").read_text())
            x_BD = inputs[Site(layer, read)] * math.sqrt(D) / weights.get("in_norm", math.sqrt(D))
            shifted_BD = x_BD if cfg.get("transcode") else x_BD - weights["b_dec"]
            act_BF = top_k(shifted_BD @ weights["encoder.weight"].T + weights["encoder.bias"], cfg["k"])
            if "post_enc" in weights:
                act_BF = (act_BF + weights["post_enc"] * (act_BF > 0)) * weights["post_enc_scale"]
            y_BD = act_BF @ weights["W_dec"] + weights["b_dec"]
            if "W_skip" in weights:
                y_BD += x_BD @ weights["W_skip"].T
            acts.append(act_BF)
            outputs[Site(layer, written)] = y_BD * weights.get("out_norm", math.sqrt(D)) / math.sqrt(D)
        return acts, outputs

    return compute


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_of_mlps(tmp_path: Path, skip: bool, tuned: bool) -> None:
    folder = write_coders(tmp_path / "plt", skip_connection=skip, tuned=tuned)
    crosscoder = assert_computes(folder, coder_reference(folder, "layers.{}.mlp", "mlp_in", "mlp_out"), tmp_path)
    assert crosscoder.wiring.name == "per_layer"
    assert crosscoder.activation == TopK(K, affine=tuned)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("hookpoint", "site"),
    [("layers.{}", "resid_post"), ("transformer.h.{}.mlp", "mlp_out"), ("model.layers.{}.self_attn", "attn_out")],
)
def test_autoencoders_have_the_bias_subtracted(tmp_path: Path, hookpoint: str, site: str, tuned: bool) -> None:
    folder = write_coders(tmp_path / "sae", hookpoint=hookpoint, layers=(0, 2), transcode=False, tuned=tuned)
    assert_computes(folder, coder_reference(folder, hookpoint, site, site, (0, 2)), tmp_path)


def test_the_first_versions_had_no_transcoders(tmp_path: Path) -> None:
    config = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K, "signed": False, "d_in": D}
    write_coders(tmp_path / "sae", hookpoint="layers.{}")
    for path in (tmp_path / "sae").glob("*/cfg.json"):
        path.write_text(json.dumps(config))
    random = RandomTensors()
    write_hookpoint(tmp_path / "sae" / "embed_tokens", {"encoder.weight": random(F, D)})
    assert_computes(
        tmp_path / "sae", coder_reference(tmp_path / "sae", "layers.{}", "resid_post", "resid_post"), tmp_path
    )
    assert open_published(tmp_path / "sae").facts == {"l0": K, "left out": "embed_tokens"}


def test_one_hookpoint_and_layers_with_gaps(tmp_path: Path) -> None:
    folder = write_coders(tmp_path / "plt", layers=(1, 2), skip_connection=True)
    reference = coder_reference(folder, "layers.{}.mlp", "mlp_in", "mlp_out", (1, 2))
    assert assert_computes(folder, reference, tmp_path).wiring.name == "transcoder"
    reference = coder_reference(folder, "layers.{}.mlp", "mlp_in", "mlp_out", (2,))
    crosscoder = assert_computes(folder / "layers.2.mlp", reference, tmp_path / "single")
    assert crosscoder.wiring.reads == ((Site(2, "mlp_in"),),)


def test_layers_may_keep_different_numbers(tmp_path: Path) -> None:
    folder = write_coders(tmp_path / "plt")
    for layer in range(L):
        path = folder / f"layers.{layer}.mlp" / "cfg.json"
        path.write_text(json.dumps({**CFG, "k": 2 + layer}))
    crosscoder = assert_computes(folder, coder_reference(folder, "layers.{}.mlp", "mlp_in", "mlp_out"), tmp_path)
    assert crosscoder.activation == TopK((2, 3, 4))


def test_settings_of_the_training_say_what_was_read(tmp_path: Path) -> None:
    folder = write_coders(tmp_path / "plt")
    run = {
        "model": "org/model",
        "hookpoints": [f"layers.{layer}.mlp" for layer in range(L)],
        "hookpoints_in": [f"layers.{layer}.post_attention_layernorm" for layer in range(L)],
        "filter_bos": True,
    }
    (folder / "config.json").write_text(json.dumps(run))
    reference = coder_reference(folder, "layers.{}.mlp", "resid_mid", "mlp_out")
    crosscoder = assert_computes(folder, reference, tmp_path, decomposed_from=1)
    assert crosscoder.model_name == "org/model"
    run["hookpoints_in"] = ["layers.0.self_attn"]
    (folder / "config.json").write_text(json.dumps(run))
    with pytest.raises(
        ValueError, match=r"config.json: hookpoints_in: expected one of mlp, .*, got 'layers.0.self_attn'"
    ):
        checkpoint.load(folder)
    run["hookpoints_in"] = ["layers.0.ln_2"]
    (folder / "config.json").write_text(json.dumps(run))
    with pytest.raises(
        ValueError, match=r"hookpoints_in: expected one kind of input for every layer, got layers.0.ln_2"
    ):
        checkpoint.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
def test_round_trip(tmp_path: Path, skip: bool, dtype: torch.dtype) -> None:
    folder = write_coders(tmp_path / "plt", skip_connection=skip)
    for path in folder.glob("*/sae.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    convert(folder, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "again", to="sparsify")
    for layer in range(L):
        before, after = (
            load_file(path / f"layers.{layer}.mlp" / "sae.safetensors") for path in (folder, tmp_path / "again")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert checkpoint.load(tmp_path / "again").settings() == checkpoint.load(folder).settings()


def with_config(layer: int = 1, **changes: Any) -> Change:
    return entries_changed(f"layers.{layer}.mlp/cfg.json", **changes)


with_tensors = partial(tensors_changed, "layers.1.mlp/sae.safetensors")


def renamed(name: str) -> Change:
    return lambda folder: (folder / "layers.1.mlp").rename(folder / name)


AT = "layers.1.mlp/cfg.json"
MISTAKES: list[tuple[Change, str]] = [
    (lambda folder: (folder / "layers.1.mlp/sae.safetensors").unlink(), "layers.1.mlp/sae.safetensors does not exist"),
    (lambda folder: (folder / AT).unlink(), f"{AT} does not exist"),
    (lambda folder: (folder / AT).write_text("{"), f"{AT} "),
    (cut_off("layers.1.mlp/sae.safetensors"), "layers.1.mlp/sae.safetensors is damaged or not a safetensors file"),
    (with_tensors(b_dec=None), "layers.1.mlp/sae.safetensors lacks the tensor b_dec: it holds "),
    (with_tensors(b_dec=torch.zeros(D + 1)), "the tensor b_dec has the wrong shape: expected [6], got [7]"),
    (with_tensors(**{"encoder.weight": torch.zeros(18, D)}), "encoder.weight has the wrong shape: expected [12, 6]"),
    (with_tensors(W_dec=torch.zeros(F, D, dtype=torch.int32)), "the dtype of the tensor W_dec must be"),
    (with_tensors(b_dec=torch.full((D,), torch.nan)), "layers.1.mlp/sae.safetensors: the tensor b_dec.1 holds NaN"),
    (with_tensors(W_skip=torch.zeros(D, D)), "sae.safetensors holds tensors that its layout does not have: W_skip"),
    (with_config(k=0), f"{AT}: k: expected 1 to 12 features, got 0"),
    (with_config(k=None), f"{AT} lacks the entry 'k'"),
    (with_config(num_latents=18), "layers.1.mlp: n_features is 18, that of layers.0.mlp is 12"),
    (with_config(novelty=1), f"{AT} has entries that are not known: novelty"),
    (with_config(signed=True), f"{AT}: signed is not supported: it keeps the largest magnitudes"),
    (with_config(embed_skip=True), f"{AT}: embed_skip is not supported: it adds a map from the embeddings"),
    (with_config(activation="groupmax"), "activation: expected topk, got 'groupmax': one feature of every block"),
    (with_config(activation="batchtopk"), "activation: expected topk, got 'batchtopk': it chooses over a batch"),
    (with_config(activation="gelu"), "activation: expected topk, got 'gelu': it is not known"),
    (with_config(transcode=False), "layers.1.mlp: transcode is False, that of layers.0.mlp is True"),
    (with_config(normalize_io=True), "sae.safetensors lacks the tensor in_norm"),
    (with_config(post_encoder_scale=True), "sae.safetensors lacks the tensor post_enc_scale"),
    (renamed("layers.1"), "layers.1/cfg.json: transcoders of layers.1 are not supported: only those of an MLP"),
    (renamed("layers.1.mlp.act"), "the hookpoint 'layers.1.mlp.act' is not supported: expected one such as layers.N, "),
    (renamed("h.2.mlp"), "holds two hookpoints of layer 2: expected one"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:50] for _, message in MISTAKES])
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_coders(tmp_path / "plt")
    change(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(folder)


def test_norms_must_be_positive(tmp_path: Path) -> None:
    folder = write_coders(tmp_path / "plt", tuned=True)
    with_tensors(out_norm=torch.zeros(1))(folder)
    with pytest.raises(ValueError, match=r"the tensor out_norm must be a finite number above 0, got 0.0"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("crosscoder", "message"),
    [
        (Crosscoder(Wiring.autoencoder(SHAPE), n_features=F, activation=TopK(K)), "the wiring autoencoder"),
        (Crosscoder(Wiring.strictly_causal(SHAPE), n_features=F, activation=TopK(K)), "the wiring strictly_causal"),
        (Crosscoder(Wiring.per_layer(SHAPE), n_features=F, activation=TopK(K, relu=False)), "the activation {'name'"),
        (
            Crosscoder(Wiring.per_layer(SHAPE, read="mlp_normalized"), n_features=F, activation=TopK(K)),
            "reads of mlp_normalized",
        ),
        (
            Crosscoder(Wiring.per_layer(SHAPE), n_features=F, activation=TopK(K), undecomposed_positions=4),
            "4 positions without features",
        ),
        (Crosscoder(Wiring.per_layer(SHAPE), n_features=F, activation=TopK(K), tied=True), "tied decoders"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(tmp_path: Path, crosscoder: Crosscoder, message: str) -> None:
    checkpoint.save(crosscoder, tmp_path / "native")
    with pytest.raises(ValueError, match=re.escape(f"the layout sparsify has no place for {message}")):
        convert(tmp_path / "native", tmp_path / "out", to="sparsify")
    assert not (tmp_path / "out").exists()
