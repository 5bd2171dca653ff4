"""SAELens folders, written here from their published keys and shapes, against the formulas in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import RandomTensors, assert_computes
from safetensors.torch import load_file, save_file

from replacement import checkpoint
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.sites import Site

F, D, K = 12, 8, 4


def write(folder: Path, architecture: str, *, old: bool = False, layer: int = 2, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    random = RandomTensors(layer)
    tensors = {"W_enc": random(D, F), "W_dec": random(F, D), "b_enc": random(F), "b_dec": random(D)}
    if "jumprelu" in architecture or architecture == "batchtopk":
        tensors["threshold"] = random(F)
    if "skip" in architecture:
        tensors["W_skip"] = random(D, D)
    is_transcoder = "transcoder" in architecture
    hooks = {
        "hook_name": f"blocks.{layer}.{'mlp.hook_in' if is_transcoder else 'hook_resid_post'}",
        "model_name": "org/model",
    }
    if is_transcoder:
        hooks["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
    cfg: dict[str, Any] = {"architecture": architecture, "d_in": D, "d_sae": F, "apply_b_dec_to_input": False}
    cfg |= {"k": K} if architecture == "topk" else {}
    cfg |= hooks if old else {"metadata": hooks}
    cfg |= changes
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def reference(folder: Path, architecture: str, *, subtracts: bool = False, scored: bool = False) -> Any:
    w = {name: value.double() for name, value in load_file(folder / "sae_weights.safetensors").items()}

    def compute(inputs: Any) -> Any:
        ((site, x_BD),) = inputs.items()
        h_BF = (x_BD - w["b_dec"] if subtracts else x_BD) @ w["W_enc"] + w["b_enc"]
        a_BF = h_BF.clamp(min=0)
        if architecture == "topk":
            score_BF = h_BF * w["W_dec"].norm(dim=1) if scored else h_BF
            a_BF = a_BF * torch.zeros_like(h_BF).scatter_(1, score_BF.topk(K, dim=1).indices, 1.0)
        if "threshold" in w:
            a_BF = a_BF * (h_BF > w["threshold"])
        y_BD = a_BF @ w["W_dec"] + w["b_dec"]
        y_BD = y_BD + x_BD @ w["W_skip"].T if "W_skip" in w else y_BD
        return [a_BF], {Site(site.layer, "mlp_out") if "transcoder" in architecture else site: y_BD}

    return compute


ARCHITECTURES = ["standard", "jumprelu", "topk", "batchtopk", "transcoder", "skip_transcoder"]
ARCHITECTURES += ["jumprelu_transcoder", "jumprelu_skip_transcoder"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("old", [False, True])
def test_architectures(tmp_path: Path, architecture: str, old: bool) -> None:
    folder = write(tmp_path / "sae", architecture, old=old)
    assert_computes(folder, reference(folder, architecture), tmp_path)
    convert(folder, tmp_path / "again", to="saelens")
    before, after = (load_file(path / "sae_weights.safetensors") for path in (folder, tmp_path / "again"))
    if "threshold" in before:
        before["threshold"].clamp_(min=0)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_a_subtracted_bias_is_folded(tmp_path: Path, architecture: str) -> None:
    folder = write(tmp_path / "sae", architecture, apply_b_dec_to_input=True)
    assert_computes(folder, reference(folder, architecture, subtracts=True), tmp_path)


def test_choice_by_decoder_norms(tmp_path: Path) -> None:
    folder = write(tmp_path / "sae", "topk", rescale_acts_by_decoder_norm=True)
    assert_computes(folder, reference(folder, "topk", scored=True), tmp_path)


def test_a_folder_for_each_layer(tmp_path: Path) -> None:
    for layer in (10, 2):
        write(tmp_path / f"set/{layer}", "jumprelu_transcoder", layer=layer)
    crosscoder = checkpoint.load(tmp_path / "set")
    assert crosscoder.wiring.reads == ((Site(2, "mlp_in"),), (Site(10, "mlp_in"),))
    assert torch.equal(crosscoder.W_enc[0], load_file(tmp_path / "set/2/sae_weights.safetensors")["W_enc"].T)


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("gated", {}, "architecture: expected one of standard, "),
    ("standard", {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' is not supported"),
    ("standard", {"finetuning_scaling_factor": True}, "finetuning_scaling_factor True is not supported"),
    ("standard", {"activation_fn": "tanh-relu"}, "activation_fn: expected relu or topk, got 'tanh-relu'"),
    ("standard", {"metadata": {"hook_name": "blocks.0.hook_q"}}, "hook_name: expected blocks.N. and one of "),
    ("standard", {"noise": 1}, "cfg.json has entries that are not known: noise"),
    ("topk", {"k": 1.5}, "expected a whole number k with architecture topk, got 1.5"),
    ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input is not possible in a transcoder"),
    ("batchtopk", {"rescale_acts_by_decoder_norm": True}, "is supported with the architecture topk only"),
]


@pytest.mark.parametrize(("architecture", "changes", "message"), MISTAKES)
def test_what_is_wrong_is_named(tmp_path: Path, architecture: str, changes: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "sae", architecture, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(folder)
