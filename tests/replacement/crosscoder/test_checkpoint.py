"""Checkpoints come back equal, are written whole or not at all, and damage is reported with the file's name."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from replacement import checkpoint
from replacement.crosscoder.activation import JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.formats import native
from replacement.crosscoder.sites import ModelShape
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.crosscoder.wiring import Wiring

ACTIVATIONS = [ReLU(), JumpReLU(bandwidth=0.5), TopK(3), BatchTopK(3, momentum=0.5)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_round_trip(
    wiring: Wiring, activation: Any, tied: bool, random_crosscoder: Any, random_inputs: Any, tmp_path: Path
) -> None:
    saved = random_crosscoder(
        wiring, activation=activation, tied=tied, skip=True, model_name="tiny", undecomposed_positions=1
    )
    checkpoint.save(saved, tmp_path / "c", dtype=torch.float64, training={"tokens": 5})
    loaded = checkpoint.load(tmp_path / "c", dtype=torch.float64)
    assert (loaded.wiring, loaded.activation, loaded.tied, loaded.skip) == (wiring, activation, tied, True)
    assert (loaded.model_name, loaded.undecomposed_positions, loaded.training) == ("tiny", 1, False)
    assert native.read_config(tmp_path / "c")["training"] == {"tokens": 5}
    before, after = (c(random_inputs(wiring)).reconstructions for c in (saved, loaded))
    assert all(torch.equal(before[site], after[site]) for site in before)


def test_bfloat16_is_rounded_once_and_half_the_size(shape: ModelShape, random_crosscoder: Any, tmp_path: Path) -> None:
    crosscoder = random_crosscoder(Wiring.per_layer(shape), n_features=512)
    checkpoint.save(crosscoder, tmp_path / "full")
    checkpoint.save(crosscoder, tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / name / native.TENSOR_FILE).stat().st_size for name in ("full", "half")]
    assert 0.5 <= sizes[1] / sizes[0] < 0.51
    loaded = checkpoint.load(tmp_path / "half").state_dict()
    for name, value in crosscoder.state_dict().items():
        assert torch.equal(loaded[name], value.bfloat16().float())


def test_saving_replaces_a_checkpoint_and_leaves_nothing_else(
    shape: ModelShape, random_crosscoder: Any, tmp_path: Path
) -> None:
    (tmp_path / "c").mkdir()
    for seed in (0, 1):
        checkpoint.save(random_crosscoder(Wiring.per_layer(shape), seed=seed), tmp_path / "c")
    assert torch.equal(
        checkpoint.load(tmp_path / "c").W_enc[0],
        random_crosscoder(Wiring.per_layer(shape), seed=1).W_enc[0].float(),
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert sorted(entry.name for entry in (tmp_path / "c").iterdir()) == ["config.json", "crosscoder.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(
    shape: ModelShape, random_crosscoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crosscoder = random_crosscoder(Wiring.per_layer(shape))
    checkpoint.save(crosscoder, tmp_path / "c", dtype=torch.float64)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(native, "write_tensors", full_disk)
    with pytest.raises(ValueError, match=r"c: could not be written \(no space left"):
        checkpoint.save(random_crosscoder(Wiring.per_layer(shape), seed=1), tmp_path / "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert torch.equal(checkpoint.load(tmp_path / "c", dtype=torch.float64).W_enc[0], crosscoder.W_enc[0])


def test_saving_refuses_foreign_folders_and_bad_weights(
    shape: ModelShape, random_crosscoder: Any, tmp_path: Path
) -> None:
    crosscoder = random_crosscoder(Wiring.per_layer(shape))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"notes: holds 'thesis.tex', which would be lost"):
        checkpoint.save(crosscoder, tmp_path / "notes")
    with pytest.raises(ValueError, match=r"thesis.tex: expected a folder, but it is a file"):
        checkpoint.save(crosscoder, tmp_path / "notes" / "thesis.tex")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"other.config\.json is no crosscoder checkpoint"):
        checkpoint.save(crosscoder, tmp_path / "other")
    with torch.no_grad():
        crosscoder.b_enc[2][0] = torch.nan
    with pytest.raises(ValueError, match=r"b_enc\.2 holds NaN"):
        checkpoint.save(crosscoder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def edit_config(**changes: object) -> Callable[[Path], None]:
    """Change entries of the configuration, and its digest with them."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value != "drop" and key != "config_sha256"}
        if config["version"] == 1:
            config.pop("tensors_sha256")
        else:
            text = json.dumps(config, sort_keys=True)
            config["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change tensors of a checkpoint of version 1, which has no digests."""

    def edit(folder: Path) -> None:
        edit_config(version=1)(folder)
        tensors = load_file(folder / "crosscoder.safetensors")
        change(tensors)
        save_file(tensors, folder / "crosscoder.safetensors")

    return edit


def truncate(folder: Path) -> None:
    path = folder / "crosscoder.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


CONFIG, TENSORS = "config.json", "crosscoder.safetensors"
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} does not exist"),
    (lambda folder: (folder / TENSORS).unlink(), f"{TENSORS} does not exist"),
    (truncate, f"{TENSORS} is damaged or not a safetensors file"),
    (lambda folder: (folder / TENSORS).write_text("junk"), f"{TENSORS} is damaged or not a safetensors file"),
    (write_config("{"), f"{CONFIG} is not JSON"),
    (write_config("[1]"), f"{CONFIG} is no crosscoder checkpoint: expected format 'crosstrace crosscoder', got 'list'"),
    (write_config('{"model_type": "gpt2"}'), f"{CONFIG} is no crosscoder checkpoint"),
    (edit_config(version=3), f"{CONFIG} has format version 3; this library reads versions up to 2"),
    (edit_config(version=0), f"{CONFIG} has format version 0; this library reads versions up to 2"),
    (edit_config(tensors_sha256="drop"), f"{CONFIG} lacks the entry 'tensors_sha256'"),
    (edit_config(tensors_sha256="0" * 64), f"{TENSORS} is damaged: its digest is not the one recorded in config.json"),
    (
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"k": 3', '"k": 2')),
        f"{CONFIG} is damaged or was edited: its entries do not have the digest recorded in it",
    ),
    (edit_config(tied="drop"), f"{CONFIG} lacks the entry 'tied'"),
    (edit_config(activation={"name": "gelu"}), f"{CONFIG} does not describe a crosscoder: unknown activation 'gelu'"),
    (edit_config(wiring={"name": "x"}), f"{CONFIG} does not describe a crosscoder: a wiring needs"),
    (
        edit_config(n_features=17),
        f"{TENSORS}: the tensor W_enc.0 has the wrong shape: expected [17, 8], got [16, 8]",
    ),
    (
        edit_config(n_features=10**12),
        f"{TENSORS}: the tensor W_enc.0 has the wrong shape: expected [1000000000000, 8], got [16, 8]",
    ),
    (edit_config(n_features=10**18), f"{CONFIG} does not describe a crosscoder: no memory for 3 groups of 1000"),
    (edit_config(n_features=0), f"{CONFIG} does not describe a crosscoder: n_features must be 1 or more, got 0"),
    (
        edit_tensors(lambda t: t.update({"b_enc.0": t["b_enc.0"].long()})),
        f"{TENSORS}: the dtype of the tensor b_enc.0 must be one of float32, float64, bfloat16, float16; got int64",
    ),
    (
        edit_tensors(lambda t: t.update({"b_enc.0": t["b_enc.0"].to(torch.float8_e4m3fn)})),
        "the dtype of the tensor b_enc.0 must be one of float32, float64, bfloat16, float16; got float8_e4m3fn",
    ),
    (edit_tensors(lambda t: t["W_enc.2"].fill_(1e38)), "W_enc.2 holds values up to 1e+38: expected magnitudes of at"),
    (
        edit_tensors(lambda t: t.update({"b_dec.0": torch.full((8,), 1e300, dtype=torch.float64)})),
        "the tensor b_dec.0 holds NaN or infinite values",
    ),
    (edit_tensors(lambda t: t.pop("b_dec.1")), f"{TENSORS} lacks the tensor b_dec.1"),
    (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), f"{TENSORS} has an unexpected tensor extra"),
    (edit_tensors(lambda t: t["W_enc.2"].fill_(torch.inf)), f"{TENSORS}: the tensor W_enc.2 holds NaN or infinite"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damage_is_named(
    damage: Callable[[Path], object], message: str, shape: ModelShape, random_crosscoder: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    checkpoint.save(random_crosscoder(Wiring.per_layer(shape)), folder)
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)


def test_checkpoints_without_digests_load_as_before(
    wiring: Wiring, random_crosscoder: Any, random_inputs: Any, tmp_path: Path
) -> None:
    saved = random_crosscoder(wiring, activation=BatchTopK(3))
    checkpoint.save(saved, tmp_path / "c", dtype=torch.float64)
    edit_config(version=1)(tmp_path / "c")
    assert "sha256" not in (tmp_path / "c" / "config.json").read_text()
    assert checkpoint.load(tmp_path / "c", dtype=torch.float64).fingerprint == saved.fingerprint


@pytest.fixture(scope="module")
def pristine(shape: ModelShape, random_crosscoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to damage and mend."""
    folder = tmp_path_factory.mktemp("pristine") / "c"
    checkpoint.save(random_crosscoder(Wiring.strictly_causal(shape), activation=JumpReLU()), folder)
    return folder


@settings(max_examples=400)
@given(st.sampled_from([CONFIG, TENSORS]), st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(pristine: Path, name: str, data: st.DataObject) -> None:
    path = pristine / name
    before = path.read_bytes()
    # As often in the header as in the values.
    last = data.draw(st.sampled_from([len(before) - 1, min(len(before) - 1, 2000)]))
    place, bit = data.draw(st.integers(0, last)), data.draw(st.integers(0, 7))
    expected = checkpoint.load(pristine)
    try:
        path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
        loaded = checkpoint.load(pristine)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert loaded.settings() == expected.settings()
        assert (loaded.model_name, loaded.model_fingerprint) == (expected.model_name, expected.model_fingerprint)
        for tensor, value in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[tensor], value)
    finally:
        path.write_bytes(before)


def test_a_kill_while_saving_leaves_the_old_checkpoint(
    shape: ModelShape, random_crosscoder: Any, tmp_path: Path
) -> None:
    code = """
        import os, sys, torch
        from replacement import Crosscoder, ModelShape, Wiring, checkpoint
        from replacement.crosscoder.formats import native
        write_tensors = native.write_tensors
        def killed(*arguments):
            write_tensors(*arguments)
            os.kill(os.getpid(), 9)
        native.write_tensors = killed
        checkpoint.save(Crosscoder(Wiring.per_layer(ModelShape(3, 8, 2, 5)), n_features=16), sys.argv[1])
    """
    crosscoder = random_crosscoder(Wiring.per_layer(shape))
    checkpoint.save(crosscoder, tmp_path / "c")
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "c")]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(checkpoint.load(tmp_path / "c").W_enc[0], crosscoder.W_enc[0].float())
    checkpoint.save(crosscoder, tmp_path / "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist: expected the folder of a crosscoder"):
        checkpoint.load(tmp_path / "nowhere")


@dataclass
class Model:
    """What of a language model is compared with a crosscoder."""

    shape: ModelShape
    name: str = ""
    fingerprint: str = ""
    legacy_fingerprint: str = ""

    def has_fingerprint(self, recorded: str) -> bool:
        return recorded in (self.fingerprint, self.legacy_fingerprint)


def test_check_fits_compares_shape_then_weights_then_names(shape: ModelShape) -> None:
    crosscoder = Crosscoder(Wiring.per_layer(shape), n_features=16, model_name="gpt2", model_fingerprint="aa", seed=0)
    checkpoint.check_fits(crosscoder, Model(shape, "gpt2"))
    checkpoint.check_fits(crosscoder, shape)
    checkpoint.check_fits(crosscoder, Model(shape, "renamed", "aa"))
    checkpoint.check_fits(crosscoder, Model(shape, "renamed", "2:bb", legacy_fingerprint="aa"))
    with pytest.raises(ValueError, match="trained on 'gpt2', the model is 'pythia'"):
        checkpoint.check_fits(crosscoder, Model(shape, "pythia"))
    with pytest.raises(ValueError, match="on 'gpt2' with weights aa, the model is 'gpt2' with weights 2:bb"):
        checkpoint.check_fits(crosscoder, Model(shape, "gpt2", "2:bb", legacy_fingerprint="cc"))
    with pytest.raises(ValueError, match="has width 8 at mlp_out, the model has 4"):
        checkpoint.check_fits(crosscoder, Model(ModelShape(3, 4, 2, 2), "gpt2"))


def test_checkpoints_of_two_models_of_one_shape_load_as_they_were_written(tmp_path: Path) -> None:
    """Before a crosscoder could span models of several widths: one width per kind of site, one decoder tensor per group."""
    folder = tmp_path / "old"
    folder.mkdir()
    sites = ["resid_post.1", "resid_post.1@1"]
    wiring = {"name": "model_diffing", "reads": [sites], "writes": [sites], "widths": {"resid_post": 3}}
    config = {
        "format": "crosstrace crosscoder", "version": 1, "model_name": "a", "model_fingerprint": "", "wiring": wiring,
        "n_features": 2, "activation": {"name": "topk", "k": 1}, "tied": False, "skip": False, "undecomposed_positions": 0,
        "dtype": "float32", "training": {},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    decoder_FWD = torch.arange(12.0).view(2, 2, 3)
    tensors = {"W_dec.0": decoder_FWD, "b_enc.0": torch.zeros(2)}
    tensors |= {
        f"{name}.{n}": torch.ones(*shape) for name, shape in (("W_enc", (2, 3)), ("b_dec", (3,))) for n in (0, 1)
    }
    save_file(tensors, folder / "crosscoder.safetensors")
    loaded = checkpoint.load(folder)
    assert loaded.wiring == Wiring.model_diffing(ModelShape(3, 3, 1, 3), layer=1)
    assert loaded.wiring.to_dict() == wiring
    assert all(
        torch.equal(loaded.decoder(0, site), decoder_FWD[:, n]) for n, site in enumerate(loaded.wiring.writes[0])
    )
