"""Cross-layer folders of clt-training, written here from their published keys and shapes, against that tool's procedure.

The reference does what the tool does while a model runs: it keeps each layer's coder and counts the layers it has written.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import Change, RandomTensors, assert_computes, entries_changed, tensors_changed
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement import Crosscoder, TopK, Wiring, checkpoint
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.sites import ModelShape, Site

L, F, D, K = 4, 12, 6, 4
SHAPE = ModelShape(n_layers=L, d_model=D, n_heads=2, d_head=3)
Weights = dict[str, Tensor]


def write_clt(
    folder: Path,
    *,
    coalesce: str = "none",
    window: int = L,
    skip: bool = False,
    tuned: bool = False,
    source_tied: bool = False,
    repeats_first: bool = False,
) -> Path:
    """A cross-layer transcoder.

    Args:
        window: layers that a layer writes at most.
        tuned: scales, and one map behind the activation function for all written layers.
        repeats_first: store tensors of index 0 under both of their names, as that tool does on one device.
    """
    random = RandomTensors()
    for layer in range(L):
        n_targets = min(window, L - layer)
        n_sources = sum(source + min(window, L - source) >= layer for source in range(layer + 1))  # counts one too many
        tensors = {"encoder.weight": random(F, D), "encoder.bias": random(F)}
        joined = coalesce != "none"
        if joined or source_tied:
            tensors["W_dec"] = random(F * (n_sources if coalesce == "per-layer" else 1), D)
        else:
            tensors |= {f"W_decs.{index}": random(F, D) for index in range(n_targets)}
        for name, shape in {"b_dec": (D,), **({"W_skip": (D, D)} if skip else {})}.items():
            numbered = {f"{name}s.{index}": random(*shape) for index in range(n_targets)}
            tensors |= {name: random(*shape)} if joined else numbered
        if repeats_first:
            tensors |= {name[:-3]: value.clone() for name, value in tensors.items() if name.endswith("s.0")}
        offset, scale = random(F), random(F)
        for index in range(n_targets):
            tensors[f"post_encs.{index}"] = offset.clone() if tuned else torch.zeros(F)
            if tuned:
                tensors[f"post_enc_scales.{index}"] = scale.clone()
        if tuned:
            tensors |= {"in_norm": random(1).abs() + 1, "out_norm": random(1).abs() + 1}
        path = folder / f"layers.{layer}.mlp"
        path.mkdir(parents=True)
        save_file(tensors, path / "sae.safetensors")
        config = {
            "dtype": "none",
            "activation": "topk",
            "num_latents": F,
            "k": K,
            "skip_connection": skip,
            "transcode": True,
            "n_targets": n_targets,
            "n_sources": n_sources,
            "normalize_io": tuned,
            "divide_cross_layer": False,
            "post_encoder_scale": tuned,
            "per_source_tied": source_tied,
            "secondary_target_tied": False,
            "coalesce_topk": coalesce,
            "topk_coalesced": False,
            "matryoshka": False,
            "d_in": D,
        }
        (path / "cfg.json").write_text(json.dumps(config))
    return folder


def as_published(folder: Path) -> Any:
    coders = []
    for layer in range(L):
        path = folder / f"layers.{layer}.mlp"
        tensors = {name: value.double() for name, value in load_file(path / "sae.safetensors").items()}
        coders.append((tensors, json.loads((path / "cfg.json").read_text())))

    def compute(inputs: Any) -> Any:
        acts, outputs = [], {}
        running: dict[int, int] = {}
        normalized: list[Tensor] = []
        for layer, (tensors, cfg) in enumerate(coders):
            x_BD = inputs[Site(layer, "mlp_in")]
            normalized.append(x_BD * math.sqrt(D) / tensors["in_norm"] if cfg["normalize_io"] else x_BD)
            pre_BF = (normalized[layer] @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
            act_BF = pre_BF * torch.zeros_like(pre_BF).scatter_(1, pre_BF.topk(cfg["k"], dim=1).indices, 1.0)
            act_BF = act_BF + tensors["post_encs.0"] * (act_BF > 0)
            acts.append(act_BF * tensors["post_enc_scales.0"] if cfg["post_encoder_scale"] else act_BF)
            running[layer] = 0
            y_BD = output_of(coders, acts, normalized, running, layer)
            outputs[Site(layer, "mlp_out")] = y_BD * tensors["out_norm"] / math.sqrt(D) if cfg["normalize_io"] else y_BD
            for source in list(running):
                running[source] += 1
                if running[source] >= coders[source][1]["n_targets"]:
                    del running[source]
        return acts, outputs

    return compute


def output_of(
    coders: list[tuple[Weights, dict[str, Any]]],
    acts: list[Tensor],
    xs: list[Tensor],
    running: dict[int, int],
    layer: int,
) -> Tensor:
    """What the coders that still run give a layer, before it is scaled back."""
    own, cfg = coders[layer]
    if cfg["coalesce_topk"] == "none":
        total_BD = torch.zeros_like(xs[layer])
        for source, index in running.items():
            tensors, source_cfg = coders[source]
            decoder_FD = tensors["W_dec"] if source_cfg["per_source_tied"] else tensors[f"W_decs.{index}"]
            total_BD = total_BD + acts[source] @ decoder_FD + tensors[f"b_decs.{index}"]
            if source_cfg["skip_connection"]:
                total_BD = total_BD + xs[source] @ tensors[f"W_skips.{index}"].T
        return total_BD
    if cfg["coalesce_topk"] == "concat":
        total_BD = sum(acts[source] for source in running) @ own["W_dec"]
    else:
        act_BM = torch.cat([acts[source] for source in running], dim=1)
        total_BD = act_BM @ own["W_dec"][: act_BM.shape[1]]
    total_BD = total_BD + own["b_dec"]
    return total_BD + xs[layer] @ own["W_skip"].T if cfg["skip_connection"] else total_BD


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("window", [1, 2, L])
@pytest.mark.parametrize("coalesce", ["none", "concat", "per-layer"])
def test_every_way_of_joining_layers(tmp_path: Path, coalesce: str, window: int, skip: bool, tuned: bool) -> None:
    folder = write_clt(tmp_path / "clt", coalesce=coalesce, window=window, skip=skip, tuned=tuned)
    crosscoder = assert_computes(folder, as_published(folder), tmp_path)
    assert crosscoder.tied == (coalesce == "concat")
    assert crosscoder.wiring.name == ("strictly_causal" if window == L else "cross_layer")


def test_decoders_tied_by_source(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "clt", source_tied=True, skip=True)
    assert_computes(folder, as_published(folder), tmp_path)


def test_the_first_tensor_may_have_two_names_or_one_without_a_number(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "clt", skip=True, repeats_first=True)
    crosscoder = assert_computes(folder, as_published(folder), tmp_path)
    reference = as_published(folder)
    for path in folder.glob("*/sae.safetensors"):
        tensors = load_file(path)
        for name in ("W_decs.0", "b_decs.0", "W_skips.0"):
            del tensors[name]
        save_file(tensors, path)
    renamed = assert_computes(folder, reference, tmp_path / "renamed")
    for name, value in crosscoder.state_dict().items():
        assert torch.equal(value, renamed.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("coalesce", "skip"), [("none", False), ("none", True), ("concat", False)])
@pytest.mark.parametrize("read", ["mlp_in", "resid_mid"])
def test_round_trip(tmp_path: Path, coalesce: str, skip: bool, dtype: torch.dtype, read: str) -> None:
    wiring = Wiring.strictly_causal(SHAPE, read=read)
    options: dict[str, Any] = {"tied": coalesce == "concat", "skip": skip, "model_name": "org/model"}
    crosscoder = Crosscoder(
        wiring, n_features=F, activation=TopK((1, 2, 3, 4)), dtype=dtype, undecomposed_positions=1, **options
    )
    random = RandomTensors(dtype=dtype)
    for parameter in crosscoder.parameters():
        parameter.data.copy_(random(*parameter.shape))
    checkpoint.save(crosscoder, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "there", to="clt-training")
    convert(tmp_path / "there", tmp_path / "back")
    before, after = (checkpoint.load(tmp_path / name, dtype=dtype) for name in ("native", "back"))
    assert before.settings() == after.settings()
    assert before.model_name == after.model_name
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    convert(tmp_path / "back", tmp_path / "again", to="clt-training")
    for path in (tmp_path / "there").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "there")).read_bytes()


def with_config(layer: int = 1, **changes: Any) -> Change:
    return entries_changed(f"layers.{layer}.mlp/cfg.json", **changes)


with_tensors = partial(tensors_changed, "layers.1.mlp/sae.safetensors")


def without_layer_2(folder: Path) -> None:
    for path in (folder / "layers.2.mlp").iterdir():
        path.unlink()
    (folder / "layers.2.mlp").rmdir()


AT, TENSORS = "layers.1.mlp/cfg.json", "layers.1.mlp/sae.safetensors"
MISTAKES: list[tuple[Change, str]] = [
    (without_layer_2, "layers.0.mlp: n_targets: expected 1 to 3 for 3 hookpoints from this layer on, got 4"),
    (with_config(n_targets=0), "layers.1.mlp: n_targets: expected 1 to 3 for 3 hookpoints from this layer on, got 0"),
    (with_config(n_targets=2), f"{TENSORS} holds tensors that its layout does not have: W_decs.2, b_decs.2"),
    (with_config(coalesce_topk="group"), f"{AT}: coalesce_topk: expected none, concat or per-layer, got 'group'"),
    (with_config(coalesce_topk="concat"), "layers.1.mlp: coalesce_topk is 'concat', that of layers.0.mlp is 'none'"),
    (with_config(coalesce_topk="concat", topk_coalesced=None), f"{AT} lacks the entry 'topk_coalesced'"),
    (with_config(topk_coalesced=True), f"{AT}: topk_coalesced is not supported: it chooses other features for each"),
    (with_config(divide_cross_layer=True), f"{AT}: divide_cross_layer is not supported: it divides what lower layers"),
    (with_config(secondary_target_tied=True), f"{AT}: secondary_target_tied is not supported: it decodes twice"),
    (with_tensors(**{"W_decs.2": None}), f"{TENSORS} lacks the tensor W_decs.2"),
    (
        with_tensors(**{"W_decs.1": torch.zeros(F, D + 1)}),
        "W_decs.1 has the wrong shape: expected [12, 6], got [12, 7]",
    ),
    (
        with_tensors(**{"post_encs.1": torch.ones(F)}),
        f"{TENSORS}: post_encs.1 or its scale differs from that of another written layer",
    ),
    (with_tensors(surprise=torch.zeros(1)), f"{TENSORS} holds tensors that its layout does not have: surprise"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:50] for _, message in MISTAKES])
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_clt(tmp_path / "clt")
    change(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(folder)


def test_too_few_sources(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "clt", coalesce="per-layer")
    with_config(n_sources=1)(folder)
    with pytest.raises(ValueError, match="n_sources: expected at least 2 layers that write it, got 1"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("wiring", "options", "message"),
    [
        (Wiring.weakly_causal(SHAPE), {}, "the wiring weakly_causal"),
        (
            Wiring.strictly_causal(SHAPE),
            {"tied": True, "skip": True},
            "tied decoders with skip connections between layers",
        ),
        (Wiring.strictly_causal(SHAPE), {"activation": TopK(K, scored=True)}, "the activation {'name': 'topk'"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(tmp_path: Path, wiring: Wiring, options: Any, message: str) -> None:
    crosscoder = Crosscoder(wiring, n_features=F, **{"activation": TopK(K), **options})
    checkpoint.save(crosscoder, tmp_path / "native")
    with pytest.raises(ValueError, match=re.escape(f"the layout clt-training has no place for {message}")):
        convert(tmp_path / "native", tmp_path / "out", to="clt-training")
