"""The folder of a run: one process at a time, whole snapshots only, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training_runs
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from replacement.cli import main
from replacement.training import snapshots
from replacement.training.command import run_with_bar
from replacement.training.run_config import run_config
from replacement.training.run_folder import holds_run
from replacement.training.runs import Interrupted, run
from replacement.training.trainer import Progress

WEIGHTS = Path("crosscoder") / "crosscoder.safetensors"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.write_tokens(tmp_path_factory.mktemp("data") / "tokens.npy")


@pytest.fixture(scope="module")
def value(model_folder: Callable[[str], Path], tokens: Path) -> dict[str, Any]:
    """Settings of ten steps with a checkpoint after the fifth and the last."""
    return training_runs.settings(model_folder("gpt2"), tokens, n_steps=10)


@pytest.fixture(scope="module")
def whole(value: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped."""
    run(run_config(value), folder := tmp_path_factory.mktemp("runs") / "whole")
    return folder


@pytest.fixture(scope="module")
def half(value: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after the seventh step."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    with pytest.raises(Interrupted):
        run(run_config(value), folder, progress=stop_after(7))
    return folder


@pytest.fixture
def out(half: Path, tmp_path: Path) -> Path:
    """A copy of the half run."""
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


def stop_after(step: int) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return show


def settings_file(path: Path, value: dict[str, Any]) -> Path:
    """The settings as a TOML file."""

    def toml(entry: Any) -> str:
        if isinstance(entry, dict):
            return "{" + ", ".join(f"{name} = {toml(inner)}" for name, inner in entry.items()) + "}"
        return json.dumps(entry)

    path.write_text("".join(f"{name} = {toml(entry)}\n" for name, entry in value.items()), encoding="utf-8")
    return path


def command(value: dict[str, Any], folder: Path, out: Path, *options: str) -> list[str]:
    settings = settings_file(folder / "settings.toml", value)
    return [sys.executable, "-m", "replacement", "train", str(settings), "--out", str(out), *options]


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert all(part in lines[0] for part in parts), lines[0]


# One run per folder ---------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_process_is_dead(
    value: dict[str, Any], model_folder: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    """Two real processes, the first of them killed: the kernel lets go of the lock."""
    long, out = training_runs.settings(model_folder("gpt2"), tokens, n_steps=100_000), tmp_path / "run"
    arguments = command(long, tmp_path, out)
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not holds_run(out) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert holds_run(out)
        second = subprocess.run([*arguments, "--resume"], capture_output=True, text=True, timeout=120)
        assert_one_line(second, f"another process is training in {out}: wait until it ends, or choose another folder")
        assert first.poll() is None, "the first run goes on"
    finally:
        first.kill()
        first.wait()
    step = snapshots.newest_step(out / "snapshots")
    assert step is not None
    with pytest.raises(Interrupted):
        run(run_config(long), out, resume=True, progress=stop_after(step + 1))


@pytest.mark.parametrize("exists", [False, True])
def test_there_must_be_something_to_resume(exists: bool, value: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{out} holds no run to resume: start one without --resume")):
        run(run_config(value), out, resume=True)
    assert out.exists() == exists
    assert not exists or not list(out.iterdir())


def test_processes_started_again_by_torchrun_start_where_there_is_no_run(
    value: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(run_config(value), tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


# Whole snapshots only -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_leaves_the_last_snapshot(
    value: dict[str, Any], out: Path, whole: Path, tmp_path: Path
) -> None:
    """Files of more than 100 kB cannot be written, so the next snapshot fails half way."""
    before = sorted(path.name for path in (out / "snapshots").iterdir())

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = command(value, tmp_path, out, "--resume")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, preexec_fn=full)
    assert_one_line(done, "step-00000010: could not be written (File too large")
    assert sorted(path.name for path in (out / "snapshots").iterdir()) == before
    run(run_config(value), out, resume=True)
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


KILLED_WHILE_SAVING = """
import json, os, signal, sys
from replacement.training import snapshots
from replacement.training.run_config import run_config
from replacement.training.runs import run

def die(path):
    os.kill(os.getpid(), signal.SIGKILL)

def show(progress):
    if progress.step == 8:
        snapshots.sha256_of = die  # called when the tensors are written and the snapshot is not yet in its place
        os.kill(os.getpid(), signal.SIGTERM)

run(run_config(json.loads(sys.argv[1])), sys.argv[2], resume=True, progress=show)
"""


def test_what_a_kill_in_the_middle_of_a_snapshot_leaves_is_removed(
    value: dict[str, Any], out: Path, whole: Path
) -> None:
    """A snapshot of a step that the resumed run does not stop at, so that it does not write that snapshot again."""
    arguments = [sys.executable, "-c", KILLED_WHILE_SAVING, json.dumps(value), str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (leftover,) = (out / "snapshots").glob(".step-00000008*")
    assert list(leftover.glob("*.safetensors"))
    assert snapshots.newest_step(out / "snapshots") == 7
    run(run_config(value), out, resume=True)
    assert not list((out / "snapshots").glob(".*"))
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the snapshot of step 3."""
    folder = tmp_path_factory.mktemp("snapshots")
    snapshots.save(folder, 3, small_tensors(), {"tokens": 12})
    return folder


def small_tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(7.0), "b": torch.ones(2, 3)}


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_snapshot_is_noticed(snapshot: Path, place: float, bit: int) -> None:
    (file,) = (snapshot / "step-00000003").glob("*.safetensors")
    before = file.read_bytes()
    content = bytearray(before)
    content[int(place * len(content))] ^= 1 << bit
    file.write_bytes(content)
    try:
        with pytest.raises(
            ValueError, match=r"step-00000003 is damaged .*safetensors is not what was written; delete it"
        ):
            snapshots.load(snapshot, 3, small_tensors())
    finally:
        file.write_bytes(before)
    tensors = {name: torch.zeros_like(x) for name, x in small_tensors().items()}
    snapshots.load(snapshot, 3, tensors)
    assert all(torch.equal(tensors[name], x) for name, x in small_tensors().items())


@pytest.mark.parametrize(
    "facts", ["", "{", "[]", "{}", '{"step": 4}', '{"step": "3"}', '{"step": 3, "sha256": [1]}', "\0", '{"step": true}']
)
def test_damaged_facts_of_a_snapshot_are_named(snapshot: Path, facts: str, tmp_path: Path) -> None:
    shutil.copytree(snapshot, tmp_path / "copy")
    (tmp_path / "copy" / "step-00000003" / "snapshot.json").write_text(facts, encoding="utf-8")
    for use in (snapshots.newest_step, lambda folder: snapshots.load(folder, 3, small_tensors())):
        with pytest.raises(
            ValueError, match=r"step-00000003 is damaged or of another run: snapshot\.json .*; delete it"
        ):
            use(tmp_path / "copy")


def test_a_snapshot_without_its_tensors_is_named(snapshot: Path, tmp_path: Path) -> None:
    shutil.copytree(snapshot, tmp_path / "copy")
    (file,) = (tmp_path / "copy" / "step-00000003").glob("*.safetensors")
    file.unlink()
    with pytest.raises(ValueError, match=r"is damaged or of another run: .*safetensors is not what was written"):
        snapshots.load(tmp_path / "copy", 3, small_tensors())


def test_snapshots_of_earlier_versions_resume(value: dict[str, Any], out: Path, whole: Path) -> None:
    """They have no digests."""
    for file in (out / "snapshots").glob("*/snapshot.json"):
        facts = json.loads(file.read_text(encoding="utf-8"))
        assert facts.pop("sha256")
        file.write_text(json.dumps(facts), encoding="utf-8")
    (out / ".lock").unlink()
    run(run_config(value), out, resume=True)
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


# Other faults of a folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{", "run.json is not JSON: "),
        ("run.json", b"\xff", "run.json is not JSON: "),
        ("run.json", b"[]", "run.json is damaged: expected a JSON object, got list"),
        ("inputs.json", b"3", "inputs.json is damaged: expected a JSON object, got int"),
        ("inputs.json", b"{}", "is not what it was when the run in "),
        (
            "metrics.jsonl",
            b"x\n{}\n",
            "metrics.jsonl is damaged: line 1 is no record of a run; delete the line to go on",
        ),
        ("crosscoder", b"", "crosscoder has no known layout"),
    ],
)
def test_damaged_files_of_a_run_are_named(
    name: str, content: bytes, message: str, value: dict[str, Any], out: Path
) -> None:
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(run_config(value), out, resume=True)


def test_a_file_in_the_place_of_the_snapshots_is_refused_before_the_work(value: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("{}", encoding="utf-8")
    (out / "snapshots").write_text("mine", encoding="utf-8")
    steps: list[Progress] = []
    with pytest.raises(ValueError, match=r"snapshots: expected a folder, but .*snapshots is a file"):
        run(run_config(value), out, progress=steps.append)
    assert not steps


@pytest.mark.parametrize("kind", ["file", "named pipe", "link to nowhere"])
def test_a_folder_that_cannot_be_one_is_refused(kind: str, value: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    if kind == "file":
        out.write_text("mine", encoding="utf-8")
    elif kind == "named pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = os.lstat(out)
    with pytest.raises(ValueError, match=r"run(: expected a folder, but | is in use and holds no run)"):
        run(run_config(value), out)
    assert os.lstat(out).st_mode == before.st_mode


def test_a_finished_run_without_its_measurements_is_named(value: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"held_out"' not in line), encoding="utf-8")
    with pytest.raises(ValueError, match="hold no measurement on held-out rows"):
        run_with_bar(run_config(value), tmp_path / "run", resume=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        run_with_bar(run_config(value), tmp_path / "run", resume=True)


# Models and data that cannot work, before anything is written ---------------------------------------------------------


def refused(value: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of `replacement train`, which must leave no folder behind."""
    settings = settings_file(folder / "settings.toml", value)
    assert main(["train", str(settings), "--out", str(folder / "run")]) == 2
    assert not (folder / "run").exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_model_that_cannot_be_linearised_is_refused(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**tiny.SIZES))
    model.save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    error = refused(training_runs.settings(tmp_path / "bert", tokens), tmp_path, capsys)
    assert "BertForMaskedLM cannot be linearised exactly" in error


def test_a_tokenizer_of_another_model_is_refused(
    model_folder: Callable[[str], Path], tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder("gpt2"), tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", pad_token="w110")
    tokenizer.save_pretrained(tmp_path / "model")
    error = refused(training_runs.settings(tmp_path / "model", tokens), tmp_path, capsys)
    assert "the tokenizer's pad token has the id 110" in error


def test_text_of_unknown_words_only_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "foreign.txt"
    text.write_text("lorem ipsum dolor sit amet " * 2000, encoding="utf-8")
    error = refused(training_runs.settings(model_folder("gpt2"), text), tmp_path, capsys)
    assert re.search(r"foreign\.txt: none of the first [\d,]+ tokens is a word that", error)


@pytest.mark.parametrize("wiring", ["autoencoder", "acausal", "model_diffing"])
def test_crosscoders_that_no_replacement_model_can_hold_are_trained(
    wiring: str, model_folder: Callable[[str], Path], tokens: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"crosscoder": {"wiring": wiring}}
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=2, **changes)
    if wiring == "model_diffing":
        value["model"] = [value["model"], str(model_folder("gemma2"))]
    assert run(run_config(value), tmp_path / "run").wiring.name == wiring
