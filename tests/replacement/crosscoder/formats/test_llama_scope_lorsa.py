"""Folders of low-rank sparse attention, written here from their published keys and shapes, against the formula in float64."""

from __future__ import annotations

import json
import math
import re
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

from replacement import Lorsa, checkpoint
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.formats.layouts import open_published, writable
from replacement.crosscoder.sites import Site

L, F, D, Q, C, K = 2, 12, 8, 3, 6, 4
READ, WRITE = "ln1.hook_normalized", "hook_attn_out"
THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm."
CONFIG = {
    "sae_type": "lorsa",
    "device": "cuda",
    "dtype": "torch.float32",
    "d_model": D,
    "expansion_factor": F / D,
    "n_qk_heads": Q,
    "d_qk_head": C,
    "n_ctx": 64,
    "positional_embedding_type": "rotary",
    "rotary_dim": 4,
    "rotary_base": 100,
    "rotary_adjacent_pairs": True,
    "rotary_scale": 1,
    "use_NTK_by_parts_rope": False,
    "NTK_by_parts_factor": 1.0,
    "NTK_by_parts_low_freq_factor": 1.0,
    "NTK_by_parts_high_freq_factor": 1.0,
    "old_context_len": 2048,
    "attn_scale": math.sqrt(C),
    "use_post_qk_ln": False,
    "normalization_type": None,
    "eps": 1e-6,
    "use_decoder_bias": True,
    "act_fn": "topk",
    "top_k": K,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {"use_post_qk_ln": True, "normalization_type": "RMS", "eps": 1e-5, "rotary_adjacent_pairs": False},
    "no positions": {"positional_embedding_type": "none", "act_fn": "jumprelu"},
    "own scale": {"attn_scale": 1.7, "norm_activation": "inference"},
    "own scale, norm": {"attn_scale": 1.7, "use_post_qk_ln": True, "normalization_type": "RMS"},
    "not scored": {"sparsity_include_decoder_norm": False, "use_decoder_bias": False, "attn_scale": None},
    "long contexts": {
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": 8.0,
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 4.0,
        "old_context_len": 40,
        "rotary_dim": 6,
        "act_fn": "relu",
    },
}


def write_layer(folder: Path, layer: int, **changes: Any) -> Path:
    """One layer. Scales differ from layer to layer, decoder norms from head to head; tables are stored, too."""
    random, config = RandomTensors(seed=layer), {**CONFIG, **changes}
    read, write = f"blocks.{layer}.{READ}", f"blocks.{layer}.{WRITE}"
    tensors = {
        **{name: random(Q, D, C) for name in ("W_Q", "W_K")},
        **{name: random(Q, C) for name in ("b_Q", "b_K")},
        "W_V": random(F, D),
        "b_V": random(F),
        "W_O": random(F, D) * random(F, 1).abs(),
        "mask": torch.ones(64, 64, dtype=torch.bool).tril(),
        "IGNORE": torch.tensor(-torch.inf),
        NORM + read: torch.tensor(2.0 + layer),
        NORM + write: torch.tensor(0.5 + layer),
    }
    tensors |= {"b_D": random(D)} if config["use_decoder_bias"] else {}
    tensors |= {name: random(Q, C) for name in ("ln_q.w", "ln_k.w")} if config["use_post_qk_ln"] else {}
    tensors |= {THRESHOLD: random(F)} if config["act_fn"] == "jumprelu" else {}
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps({"hook_point_in": read, "hook_point_out": write, **config}))
    return folder


def write_all(folder: Path, **changes: Any) -> Path:
    for layer in range(L):
        write_layer(folder / f"layer{layer}_lorsa_8x_k64", layer, **changes)
    return folder


def angles(config: dict[str, Any]) -> list[float]:
    """Radians per position of every pair, as the publisher's tables have them."""
    found = []
    for pair in range(config["rotary_dim"] // 2):
        inverse = 1.0 / config["rotary_base"] ** (2 * pair / config["rotary_dim"])
        if config["use_NTK_by_parts_rope"]:
            factor, low, high = (config[f"NTK_by_parts_{name}factor"] for name in ("", "low_freq_", "high_freq_"))
            length, wavelength = config["old_context_len"], 2 * math.pi / inverse
            smooth = (length / wavelength - low) / (high - low)
            if wavelength > length / low:
                inverse = inverse / factor
            elif wavelength >= length / high:
                inverse = (1 - smooth) * inverse / factor + smooth * inverse
        found.append(inverse)
    return found


def turned(y_C: Tensor, position: int, config: dict[str, Any]) -> Tensor:
    """A query or key with its pairs of channels turned, as complex numbers."""
    if config["positional_embedding_type"] == "none":
        return y_C
    R, near = config["rotary_dim"], config["rotary_adjacent_pairs"]
    first, second = (y_C[:R:2], y_C[1:R:2]) if near else (y_C[: R // 2], y_C[R // 2 : R])
    angle = position * torch.tensor(angles(config), dtype=torch.float64)
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    both = torch.stack([pairs.real, pairs.imag], -1).flatten() if near else torch.cat([pairs.real, pairs.imag])
    return torch.cat([both, y_C[R:]])


def layer_formula(folder: Path, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[T, F]` and output `[T, D]` of one folder: query by query, group by group."""
    config = json.loads((folder / "config.json").read_text())
    t = {name: value.double() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    scaled = config["norm_activation"] == "dataset-wise"
    x_TD = x_TD * (D**0.5 / t[NORM + config["hook_point_in"]] if scaled else 1)
    values_TF, pre_TF = x_TD @ t["W_V"].T + t["b_V"], torch.zeros(len(x_TD), F, dtype=torch.float64)

    def channels(name: str, group: int, position: int) -> Tensor:
        y_C = x_TD[position] @ t[f"W_{name}"][group] + t[f"b_{name}"][group]
        if config["use_post_qk_ln"]:
            y_C = y_C / (y_C.pow(2).mean() + config["eps"]).sqrt() * t[f"ln_{name.lower()}.w"][group]
        return turned(y_C, position, config)

    for group in range(Q):
        heads = slice(group * F // Q, (group + 1) * F // Q)
        for query in range(len(x_TD)):
            q_C = channels("Q", group, query)
            scores = torch.stack([q_C @ channels("K", group, key) for key in range(query + 1)])
            pattern = (scores / (config["attn_scale"] or C**0.5)).softmax(0)
            pre_TF[query, heads] = pattern @ values_TF[: query + 1, heads]
    norms_F = t["W_O"].norm(dim=1) if config["sparsity_include_decoder_norm"] else torch.ones(F, dtype=torch.float64)
    score_TF = pre_TF * norms_F
    if config["act_fn"] == "jumprelu":
        score_TF = score_TF * (score_TF > t[THRESHOLD].exp())
    else:
        score_TF = score_TF.clamp(min=0)
        k = K if config["act_fn"] == "topk" else F
        score_TF = score_TF * torch.zeros_like(score_TF).scatter_(1, score_TF.topk(k, dim=1).indices, 1.0)
    acts_TF = score_TF / norms_F
    y_TD = acts_TF @ t["W_O"] + t.get("b_D", torch.zeros(D, dtype=torch.float64))
    return acts_TF, y_TD / (D**0.5 / t[NORM + config["hook_point_out"]] if scaled else 1)


def reference(folders: list[Path], *, first: int = 0) -> Reference:
    def compute(inputs: Any) -> Any:
        rows = [inputs[Site(first + place, "attn_normalized")] for place in range(len(folders))]
        found = [layer_formula(folder, x_TD) for folder, x_TD in zip(folders, rows, strict=True)]
        outputs = {Site(first + place, "attn_out"): y_TD for place, (_, y_TD) in enumerate(found)}
        return [acts_TF for acts_TF, _ in found], outputs

    return compute


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_computes_the_formula(tmp_path: Path, variant: str) -> None:
    folder = write_all(tmp_path / "k64", **VARIANTS[variant])
    layers = sorted(folder.iterdir())
    lorsa = assert_computes(folder, reference(layers), tmp_path, decomposed_from=1)
    assert isinstance(lorsa, Lorsa)
    assert (lorsa.wiring.name, lorsa.query_keys.n_groups, lorsa.undecomposed_positions) == ("lorsa", Q, 1)
    single = assert_computes(layers[1], reference(layers[1:], first=1), tmp_path / "single", decomposed_from=1)
    assert single.wiring.read_sites == (Site(1, "attn_normalized"),)


@pytest.mark.parametrize("variant", ["as published", "no positions", "not scored"])
def test_what_is_written_computes_the_same(tmp_path: Path, variant: str) -> None:
    folder = write_all(tmp_path / "k64", **VARIANTS[variant])
    convert(folder, tmp_path / "again", to="llama-scope-2", dtype=torch.float64)
    again = sorted((tmp_path / "again").iterdir())
    assert [path.name for path in again] == ["layer0_lorsa", "layer1_lorsa"]
    assert_computes(tmp_path / "again", reference(sorted(folder.iterdir())), tmp_path, decomposed_from=1)
    lorsa = checkpoint.load(tmp_path / "again", dtype=torch.float64)
    assert isinstance(lorsa, Lorsa)
    original = checkpoint.load(folder, dtype=torch.float64)
    assert isinstance(original, Lorsa)
    if original.query_keys.rotary is not None:
        assert lorsa.query_keys == original.query_keys


def test_other_rotary_frequencies_have_no_place(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "k64", **VARIANTS["long contexts"], norm_activation="inference")
    with pytest.raises(
        ValueError, match="llama-scope-2 has no place for rotary frequencies that are no powers of a base"
    ):
        convert(folder, tmp_path / "again", to="llama-scope-2")


@pytest.mark.parametrize("to", sorted(writable().keys() - {"crosstrace", "llama-scope-2"}))
def test_layouts_without_queries_refuse_it(tmp_path: Path, to: str) -> None:
    folder = write_all(tmp_path / "relu", act_fn="relu", norm_activation="inference")
    with pytest.raises(ValueError, match=f"the layout {to} has no place for queries and keys"):
        convert(folder, tmp_path / "out", to=to)


def test_the_fingerprint_knows_the_scale_of_scores(tmp_path: Path) -> None:
    folders = [write_all(tmp_path / str(scale), attn_scale=scale) for scale in (2.0, 3.0)]
    first, second = (open_published(folder).known_fingerprint() for folder in folders)
    assert first != second


FIRST, SECOND = (f"layer{layer}_lorsa_8x_k64" for layer in range(L))


def with_config(layer: str, **changes: Any) -> Change:
    return entries_changed(f"{layer}/config.json", **changes)


def with_tensors(layer: str, **changes: Any) -> Change:
    return tensors_changed(f"{layer}/sae_weights.safetensors", **changes)


def transcoder_for_a_layer(folder: Path) -> None:
    config = folder / SECOND / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sae_type": "sae"}))


MISTAKES: list[tuple[Change, str]] = [
    (
        with_config(FIRST, n_qk_heads=5),
        "expected n_qk_heads that divide 12 heads, and d_qk_head and attn_scale above 0, got 5",
    ),
    (with_config(FIRST, attn_scale=-1.0), "and attn_scale above 0, got 3, 6 and -1.0"),
    (with_config(FIRST, rotary_scale=2), "expected rotary positions of scale 1, or none, got 'rotary' of scale 2"),
    (with_config(FIRST, positional_embedding_type="alibi"), "got 'alibi' of scale 1"),
    (with_config(FIRST, rotary_dim=8), "queries and keys have 6 channels, 8 are to be rotated"),
    (with_config(FIRST, rotary_dim=3), "the number of rotated channels must be even, got 3"),
    (with_config(FIRST, use_post_qk_ln=True, normalization_type="LN"), "expected 'RMS' with use_post_qk_ln, got 'LN'"),
    (with_config(FIRST, use_NTK_by_parts_rope=True), "expected NTK_by_parts factors above 0, the low below the high"),
    (
        with_config(FIRST, hook_point_in="blocks.0.hook_resid_pre"),
        "hook_point_in: expected blocks.N.ln1.hook_normalized, ",
    ),
    (
        with_config(FIRST, hook_point_out="blocks.0.hook_mlp_out"),
        "hook_point_out: expected blocks.N.hook_attn_out, got",
    ),
    (with_config(FIRST, act_fn="layertopk"), "act_fn: expected relu, jumprelu, topk, got 'layertopk'"),
    (with_config(FIRST, use_smolgen=True), "config.json has entries that are not known: use_smolgen"),
    (with_config(SECOND, d_qk_head=5, rotary_dim=4, attn_scale=None), "the tensor W_Q has the wrong shape: expected"),
    (with_config(SECOND, rotary_base=10), "layers differ in query keys"),
    (with_tensors(FIRST, W_V=None), "sae_weights.safetensors lacks the tensor W_V: it holds "),
    (with_tensors(FIRST, smolgen=torch.zeros(1)), "holds tensors that its layout does not have: smolgen"),
    (cut_off(f"{SECOND}/sae_weights.safetensors"), "sae_weights.safetensors is damaged or not a safetensors file"),
    (transcoder_for_a_layer, "hook_point_in: expected blocks.N.hook_resid_mid, "),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_all(tmp_path / "lorsa")
    change(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(folder)
