"""Folders of circuit-tracer, written here from their published keys and shapes, against the formulas in float64."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published_layouts import Change, RandomTensors, assert_computes, cut_off, entries_changed, tensors_changed
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement import Crosscoder, JointTopK, ReLU, TopK, Wiring, checkpoint
from replacement.crosscoder.activation import Activation
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.sites import ModelShape, Site

L, F, D, K = 3, 12, 8, 4
CONFIG = {
    "model_name": "org/model",
    "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
    "scan": "org/scan",
}


def write_plt(folder: Path, *, threshold: bool = False, skip: bool = False, **config: Any) -> Path:
    """A per-layer transcoder; thresholds have both signs."""
    folder.mkdir()
    random = RandomTensors()
    for layer in range(L):
        tensors = {"W_enc": random(F, D), "W_dec": random(F, D), "b_enc": random(F), "b_dec": random(D)}
        if threshold:
            tensors["activation_function.threshold"] = random(F)
        if skip:
            tensors["W_skip"] = random(D, D)
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    values = {**CONFIG, "model_kind": "transcoder_set", **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def write_clt(folder: Path, *, threshold: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A cross-layer transcoder."""
    folder.mkdir()
    random = RandomTensors(dtype=dtype)
    for layer in range(L):
        encoder = {f"W_enc_{layer}": random(F, D), f"b_enc_{layer}": random(F), f"b_dec_{layer}": random(D)}
        if threshold:
            encoder[f"threshold_{layer}"] = random(F)
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": random(F, L - layer, D)}, folder / f"W_dec_{layer}.safetensors")
    values = {**CONFIG, "model_kind": "cross_layer_transcoder", **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def active(pre_BF: Tensor, threshold_F: Tensor | None, k: int | None) -> Tensor:
    """What the tool's activation functions give."""
    if k is not None:
        kept = torch.zeros_like(pre_BF).scatter_(1, pre_BF.topk(k, dim=1).indices, 1.0)
        return pre_BF * kept
    return pre_BF.clamp(min=0) if threshold_F is None else pre_BF * (pre_BF > threshold_F)


def plt_reference(folder: Path, kind: str, k: int | None) -> Any:
    layers = [
        {name: value.double() for name, value in load_file(folder / f"layer_{layer}.safetensors").items()}
        for layer in range(L)
    ]

    def compute(inputs: Any) -> Any:
        acts, outputs = [], {}
        for layer, weights in enumerate(layers):
            x_BD = inputs[Site(layer, kind)]
            pre_BF = x_BD @ weights["W_enc"].T + weights["b_enc"]
            acts.append(active(pre_BF, weights.get("activation_function.threshold"), k))
            outputs[Site(layer, "mlp_out")] = acts[-1] @ weights["W_dec"] + weights["b_dec"]
            if "W_skip" in weights:
                outputs[Site(layer, "mlp_out")] += x_BD @ weights["W_skip"].T
        return acts, outputs

    return compute


def clt_reference(folder: Path) -> Any:
    tensors = {name: value.double() for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}

    def compute(inputs: Any) -> Any:
        acts, outputs = [], {}
        for layer in range(L):
            pre_BF = inputs[Site(layer, "resid_mid")] @ tensors[f"W_enc_{layer}"].T + tensors[f"b_enc_{layer}"]
            acts.append(active(pre_BF, tensors.get(f"threshold_{layer}"), None))
            total_BD = sum(acts[source] @ tensors[f"W_dec_{source}"][:, layer - source] for source in range(layer + 1))
            outputs[Site(layer, "mlp_out")] = total_BD + tensors[f"b_dec_{layer}"]
        return acts, outputs

    return compute


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("hook", "kind"),
    [("hook_resid_mid", "resid_mid"), ("mlp.hook_in", "mlp_in"), ("ln2.hook_normalized", "mlp_normalized")],
)
@pytest.mark.parametrize("chooses", ["relu", "jump_relu", "topk"])
def test_per_layer_transcoders(tmp_path: Path, skip: bool, hook: str, kind: str, chooses: str) -> None:
    settings = {"activation": "topk", "k": K} if chooses == "topk" else {}
    folder = write_plt(
        tmp_path / "plt", threshold=chooses == "jump_relu", skip=skip, feature_input_hook=hook, **settings
    )
    reference = plt_reference(folder, kind, settings.get("k"))  # type: ignore[arg-type]
    crosscoder = assert_computes(folder, reference, tmp_path, decomposed_from=1)
    assert crosscoder.model_name == "org/model"
    convert(folder, tmp_path / "again", to="circuit-tracer-plt")
    for layer in range(L):
        before, after = (load_file(path / f"layer_{layer}.safetensors") for path in (folder, tmp_path / "again"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_layer_transcoders(tmp_path: Path, threshold: bool, dtype: torch.dtype) -> None:
    folder = write_clt(tmp_path / "clt", threshold=threshold, dtype=dtype)
    assert_computes(folder, clt_reference(folder), tmp_path, decomposed_from=1)
    convert(folder, tmp_path / "again", to="circuit-tracer-clt")
    for path in folder.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "again" / path.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_listed_files_are_relative_to_the_folder(tmp_path: Path) -> None:
    folder = write_plt(tmp_path / "plt", transcoders=["layer_1.safetensors", "layer_0.safetensors"])
    crosscoder = checkpoint.load(folder, dtype=torch.float32)
    assert torch.equal(crosscoder.W_enc[0], load_file(folder / "layer_1.safetensors")["W_enc"])


with_config, with_tensors = partial(entries_changed, "config.yaml"), tensors_changed
FIRST, SECOND, LAST = (f"layer_{layer}.safetensors" for layer in range(L))
MISTAKES: list[tuple[Change, str]] = [
    (lambda folder: (folder / SECOND).unlink(), f"plt lacks the file {SECOND}, but {LAST} is there"),
    (cut_off(SECOND), "layer_1.safetensors is damaged or not a safetensors file"),
    (with_tensors(FIRST, b_enc=None), f"{FIRST} lacks the tensor b_enc: it holds "),
    (with_tensors(FIRST, b_enc=torch.zeros(F + 1)), "the tensor b_enc has the wrong shape: expected [12], got [13]"),
    (with_tensors(LAST, b_dec=torch.zeros(D, dtype=torch.int32)), f"{LAST}: the dtype of the tensor b_dec must be"),
    (with_tensors(SECOND, b_dec=torch.full((D,), torch.nan)), f"{SECOND}: the tensor b_dec.1 holds NaN"),
    (with_tensors(FIRST, extra=torch.zeros(2)), f"{FIRST} holds tensors that its layout does not have: extra"),
    (with_tensors(SECOND, W_skip=torch.zeros(D, D)), f"{FIRST} has no skip, other layers have one"),
    (with_config(extra=1), "config.yaml has entries that are not known: extra"),
    (with_config(model_kind="sae"), "model_kind: expected transcoder_set or cross_layer_transcoder, got 'sae'"),
    (with_config(feature_input_hook=None), "config.yaml lacks the entry 'feature_input_hook': it holds "),
    (with_config(feature_input_hook="hook_q"), "feature_input_hook: expected one of hook_resid_mid, "),
    (with_config(activation="topk"), "activation topk needs the entry k, the number of features kept"),
    (with_config(k=5), "k goes with activation: topk, got k 5 with activation: relu"),
    (lambda folder: (folder / "config.yaml").unlink(), "config.yaml does not exist: expected settings in YAML"),
    (lambda folder: (folder / "config.yaml").write_text(""), "config.yaml: expected an object with settings"),
    (with_config(activation="gelu"), "activation: expected relu, jump_relu or topk, got 'gelu'"),
    (with_config(activation="topk", k=True), "the entry 'k' must be of type int, got True"),
    (with_config(transcoders=["hf://nonsense"]), "cannot read 'hf://nonsense': expected hf:org/repo"),
    (lambda folder: (folder / "config.yaml").write_text("model_kind: ]"), "config.yaml is not YAML: "),
    (lambda folder: (folder / "config.yaml").write_text("[" * 20_000), "config.yaml is not YAML: "),
    (lambda folder: (folder / "config.yaml").write_text("model_kind"), "config.yaml: expected an object with settings"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_plt(tmp_path / "plt")
    change(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(folder)


def test_an_unknown_layout_says_what_was_found(tmp_path: Path) -> None:
    save_file({"alpha": torch.zeros(1), "beta": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(
        ValueError, match=r"no known layout \(.*\): it holds weights.safetensors; .* tensors alpha, beta"
    ):
        checkpoint.load(tmp_path)


def test_what_the_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    folder = write_plt(tmp_path / "plt")
    with pytest.raises(ValueError, match="the layout circuit-tracer-clt has no place for the wiring per_layer"):
        convert(folder, tmp_path / "clt", to="circuit-tracer-clt")
    assert not (tmp_path / "clt").exists()
    with pytest.raises(ValueError, match=r"to: expected one of crosstrace, circuit-tracer-plt, .*, got 'onnx'"):
        convert(folder, tmp_path / "clt", to="onnx")


@pytest.mark.parametrize(
    "activation",
    [TopK(3), TopK(3, relu=False, scored=True), TopK((3, 2, 1), relu=False), JointTopK(9), ReLU(affine=True)],
    ids=str,
)
def test_activation_functions_without_a_name_there_are_refused(activation: Activation, tmp_path: Path) -> None:
    wiring = Wiring.per_layer(ModelShape(n_layers=L, d_model=D, n_heads=1, d_head=D))
    crosscoder = Crosscoder(wiring, n_features=F, activation=activation, undecomposed_positions=1)
    checkpoint.save(crosscoder, tmp_path / "own")
    with pytest.raises(ValueError, match="the layout circuit-tracer-plt has no place for the activation"):
        convert(tmp_path / "own", tmp_path / "plt", to="circuit-tracer-plt")
    assert not (tmp_path / "plt").exists()
