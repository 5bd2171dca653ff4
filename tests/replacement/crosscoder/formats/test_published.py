"""What every layout shares: scales, decoders kept apart by site, fingerprints, references to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import tiny
import torch
from published_layouts import RandomTensors, inputs_for
from safetensors.torch import save_file

import replacement
from replacement import TopK, checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats.convert import convert
from replacement.crosscoder.formats.hub import Reference, local_copy
from replacement.crosscoder.formats.published import Published
from replacement.crosscoder.mapped_file import map_tensors
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.wiring import Wiring
from replacement.loading import load_language_model

L, F, D = 3, 10, 6
SHAPE = ModelShape(n_layers=L, d_model=D, n_heads=2, d_head=3)
INPUT_SCALE = {Site(layer, "resid_mid"): 0.5 + layer for layer in range(L)}
OUTPUT_SCALE = {Site(layer, "mlp_out"): 2.0 + layer for layer in range(L)}


def published_by_target(folder: Path, *, skip: bool) -> Published:
    """A CLT whose decoders are grouped by the layer that is written, with scales for all sites."""
    random = RandomTensors()
    wiring = Wiring.strictly_causal(SHAPE)
    stored = {f"enc.{layer}": random(D, F) for layer in range(L)}
    stored |= {f"b_enc.{layer}": random(F) for layer in range(L)} | {f"b_dec.{layer}": random(D) for layer in range(L)}
    stored |= {f"dec.{target}": random(target + 1, F, D) for target in range(L)}
    if skip:
        stored |= {f"W_skip.{n}": random(D, D) for n in range(L * (L + 1) // 2)}
    save_file(stored, folder / "weights.safetensors")
    tensors, mapped = map_tensors(folder / "weights.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith(("enc", "dec"))}
    return Published(
        layout="by target",
        path=folder,
        rule="",
        wiring=wiring,
        n_features=F,
        activation=TopK(3),
        tensors=kept | {f"W_enc.{layer}": tensors[f"enc.{layer}"].T for layer in range(L)},
        decoders={(g, t - g): tensors[f"dec.{t}"][g] for t in range(L) for g in range(t + 1)},
        files=[mapped],
        skip=skip,
        input_scale=INPUT_SCALE,
        output_scale=OUTPUT_SCALE,
    )


@pytest.mark.parametrize("skip", [False, True])
def test_scales_and_decoders_by_target(tmp_path: Path, skip: bool) -> None:
    published = published_by_target(tmp_path, skip=skip)
    options = {"dtype": torch.float64, "device": "cpu"}
    eager, lazy = (published.load(lazy=lazy, **options) for lazy in (False, True))
    checkpoint.save(lazy, tmp_path / "copy", dtype=torch.float64)
    copy = checkpoint.load(tmp_path / "copy", dtype=torch.float64)
    inputs = inputs_for(eager)
    # The formula, straight from the file: weights act on scaled inputs and give scaled outputs.
    tensors, _ = map_tensors(tmp_path / "weights.safetensors")
    raw = {name: value.double() for name, value in tensors.items()}
    acts = []
    for layer in range(L):
        pre_BF = INPUT_SCALE[Site(layer, "resid_mid")] * inputs[Site(layer, "resid_mid")] @ raw[f"enc.{layer}"]
        pre_BF = pre_BF + raw[f"b_enc.{layer}"]
        kept_BF = torch.zeros_like(pre_BF).scatter_(1, pre_BF.topk(3, dim=1).indices, 1.0)
        acts.append(pre_BF.clamp(min=0) * kept_BF)
    expected = {}
    for target in range(L):
        y_BD = raw[f"b_dec.{target}"] + sum(acts[g] @ raw[f"dec.{target}"][g] for g in range(target + 1))
        for group in range(target + 1) if skip else ():
            number = sum(L - g for g in range(group)) + target - group
            site = Site(group, "resid_mid")
            y_BD = y_BD + INPUT_SCALE[site] * inputs[site] @ raw[f"W_skip.{number}"].T
        expected[Site(target, "mlp_out")] = y_BD / OUTPUT_SCALE[Site(target, "mlp_out")]
    for crosscoder in (eager, lazy, copy):
        with torch.no_grad():
            outputs, features = crosscoder(inputs)
        for group, acts_BF in enumerate(acts):
            torch.testing.assert_close(features.dense(group), acts_BF)
        for site, y_BD in expected.items():
            torch.testing.assert_close(outputs[site], y_BD)
        assert crosscoder.fingerprint == eager.fingerprint
        for group, writes in enumerate(eager.wiring.writes):
            for site in writes:
                torch.testing.assert_close(crosscoder.decoder(group, site), eager.decoder(group, site))
                assert crosscoder.decoder_vectors(group, torch.tensor([1]), site).shape == (1, D)


def test_inputs_keep_their_gradients_through_scaled_encoders(tmp_path: Path) -> None:
    published = published_by_target(tmp_path, skip=False)
    gradients = []
    for is_lazy in (False, True):
        crosscoder = published.load(dtype=torch.float64, device="cpu", lazy=is_lazy)
        inputs = {site: x_BD.requires_grad_() for site, x_BD in inputs_for(crosscoder).items()}
        sum(y_BD.square().sum() for y_BD in crosscoder(inputs).reconstructions.values()).backward()
        gradients.append([x_BD.grad for x_BD in inputs.values()])
    for expected, given in zip(*gradients, strict=True):
        torch.testing.assert_close(given, expected)


def test_the_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first = published_by_target(folders[0], skip=False)
    changed = {name: value.clone() for name, value in map_tensors(folders[0] / "weights.safetensors")[0].items()}
    second = published_by_target(folders[1], skip=False)
    assert first.known_fingerprint() == second.known_fingerprint()
    changed["dec.1"] += 1
    save_file(changed, folders[1] / "weights.safetensors")
    tensors, _ = map_tensors(folders[1] / "weights.safetensors")
    second.decoders[0, 1].copy_(tensors["dec.1"][0])  # type: ignore[index]
    assert first.known_fingerprint() != second.known_fingerprint()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/repo", ("org/repo", None, None)),
        ("hf:org/repo@main", ("org/repo", None, "main")),
        ("hf:org/repo/a/b.npz@v1/x", ("org/repo", "a/b.npz", "v1/x")),
        ("hf://org/repo/a/b.npz?revision=abc", ("org/repo", "a/b.npz", "abc")),
        ("hf://org/repo", ("org/repo", None, None)),
        ("/folder", None),
        ("hf", None),
    ],
)
def test_references(text: str, expected: tuple[str, str | None, str | None] | None) -> None:
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["hf:", "hf:org", "hf:org/", "hf:/repo", "hf:org/repo name", "hf:org/repo@", "hf:///x/y"]
)
def test_other_references_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read 'hf:.*': expected hf:org/repo\[/path\]\[@revision\]"):
        Reference.parse(text)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine with one repository, and no network."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--repo"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_repository_in_the_cache_is_loaded(offline_hub: Path, language_model: Any) -> None:
    lm = language_model("gpt2")
    crosscoder = tiny.crosscoder_for(lm).eval()
    checkpoint.save(crosscoder, offline_hub / "clt")
    assert local_copy("hf:org/repo/clt") == offline_hub / "clt"
    loaded = checkpoint.load(local_copy("hf:org/repo/clt@main"))
    assert loaded.fingerprint == crosscoder.fingerprint
    with pytest.raises(ValueError, match="the repository org/repo has no plt at its default branch"):
        local_copy("hf:org/repo/plt")
    with pytest.raises(ValueError, match="cannot fetch org/other from the Hugging Face hub: "):
        local_copy("hf:org/other")
    with pytest.raises(ValueError, match="cannot fetch org/repo from the Hugging Face hub: "):
        local_copy("hf:org/repo@another")


LAYERS = [f"layer_{layer}/width_16k/average_l0_{l0}" for layer in range(26) for l0 in (8, 80)]
BIG_REPOSITORY = [f"{layer}/{name}" for layer in LAYERS for name in ("params.npz", "config.json", "notes.txt")]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/layer_1/width_16k/average_l0_8/params.npz", [f"{LAYERS[2]}/config.json", f"{LAYERS[2]}/params.npz"]),
        ("/layer_1/width_16k/average_l0_8/notes.txt", [f"{LAYERS[2]}/notes.txt"]),
        ("/layer_1", sorted(name for name in BIG_REPOSITORY if name.startswith("layer_1/"))),
        ("/layer_[12]", []),
        ("", sorted(BIG_REPOSITORY)),
    ],
)
def test_nothing_but_what_is_named_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: list[str]
) -> None:
    def fetch(repo: str, *, revision: str | None, allow_patterns: list[str] | None) -> str:
        """The hub's own choice of files, of a repository with many."""
        for name in huggingface_hub.utils.filter_repo_objects(BIG_REPOSITORY, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    if expected:
        assert local_copy(f"hf:org/repo{path}") == tmp_path / path.removeprefix("/")
    else:
        with pytest.raises(ValueError, match="the repository org/repo has no "):
            local_copy(f"hf:org/repo{path}")
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()) == expected


def test_a_crosscoder_of_another_model_is_refused() -> None:
    crosscoder = Crosscoder(Wiring.per_layer(SHAPE), n_features=16, model_name="google/gemma-2-2b")
    lm = type("Model", (), {"shape": SHAPE, "name": "gemma-2-2b", "fingerprint": "2:aa"})()
    checkpoint.check_fits(crosscoder, lm)
    lm.name = "meta-llama/Llama-3.2-1B"
    with pytest.raises(
        ValueError, match=r"was trained on 'google/gemma-2-2b', the model is 'meta-llama/Llama-3.2-1B'; if "
    ):
        checkpoint.check_fits(crosscoder, lm)


def test_a_converted_crosscoder_fits_the_model_that_it_was_converted_for(tmp_path: Path) -> None:
    lm = load_language_model("demo")
    theirs = Crosscoder(Wiring.per_layer(lm.shape), n_features=16, model_name="google/gemma-2-2b")
    checkpoint.save(theirs, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"`replacement convert CROSSCODER FOLDER --model MODEL`"):
        checkpoint.check_fits(theirs, lm)
    convert(tmp_path / "theirs", tmp_path / "copy", to="crosstrace", dtype=None, model=lm)
    checkpoint.check_fits(checkpoint.load(tmp_path / "copy"), lm)


def test_load_names_the_reference(offline_hub: Path) -> None:
    with pytest.raises(ValueError, match="has no known layout"):
        replacement.load("demo", crosscoder="hf:org/repo")
