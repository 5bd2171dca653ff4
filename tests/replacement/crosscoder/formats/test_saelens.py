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

from replacement import BatchTopK, JumpReLU, ReLU, TopK, checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.sites import SITE_KINDS, ModelShape, Site
from replacement.crosscoder.wiring import Wiring

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


GEMMA = "model.language_model.layers.3."
BLOCK = "blocks.7.hook_mlp_in"
NAMED: list[tuple[dict[str, Any], tuple[str, str]]] = [
    # A module of the Hugging Face model decides; TransformerLens's name beside it is of another place, or absent.
    (
        {
            "hook_name": BLOCK,
            "hf_hook_name": f"{GEMMA}pre_feedforward_layernorm.output",
            "hook_name_out": "blocks.7.hook_mlp_out",
            "hf_hook_name_out": f"{GEMMA}post_feedforward_layernorm.output",
        },
        ("mlp_in.3", "mlp_out.3"),
    ),
    ({"hf_hook_name": "model.layers.2.output", "hf_hook_name_out": "model.layers.2.output"}, ("resid_post.2",) * 2),
    # It is left aside where it is null or names a module that is not known.
    (
        {"hook_name": BLOCK, "hf_hook_name": None, "hook_name_out": "blocks.7.hook_mlp_out"},
        ("resid_mid.7", "mlp_out.7"),
    ),
    (
        {"hook_name": BLOCK, "hf_hook_name": f"{GEMMA}mlp.gate.input", "hook_name_out": "blocks.7.hook_mlp_out"},
        ("resid_mid.7", "mlp_out.7"),
    ),
]


@pytest.mark.parametrize(("metadata", "sites"), NAMED)
def test_a_module_of_the_model_decides_where_it_reads(
    tmp_path: Path, metadata: dict[str, Any], sites: tuple[str, str]
) -> None:
    wiring = checkpoint.load(write(tmp_path / "sae", "transcoder", metadata=metadata)).wiring
    assert (wiring.reads, wiring.writes) == tuple(((Site.parse(site),),) for site in sites)


SHAPE = ModelShape(n_layers=3, d_model=D, n_heads=2, d_head=4)
SAE, PLT = Wiring.autoencoder(SHAPE, layers=[1]), Wiring.per_layer(SHAPE)
SECOND_MODEL = ((Site(1, "resid_post", model=1),),)
TWICE = tuple((Site(1, kind),) for kind in ("resid_pre", "resid_post"))
REFUSED: list[tuple[Wiring, dict[str, Any], str]] = [
    (Wiring.strictly_causal(SHAPE), {}, "the wiring strictly_causal"),
    (Wiring.acausal(SHAPE), {}, "the wiring acausal"),
    (Wiring("two of a layer", TWICE, TWICE, {"resid_pre": D, "resid_post": D}), {}, "the wiring two of a layer"),
    (Wiring("autoencoder", SECOND_MODEL, SECOND_MODEL, {"resid_post": D}), {}, "a second model"),
    (SAE, {"activation": BatchTopK(2)}, "the activation {'name': 'batchtopk', "),
    (SAE, {"activation": TopK(2, relu=False)}, "the activation {'name': 'topk', 'k': 2, 'relu': False}"),
    (SAE, {"activation": TopK(2, scored=True)}, "the activation {'name': 'topk', 'k': 2, 'scored': True}"),
    (SAE, {"activation": JumpReLU(affine=True)}, "the activation {'name': 'jumprelu', "),
    (PLT, {"activation": TopK((1, 2, 3))}, "the activation {'name': 'topk', 'k': "),
    (PLT, {"activation": TopK(2)}, "TopK in a transcoder"),
    (PLT, {"tied": True}, "tied decoders"),
    (SAE, {"skip": True}, "skip connections in an SAE"),
    (SAE, {"undecomposed_positions": 2}, "2 positions without features"),
]


@pytest.mark.parametrize(("wiring", "changes", "problem"), REFUSED)
def test_what_it_cannot_say_is_refused(tmp_path: Path, wiring: Wiring, changes: dict[str, Any], problem: str) -> None:
    checkpoint.save(Crosscoder(wiring, n_features=F, **{"activation": ReLU(), **changes}), tmp_path / "native")
    with pytest.raises(ValueError, match=re.escape(f"the layout saelens has no place for {problem}")):
        convert(tmp_path / "native", tmp_path / "copy", to="saelens")
    assert not (tmp_path / "copy").exists()


def test_thresholds_below_0_are_refused(tmp_path: Path) -> None:
    crosscoder = Crosscoder(SAE, n_features=F, activation=JumpReLU())
    assert crosscoder.threshold is not None
    torch.nn.init.constant_(crosscoder.threshold, -0.5)
    checkpoint.save(crosscoder, tmp_path / "native")
    with pytest.raises(ValueError, match="the layout saelens has no place for thresholds below 0"):
        convert(tmp_path / "native", tmp_path / "copy", to="saelens")


@pytest.mark.parametrize("kind", [kind for kind in SITE_KINDS if kind != "mlp_difference"])  # of two models
def test_every_site_has_a_hook(tmp_path: Path, kind: str) -> None:
    wiring = Wiring.autoencoder(SHAPE, layers=[2], site=kind)
    checkpoint.save(Crosscoder(wiring, n_features=F, activation=ReLU()), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "copy", to="saelens")
    assert checkpoint.load(tmp_path / "copy").wiring == wiring
