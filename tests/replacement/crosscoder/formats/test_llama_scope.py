"""Folders of Language-Model-SAEs, written here from their published keys and shapes, against the formulas in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import (
    Change,
    RandomTensors,
    Reference,
    assert_computes,
    cut_off,
    entries_changed,
    tensors_changed,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement import checkpoint
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.formats.layouts import open_published
from replacement.crosscoder.sites import Site

L, F, D, K = 3, 12, 8, 4
READ, WRITE = "ln2.hook_normalized", "hook_mlp_out"
THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm."
CONFIG = {
    "device": "cuda",
    "dtype": "torch.float32",
    "d_model": D,
    "expansion_factor": F / D,
    "act_fn": "topk",
    "top_k": K,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "jumprelu_threshold_window": 2.0,
}


def hooks(layer: int) -> tuple[str, str]:
    return f"blocks.{layer}.{READ}", f"blocks.{layer}.{WRITE}"


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_layer(folder: Path, layer: int, **changes: Any) -> Path:
    """One transcoder. Scales differ from layer to layer, decoder norms from feature to feature."""
    random = RandomTensors(seed=layer)
    config = {**CONFIG, "sae_type": "sae", **changes}
    read, write = hooks(layer)
    tensors = {
        "W_E": random(D, F),
        "b_E": random(F),
        "W_D": random(F, D) * random(F, 1).abs(),
        "b_D": random(D),
        NORM + read: torch.tensor(2.0 + layer),
        NORM + write: torch.tensor(0.5 + layer),
    }
    if config["act_fn"] == "jumprelu":
        tensors[THRESHOLD] = random(F)
    return write_folder(folder, tensors, {"hook_point_in": read, "hook_point_out": write, **config})


def write_plt(folder: Path, **changes: Any) -> Path:
    for layer in range(L):
        write_layer(folder / f"layer{layer}_transcoder_8x_k64", layer, **changes)
    return folder


def write_clt(folder: Path, **changes: Any) -> Path:
    random = RandomTensors(seed=9)
    config = {**CONFIG, "sae_type": "clt", "decode_with_csr": True, **changes}
    tensors = {"W_E": random(L, D, F), "b_E": random(L, F)}
    for target in range(L):
        tensors[f"W_D.{target}"] = random(target + 1, F, D) * random(target + 1, F, 1).abs()
        tensors[f"b_D.{target}"] = random(D)
        read, write = hooks(target)
        tensors |= {NORM + read: torch.tensor(2.0 + target), NORM + write: torch.tensor(0.5 + target)}
    if config["act_fn"] == "jumprelu":
        tensors[THRESHOLD] = random(L, F)
    names = {"hook_points_in": [hooks(n)[0] for n in range(L)], "hook_points_out": [hooks(n)[1] for n in range(L)]}
    return write_folder(folder, tensors, {**names, **config})


def gated(pre_BGF: Tensor, norms_GF: Tensor, config: dict[str, Any], log_threshold_GF: Tensor | None) -> Tensor:
    """Activations as the publisher computes them: multiply by norms, gate, divide by norms."""
    factor_GF = norms_GF if config["sparsity_include_decoder_norm"] else torch.ones_like(norms_GF)
    score_BGF = pre_BGF * factor_GF
    if log_threshold_GF is not None:
        return score_BGF * (score_BGF > log_threshold_GF.exp()) / factor_GF
    score_BGF = score_BGF.clamp(min=0)
    if config["act_fn"] == "topk":
        kept = torch.zeros_like(score_BGF).scatter_(2, score_BGF.topk(K, dim=2).indices, 1.0)
        score_BGF = score_BGF * kept
    if config["act_fn"] == "layertopk":
        flat = score_BGF.flatten(1)
        score_BGF = (flat * torch.zeros_like(flat).scatter_(1, flat.topk(K, dim=1).indices, 1.0)).view_as(score_BGF)
    return score_BGF / factor_GF


def reference(folders: list[Path]) -> Reference:
    """The formula on one folder for each layer, or on the one folder of a CLT."""
    config = json.loads((folders[0] / "config.json").read_text())
    parts = [
        {name: value.double() for name, value in load_file(path / "sae_weights.safetensors").items()}
        for path in folders
    ]
    merged = {name: value for part in parts for name, value in part.items()}
    if config["sae_type"] == "clt":
        encoders, biases = merged["W_E"], merged["b_E"]
        decoders = {(g, m): merged[f"W_D.{m}"][g] for m in range(L) for g in range(m + 1)}
        b_dec = [merged[f"b_D.{m}"] for m in range(L)]
        log_threshold = merged.get(THRESHOLD)
    else:
        encoders, biases = (torch.stack([part[name] for part in parts]) for name in ("W_E", "b_E"))
        decoders = {(g, g): part["W_D"] for g, part in enumerate(parts)}
        b_dec = [part["b_D"] for part in parts]
        log_threshold = torch.stack([part[THRESHOLD] for part in parts]) if THRESHOLD in merged else None
    n_groups = len(encoders)
    squares = [sum(d.square().sum(1) for (g, _), d in decoders.items() if g == group) for group in range(n_groups)]
    norms_GF = torch.stack(squares).sqrt()  # type: ignore[arg-type]
    first = int(config["hook_point_in"].split(".")[1]) if len(folders) == 1 and "hook_point_in" in config else 0

    def scale(hook: str) -> float:
        return D**0.5 / float(merged[NORM + hook]) if config["norm_activation"] == "dataset-wise" else 1.0

    def compute(inputs: Any) -> Any:
        x = [inputs[Site(first + g, "mlp_normalized")] * scale(hooks(first + g)[0]) for g in range(n_groups)]
        pre_BGF = torch.stack([x[g] @ encoders[g] + biases[g] for g in range(n_groups)], dim=1)
        acts_BGF = gated(pre_BGF, norms_GF, config, log_threshold)
        outputs = {
            Site(first + m, "mlp_out"): (
                b_dec[m] + sum(acts_BGF[:, g] @ d for (g, target), d in decoders.items() if target == m)
            )
            / scale(hooks(first + m)[1])
            for m in range(n_groups)
        }
        return list(acts_BGF.unbind(1)), outputs

    return compute


NORMS = ["dataset-wise", "inference"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_transcoders(tmp_path: Path, act_fn: str, by_norm: bool, norm: str) -> None:
    settings = {"act_fn": act_fn, "sparsity_include_decoder_norm": by_norm, "norm_activation": norm}
    folder = write_plt(tmp_path / "k64", **settings)
    layers = sorted(folder.iterdir())
    crosscoder = assert_computes(folder, reference(layers), tmp_path, decomposed_from=1)
    assert crosscoder.wiring.name == "per_layer"
    assert crosscoder.undecomposed_positions == 1
    single = assert_computes(layers[1], reference(layers[1:2]), tmp_path / "single", decomposed_from=1)
    assert single.wiring.read_sites == (Site(1, "mlp_normalized"),)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "layertopk"])
def test_cross_layer_transcoders(tmp_path: Path, act_fn: str, by_norm: bool, norm: str) -> None:
    settings = {"act_fn": act_fn, "sparsity_include_decoder_norm": by_norm, "norm_activation": norm}
    folder = write_clt(tmp_path / "clt", **settings)
    assert_computes(folder, reference([folder]), tmp_path, decomposed_from=1)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "layertopk"])
@pytest.mark.parametrize("write", [write_plt, write_clt])
def test_round_trips_are_exact(tmp_path: Path, write: Callable[..., Path], act_fn: str) -> None:
    if act_fn == "layertopk" and write is write_plt:
        act_fn = "topk"
    by_norm = act_fn != "jumprelu"  # thresholds of h itself are written, which the norms are divided out of
    folder = write(tmp_path / "k4", act_fn=act_fn, norm_activation="inference", sparsity_include_decoder_norm=by_norm)
    convert(folder, tmp_path / "again", to="llama-scope-2")
    weights = sorted(folder.rglob("*.safetensors"))
    for before, after in zip(weights, sorted((tmp_path / "again").rglob("*.safetensors")), strict=True):
        expected = {name: value for name, value in load_file(before).items() if not name.startswith(NORM)}
        actual = load_file(after)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], value) for name, value in expected.items() if name != THRESHOLD)
    first, second = (checkpoint.load(path, dtype=torch.float32) for path in (folder, tmp_path / "again"))
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_scaled_weights_are_written_folded_in(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "clt", act_fn="jumprelu")
    convert(folder, tmp_path / "folded", to="llama-scope-2", dtype=torch.float64)
    assert_computes(tmp_path / "folded", reference([folder]), tmp_path, decomposed_from=1)


def test_scores_of_scaled_outputs_are_no_norms_any_more(tmp_path: Path) -> None:
    """Folding scales that differ between target layers changes norms, and with them what would be kept."""
    folder = write_clt(tmp_path / "clt")
    with pytest.raises(ValueError, match="the layout llama-scope-2 has no place for scores other than decoder norms"):
        convert(folder, tmp_path / "folded", to="llama-scope-2")
    plt = write_plt(tmp_path / "plt")  # one target each: the factor is common to all that compete
    convert(plt, tmp_path / "plt_folded", to="llama-scope-2", dtype=torch.float64)
    layers = sorted(plt.iterdir())
    assert_computes(tmp_path / "plt_folded", reference(layers), tmp_path, decomposed_from=1)


def test_features_that_write_nothing_are_never_active(tmp_path: Path) -> None:
    folder = write_layer(tmp_path / "layer0", 0, act_fn="jumprelu")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_D"][3] = 0
    save_file(tensors, folder / "sae_weights.safetensors")
    crosscoder = checkpoint.load(folder, dtype=torch.float32)
    assert crosscoder.threshold is not None
    assert float(crosscoder.threshold.detach()[0, 3]) > 1e16


def test_the_fingerprint_knows_what_the_gate_acts_on(tmp_path: Path) -> None:
    """The same tensors are two functions, with and without decoder norms in the gate."""
    folders = [
        write_plt(
            tmp_path / str(by_norm),
            act_fn="jumprelu",
            norm_activation="inference",
            sparsity_include_decoder_norm=by_norm,
        )
        for by_norm in (False, True)
    ]
    first, second = (open_published(folder).known_fingerprint() for folder in folders)
    assert first != second


def test_opening_reads_no_decoder(tmp_path: Path) -> None:
    published = open_published(write_plt(tmp_path / "plt"))
    assert published.facts == {"k": K}
    assert bool((published.tensors["score_factor"] == 1).all())


def test_k_is_taken_from_names_where_thresholds_replaced_it(tmp_path: Path) -> None:
    folder = write_plt(tmp_path / "8x" / "k64", act_fn="jumprelu")
    assert open_published(folder).facts == {"k": 64}
    assert open_published(folder / "layer1_transcoder_8x_k64").facts == {"k": 64}


def test_a_joint_choice_claims_its_share_of_each_layer(tmp_path: Path) -> None:
    assert open_published(write_clt(tmp_path / "clt", act_fn="layertopk")).facts == {"k": K, "l0": K / L}


FIRST, SECOND, THIRD = (f"layer{layer}_transcoder_8x_k64" for layer in range(L))


def with_config(layer: str, **changes: Any) -> Change:
    return entries_changed(f"{layer}/config.json", **changes)


def with_tensors(layer: str, **changes: Any) -> Change:
    return tensors_changed(f"{layer}/sae_weights.safetensors", **changes)


def remove_layer(folder: Path) -> None:
    (folder / SECOND).rename(folder / "other")


MISTAKES: list[tuple[Change, str]] = [
    (remove_layer, f"plt has no layer 1, but layer 2 ({THIRD})"),
    (with_config(SECOND, hook_point_in=hooks(0)[0], hook_point_out=hooks(0)[1], norm_activation="inference"), "twice"),
    (cut_off(f"{THIRD}/sae_weights.safetensors"), "sae_weights.safetensors is damaged or not a safetensors file"),
    (with_config(FIRST, sae_type="lorsa"), "hook_point_in: expected blocks.N.ln1.hook_normalized, "),
    (
        with_config(FIRST, expansion_factor=float("inf")),
        "expected a d_model and expansion_factor above 0, got 8 and inf",
    ),
    (with_config(FIRST, d_model=-8), "expected a d_model and expansion_factor above 0, got -8 and 1.5"),
    (with_config(FIRST, sae_type="molt"), "sae_type: expected sae, clt, lorsa, got 'molt'"),
    (with_config(FIRST, act_fn="batchtopk"), "got 'batchtopk', whose choice depends on the batch: convert it to"),
    (with_config(FIRST, act_fn="gelu"), "act_fn: expected relu, jumprelu, topk, got 'gelu'"),
    (with_config(FIRST, norm_activation="token-wise"), "expected dataset-wise or inference, got 'token-wise'"),
    (with_config(FIRST, use_glu_encoder=True), "use_glu_encoder is true, which a crosscoder cannot express"),
    (with_config(FIRST, hook_point_in="blocks.0.hook_q"), "hook_point_in: expected blocks.N.hook_resid_mid, "),
    (with_config(FIRST, hook_point_out=hooks(1)[1]), "got layers [0] and [1]"),
    (with_config(FIRST, extra=1), "config.json has entries that are not known: extra"),
    (with_config(FIRST, d_model=None), "config.json lacks the entry 'd_model': it holds "),
    (with_config(FIRST, d_model=D + 1), "the tensor W_E has the wrong shape: expected [9, 13], got [8, 12]"),
    (with_config(SECOND, top_k=2), "layers differ in activation"),
    (with_config(SECOND, hook_point_in="blocks.1.hook_resid_mid", norm_activation="inference"), "layers read "),
    (with_tensors(FIRST, b_E=None), "sae_weights.safetensors lacks the tensor b_E: it holds "),
    (with_tensors(FIRST, extra=torch.zeros(1)), "holds tensors that its layout does not have: extra"),
    (with_tensors(FIRST, b_D=torch.zeros(D, dtype=torch.int32)), "the dtype of the tensor b_D must be"),
    (with_tensors(FIRST, **{NORM + hooks(0)[0]: None}), f"lacks the tensor {NORM}{hooks(0)[0]}"),
    (with_tensors(FIRST, **{NORM + hooks(0)[0]: torch.tensor(0.0)}), "must be a finite number above 0, got 0.0"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_plt(tmp_path / "plt")
    change(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(folder)


def test_a_cross_layer_transcoder_of_unordered_layers_is_refused(tmp_path: Path) -> None:
    names = [hooks(n)[0] for n in (1, 0, 2)]
    folder = write_clt(tmp_path / "clt", hook_points_in=names)
    with pytest.raises(ValueError, match=re.escape("got layers [1, 0, 2] and [0, 1, 2]")):
        checkpoint.load(folder)


def test_what_the_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    crosscoder = checkpoint.load(write_plt(tmp_path / "plt"))
    crosscoder.undecomposed_positions = 0
    checkpoint.save(crosscoder, tmp_path / "native")
    with pytest.raises(ValueError, match="llama-scope-2 has no place for 0 positions without features"):
        convert(tmp_path / "native", tmp_path / "again", to="llama-scope-2")
