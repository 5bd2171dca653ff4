"""Gemma Scope's files, written here from their published keys and shapes, against the formulas in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from published_layouts import RandomTensors, assert_computes
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement import JumpReLU, ReLU, TopK, checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.wiring import Wiring

L, F, D = 3, 12, 8
TRANSCODERS = Path("models--google--gemma-scope-2b-pt-transcoders") / "snapshots" / "abc"


def arrays(random: RandomTensors) -> dict[str, Any]:
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    return {name: random(*shape).numpy() for name, shape in shapes.items()}


def write_npz(root: Path, *, layers: int = L, compressed: bool = False, fortran: bool = False) -> Path:
    """Gemma Scope's tree, one choice for each layer."""
    random = RandomTensors()
    for layer in range(layers):
        path = root / f"layer_{layer}" / "width_16k" / f"average_l0_{layer + 7}" / "params.npz"
        path.parent.mkdir(parents=True)
        named = {name: np.asfortranarray(value) if fortran else value for name, value in arrays(random).items()}
        (np.savez_compressed if compressed else np.savez)(path, **named)
    return root


def tensors_2(random: RandomTensors, *, n_layers: int | None = None, group: int = 0, affine: bool) -> dict[str, Tensor]:
    decoder = random(F, D) if n_layers is None else random(F, n_layers, D)
    if n_layers is not None:
        decoder[:, :group] = 0
    named = {"w_enc": random(D, F), "w_dec": decoder, "b_enc": random(F), "b_dec": random(D), "threshold": random(F)}
    return named | ({"affine_skip_connection": random(D, D)} if affine else {})


def described(layers: str, read: str, write: str, kind: str, affine: bool) -> dict[str, Any]:
    points = {
        "hf_hook_point_in": f"model.layers.{layers}.{read}",
        "hf_hook_point_out": f"model.layers.{layers}.{write}",
    }
    model = {"model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu"}
    return points | model | {"width": F, "l0": 15, "affine_connection": affine, "type": kind}


def write_plt_2(folder: Path, *, affine: bool) -> Path:
    random = RandomTensors()
    for layer in range(L):
        place = folder / f"layer_{layer}_width_16k_l0_small"
        place.mkdir(parents=True)
        save_file(tensors_2(random, affine=affine), place / "params.safetensors")
        norms = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
        (place / "config.json").write_text(json.dumps(described(str(layer), *norms, "transcoder", affine)))
    return folder


def write_multi(folder: Path, config: dict[str, Any] | None, *, affine: bool) -> Path:
    folder.mkdir(parents=True)
    random = RandomTensors()
    for group in range(L):
        save_file(
            tensors_2(random, n_layers=L, group=group, affine=affine), folder / f"params_layer_{group}.safetensors"
        )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def active(x_BD: Tensor, weights: dict[str, Tensor], encoder: str) -> Tensor:
    h_BF = x_BD @ weights[encoder] + weights["b_enc"]
    return h_BF.clamp(min=0) * (h_BF > weights["threshold"])


def single_reference(layers: list[dict[str, Tensor]], read: str, write: str, *, first: int = 0) -> Any:
    def compute(inputs: Any) -> Any:
        acts, outputs = [], {}
        for layer, weights in enumerate(layers, start=first):
            x_BD = inputs[Site(layer, read)]
            acts.append(active(x_BD, weights, "W_enc" if "W_enc" in weights else "w_enc"))
            y_BD = acts[-1] @ weights["W_dec" if "W_dec" in weights else "w_dec"] + weights["b_dec"]
            if "affine_skip_connection" in weights:
                y_BD = y_BD + x_BD @ weights["affine_skip_connection"]
            outputs[Site(layer, write)] = y_BD
        return acts, outputs

    return compute


def doubled(named: Any) -> dict[str, Tensor]:
    return {name: torch.as_tensor(np.asarray(value)).double() for name, value in named.items()}


def npz_layers(root: Path) -> list[dict[str, Tensor]]:
    return [doubled(np.load(next(root.glob(f"layer_{layer}/*/*/params.npz")))) for layer in range(L)]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fortran", [False, True])
def test_the_repository_says_that_files_are_transcoders(tmp_path: Path, compressed: bool, fortran: bool) -> None:
    root = write_npz(tmp_path / TRANSCODERS, compressed=compressed, fortran=fortran)
    reference = single_reference(npz_layers(root), "mlp_normalized", "mlp_out")
    crosscoder = assert_computes(root, reference, tmp_path, decomposed_from=1)
    assert (crosscoder.wiring.name, crosscoder.model_name) == ("per_layer", "google/gemma-2-2b")


@pytest.mark.parametrize(("name", "kind"), [("res", "resid_post"), ("mlp", "mlp_out"), ("att", "attn_z")])
def test_the_repository_says_where_an_sae_is(tmp_path: Path, name: str, kind: str) -> None:
    root = write_npz(tmp_path / f"gemma-scope-9b-it-{name}")
    path = next(root.glob("layer_1/*/*"))
    for given in (path, path / "params.npz", path.parent):
        scratch = tmp_path / str(len(given.parts))
        scratch.mkdir()
        reference = single_reference([npz_layers(root)[1]], kind, kind, first=1)
        crosscoder = assert_computes(given, reference, scratch, decomposed_from=1)
        assert (crosscoder.wiring.name, crosscoder.model_name) == ("autoencoder", "google/gemma-2-9b-it")


def test_a_reference_says_what_a_lone_file_does_not(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, **arrays(RandomTensors()))
    with pytest.raises(
        ValueError, match=re.escape("params.npz does not say its read and write and layer: name what is")
    ):
        checkpoint.load(path)
    asked = tmp_path / "params.npz?read=mlp_in&write=mlp_out&layer=5"
    assert_computes(
        asked, single_reference([doubled(np.load(path))], "mlp_in", "mlp_out", first=5), tmp_path, decomposed_from=1
    )
    wiring = checkpoint.load(tmp_path / "params.npz?read=resid_post&layer=2").wiring
    assert wiring.reads == wiring.writes == ((Site(2, "resid_post"),),)
    for query, message in (
        ("site=mlp_in", "expected ?read=KIND&write=KIND&layer=N, got the key 'site'"),
        ("read=mlp", "read: expected one of resid_pre, "),
        ("read=mlp_in&layer=x", "layer: expected a number, or several as in 5,9,12, got 'x'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            checkpoint.load(f"{path}?{query}")


def test_several_choices_for_a_layer_are_listed(tmp_path: Path) -> None:
    root = write_npz(tmp_path / TRANSCODERS)
    path = root / "layer_1" / "width_16k" / "average_l0_99" / "params.npz"
    path.parent.mkdir()
    np.savez(path, **arrays(RandomTensors()))
    names = ", ".join(f"layer_1/width_16k/average_l0_{l0}/params.npz" for l0 in (8, 99))
    message = f"holds 2 files for layer 1: {names};"
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(root)


@pytest.mark.parametrize("affine", [False, True])
def test_transcoders_of_the_second_release(tmp_path: Path, affine: bool) -> None:
    folder = write_plt_2(tmp_path / "set", affine=affine)
    layers = [doubled(load_file(path)) for path in sorted(folder.glob("*/params.safetensors"))]
    assert_computes(folder, single_reference(layers, "mlp_in", "mlp_out"), tmp_path, decomposed_from=1)
    convert(folder, tmp_path / "plt", to="circuit-tracer-plt")
    convert(tmp_path / "plt", tmp_path / "again", to="gemma-scope-2")
    for before, after in zip(
        sorted(folder.glob("*/params*")), sorted((tmp_path / "again").glob("*/params*")), strict=True
    ):
        tensors, copies = load_file(before), load_file(after)
        tensors["threshold"].clamp_(min=0)
        assert tensors.keys() == copies.keys()
        assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


NORMS = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
MULTI = [
    ("clt/width_262k_l0_big", None, (0, 1, 2), ("mlp_in", "mlp_out")),
    ("clt_files", ("{all}", *NORMS, "clt"), (0, 1, 2), ("mlp_in", "mlp_out")),
    ("crosscoder/layer_5_9_12_width_1m_l0_big", None, (5, 9, 12), ("resid_post", "resid_post")),
    ("files", ("{5,9,12}", "output", "output", "crosscoder"), (5, 9, 12), ("resid_post", "resid_post")),
]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("place", "config", "layers", "kinds"), MULTI)
def test_layers_that_write_later_layers(
    tmp_path: Path, place: str, config: Any, layers: tuple[int, ...], kinds: tuple[str, str], affine: bool
) -> None:
    folder = write_multi(tmp_path / place, config and described(*config, affine), affine=affine)
    weights = [doubled(load_file(folder / f"params_layer_{group}.safetensors")) for group in range(L)]

    def compute(inputs: Any) -> Any:
        read = [inputs[Site(layer, kinds[0])] for layer in layers]
        acts = [active(x_BD, group, "w_enc") for x_BD, group in zip(read, weights, strict=True)]
        outputs = {}
        for place, layer in enumerate(layers):
            y_BD = weights[place]["b_dec"] + sum(a @ w["w_dec"][:, place] for a, w in zip(acts, weights, strict=True))
            skip = weights[place].get("affine_skip_connection")
            outputs[Site(layer, kinds[1])] = y_BD if skip is None else y_BD + read[place] @ skip
        return acts, outputs

    assert_computes(folder, compute, tmp_path, decomposed_from=1)
    convert(folder, tmp_path / "again", to="gemma-scope-2")
    for path in folder.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "again" / path.name)
        before["threshold"].clamp_(min=0)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_circuit_tracer_lists_both_releases(tmp_path: Path) -> None:
    """Its config.yaml decides; a threshold below 0 admits negative activations there."""
    write_npz(tmp_path / "npz", layers=1)
    write_plt_2(tmp_path / "second", affine=False)
    files = [next((tmp_path / "npz").rglob("*.npz")), tmp_path / "second/layer_1_width_16k_l0_small/params.safetensors"]
    config = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
        "transcoders": [str(file.relative_to(tmp_path)) for file in files],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    crosscoder = checkpoint.load(tmp_path)
    first, second = dict(np.load(files[0])), load_file(files[1])
    assert torch.equal(crosscoder.W_enc[0], torch.from_numpy(first["W_enc"]).T)
    assert torch.equal(crosscoder.W_enc[1], second["w_enc"].T)
    assert crosscoder.threshold is not None
    assert torch.equal(crosscoder.threshold[1], second["threshold"])
    for query in ("?read=mlp_in", "?write=mlp_out&layer=3", "?read=mlp_in&write=mlp_out&layer=5,9"):
        with pytest.raises(ValueError, match=re.escape(f"says itself what it reads and writes: leave out {query}")):
            checkpoint.load(f"{tmp_path}{query}")


def test_what_is_wrong_with_arrays_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    named, query = arrays(RandomTensors()), "?read=mlp_in&write=mlp_out&layer=0"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"W_dec": np.zeros((F, D), dtype=object)}, "cannot read the array W_dec: expected an array of "),
        ({"W_dec": np.zeros((F, D), dtype=">f4")}, "cannot read the array W_dec: expected an array of "),
        ({"b_enc": np.zeros(F + 1, np.float32)}, "the tensor b_enc has the wrong shape: expected [12], got [13]"),
        ({"b_dec": np.zeros(D, np.int32)}, "the dtype of the tensor b_dec must be one of "),
        ({"extra": np.zeros(2)}, "holds tensors that its layout does not have: extra"),
        ({"scaling_factor": np.full(F, 2.0)}, "the tensor scaling_factor is not 1"),
    ]
    for change, message in changes:
        np.savez(path, **{**named, **change})
        with pytest.raises(ValueError, match=re.escape(message)):
            checkpoint.load(f"{path}{query}")
    np.savez(path, **named)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"params.npz is damaged or not a NumPy file: "):
        checkpoint.load(f"{path}{query}")


def test_what_is_wrong_with_the_second_release_is_named(tmp_path: Path) -> None:
    folder = write_multi(tmp_path / "clt", described("{all}", *NORMS, "clt", False), affine=False)
    good = json.loads((folder / "config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"affine_connection": True}, "has none, but its config.json says affine_connection True"),
        ({"architecture": "topk"}, "architecture: expected jump_relu, got 'topk'"),
        (
            {"hf_hook_point_in": "model.layers.0.mlp.input"},
            "hf_hook_point_in: expected model.layers.N. and one of output",
        ),
        ({"hf_hook_point_in": "model.layers.3.output"}, "expected 3 layers that are read and written, got [3]"),
        ({"scale": 2}, "config.json has entries that are not known: scale"),
    ]
    for change, message in changes:
        (folder / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=re.escape(message)):
            checkpoint.load(folder)
    (folder / "config.json").write_text(json.dumps(good))
    (folder / "params_layer_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks the file params_layer_1.safetensors, but params_layer_2"):
        checkpoint.load(folder)


SHAPE = ModelShape(n_layers=L, d_model=D, n_heads=2, d_head=4)
CLT = Wiring.strictly_causal(SHAPE, read="mlp_in")
SECOND_MODEL = ((Site(1, "resid_post", model=1),),)
REFUSED: list[tuple[Wiring, dict[str, Any], str]] = [
    (Wiring.acausal(SHAPE), {}, "the wiring acausal"),
    (Wiring.model_diffing(SHAPE, layer=1), {}, "the wiring model_diffing"),
    (Wiring("autoencoder", SECOND_MODEL, SECOND_MODEL, {"resid_post": D}), {}, "a second model"),
    (Wiring.per_layer(SHAPE, read="resid_mid"), {}, "the site resid_mid"),
    (Wiring.attention(SHAPE), {}, "the site attn_out"),
    (CLT, {"activation": TopK(2)}, "the activation {'name': 'topk', 'k': 2}"),
    (CLT, {"activation": JumpReLU(affine=True)}, "the activation {'name': 'jumprelu', "),
    (CLT, {"tied": True}, "tied decoders"),
    (CLT, {"skip": True}, "skip connections to later layers"),
    (CLT, {"undecomposed_positions": 0}, "0 positions without features"),
]


@pytest.mark.parametrize(("wiring", "changes", "problem"), REFUSED)
def test_what_the_second_release_cannot_say_is_refused(
    tmp_path: Path, wiring: Wiring, changes: dict[str, Any], problem: str
) -> None:
    options = {"activation": ReLU(), "undecomposed_positions": 1, **changes}
    crosscoder = Crosscoder(wiring, n_features=F, **options)
    for matrix in crosscoder.W_skip if crosscoder.skip else ():
        torch.nn.init.ones_(matrix)
    checkpoint.save(crosscoder, tmp_path / "native")
    with pytest.raises(ValueError, match=re.escape(f"the layout gemma-scope-2 has no place for {problem}")):
        convert(tmp_path / "native", tmp_path / "copy", to="gemma-scope-2")
    assert not (tmp_path / "copy").exists()


def test_thresholds_below_0_are_refused(tmp_path: Path) -> None:
    crosscoder = Crosscoder(CLT, n_features=F, activation=JumpReLU(), undecomposed_positions=1)
    assert crosscoder.threshold is not None
    with torch.no_grad():
        crosscoder.threshold[1, 2] = -0.5
    checkpoint.save(crosscoder, tmp_path / "native")
    for layout in ("gemma-scope-2", "llama-scope-2"):
        with pytest.raises(ValueError, match=f"the layout {layout} has no place for thresholds below 0"):
            convert(tmp_path / "native", tmp_path / "copy", to=layout)
