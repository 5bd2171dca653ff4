"""Cross-layer transcoders with a joint choice, written here from their model card, against its formulas in float64."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import Change, RandomTensors, assert_computes, cut_off, entries_changed, tensors_changed
from safetensors.torch import load_file, save_file

from replacement import checkpoint
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.formats.layouts import open_published
from replacement.crosscoder.sites import Site

L, F, D, K = 3, 12, 8, 2
CONFIG = {"d_feature": F, "k": K, "base_model": "org/model", "n_layers": L, "d_model": D}


def write_clt(folder: Path) -> Path:
    """Norms differ from feature to feature; the factors, which are not to be applied, are no ones."""
    folder.mkdir()
    random = RandomTensors()
    norms = []
    for layer in range(L):
        decoder = random(F, L - layer, D) * random(F, 1, 1).abs()
        norms.append(decoder.flatten(1).norm(dim=1))
        save_file({f"W_enc_{layer}": random(F, D)}, folder / f"W_enc_{layer}.safetensors")
        tensors = {f"W_dec_{layer}": decoder, f"W_dec_norm_{layer}": norms[-1]}
        save_file(tensors, folder / f"W_dec_{layer}.safetensors")
    save_file({"W_dec_norm": torch.stack(norms)}, folder / "W_dec_norm.safetensors")
    factors = {"resid_mid_l2": torch.full((L,), 7.0), "mlp_out_l2": torch.full((L,), 3.0)}
    save_file(factors, folder / "factors.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_best_features_of_all_layers_are_kept(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "clt")
    tensors = {name: value.double() for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}

    def compute(inputs: Any) -> Any:
        acts_BGF = torch.stack(
            [(inputs[Site(n, "resid_mid")] @ tensors[f"W_enc_{n}"].T).clamp(min=0) for n in range(L)], dim=1
        )
        best = (acts_BGF * tensors["W_dec_norm"]).flatten(1).topk(K * L, dim=1).indices
        kept = torch.zeros_like(acts_BGF.flatten(1)).scatter_(1, best, 1.0).view_as(acts_BGF)
        acts_BGF = acts_BGF * kept
        outputs = {
            Site(m, "mlp_out"): sum(acts_BGF[:, n] @ tensors[f"W_dec_{n}"][:, m - n] for n in range(m + 1))
            for m in range(L)
        }
        return list(acts_BGF.unbind(1)), outputs

    crosscoder = assert_computes(folder, compute, tmp_path, decomposed_from=1)
    assert crosscoder.model_name == "org/model"
    assert open_published(folder).facts["k"] == K


def test_round_trips_are_exact(tmp_path: Path) -> None:
    folder = write_clt(tmp_path / "clt")
    convert(folder, tmp_path / "again", to="cross-layer-topk")
    for path in folder.glob("W_*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "again" / path.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == CONFIG


def test_what_the_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    crosscoder = checkpoint.load(write_clt(tmp_path / "clt"))
    with torch.no_grad():
        crosscoder.b_dec[1][0] = 1.0
    checkpoint.save(crosscoder, tmp_path / "native")
    with pytest.raises(ValueError, match="the layout cross-layer-topk has no place for biases"):
        convert(tmp_path / "native", tmp_path / "again", to="cross-layer-topk")
    with pytest.raises(ValueError, match="the layout circuit-tracer-clt has no place for the activation"):
        convert(tmp_path / "clt", tmp_path / "again", to="circuit-tracer-clt")


with_config, with_tensors = partial(entries_changed, "config.json"), tensors_changed
MISTAKES: list[tuple[Change, str]] = [
    (lambda folder: (folder / "W_enc_1.safetensors").unlink(), "lacks the file W_enc_1.safetensors"),
    (lambda folder: (folder / "W_dec_2.safetensors").unlink(), "as many W_dec files as W_enc files, got 2 and 3"),
    (lambda folder: (folder / "W_dec_norm.safetensors").unlink(), "W_dec_norm.safetensors does not exist"),
    (cut_off("W_dec_1.safetensors"), "W_dec_1.safetensors is damaged or not a safetensors file"),
    (with_config(k=None), "config.json lacks the entry 'k'"),
    (with_config(d_feature=F + 1), "the tensor W_enc_0 has the wrong shape: expected [13, any], got [12, 8]"),
    (with_config(scale=0.5), "the entry 'scale' is neither a text nor one of the sizes"),
    (with_config(n_layers=L + 1), "the entry 'n_layers' is neither a text nor one of the sizes"),
    (
        with_tensors("W_enc_0.safetensors", b_enc_0=torch.zeros(F)),
        "holds tensors that its layout does not have: b_enc_0",
    ),
    (
        with_tensors("W_dec_1.safetensors", W_dec_1=torch.zeros(F, L, D)),
        "wrong shape: expected [12, 2, 8], got [12, 3, 8]",
    ),
    (with_tensors("W_dec_norm.safetensors", W_dec_norm=-torch.ones(L, F)), "W_dec_norm holds values below 0"),
    (
        with_tensors("W_enc_0.safetensors", W_enc_0=torch.zeros(F, D, dtype=torch.int32)),
        "the dtype of the tensor W_enc_0",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_what_is_wrong_is_named(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_clt(tmp_path / "clt")
    change(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.load(folder)
