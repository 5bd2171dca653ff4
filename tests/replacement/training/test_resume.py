"""A run that is killed, stopped or resumed ends with the weights of one that never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs
from safetensors.torch import load_file, save_file

from replacement.training.metrics_log import read_metrics
from replacement.training.run_config import run_config
from replacement.training.runs import Interrupted, run
from replacement.training.trainer import Progress

WEIGHTS = Path("crosscoder") / "crosscoder.safetensors"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.write_tokens(tmp_path_factory.mktemp("data") / "tokens.npy")


def stop_after(step: int) -> Callable[[Progress], None]:
    """Ask this process to stop once a step is done."""

    def show(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return show


@pytest.mark.parametrize("reads", ["clean", "subset"])
def test_a_stopped_run_resumes_bit_for_bit(
    reads: str, tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stopped between two checkpoints, in both kinds of data order."""
    config = run_config(training_runs.settings(model_folder("gpt2"), tokens, training={"reads": reads}))
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after 13 of 30 steps; go on with --resume"):
        run(config, tmp_path / "stopped", progress=stop_after(13))
    assert not (tmp_path / "stopped" / "crosscoder").exists()
    run(config, tmp_path / "stopped", resume=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "stopped" / WEIGHTS).read_bytes()
    whole, stopped = (read_metrics(tmp_path / name) for name in ("whole", "stopped"))
    for records in (whole, stopped):
        for record in records:
            record.pop("tokens_per_second", None)
    assert whole == stopped


def test_a_run_killed_at_any_moment_resumes_bit_for_bit(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """SIGKILL at random moments, most of them while a checkpoint is being written: with one after every second step
    and a tiny model the run does little else."""
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=40) | {"checkpoint_every": 2}
    run(run_config(value), tmp_path / "whole")
    out, moments = tmp_path / "killed", random.Random(0)
    begin, go_on = (
        training_runs.command([{"config": value, "out": str(out), "resume": resume}], tmp_path)
        for resume in (False, True)
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(__import__("torch").get_num_threads())}
    n_killed = 0
    for goal, arguments in ((4, begin), (14, go_on), (24, go_on)):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        while process.poll() is None and not _has_snapshot(out, goal):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert n_killed == 3
    assert not (out / "crosscoder").exists()
    subprocess.run(go_on, check=True, env=environment, capture_output=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    assert [r["step"] for r in read_metrics(out, kind="held_out")] == list(range(2, 41, 2))


def _has_snapshot(out: Path, step: int) -> bool:
    return any((out / "snapshots" / f"step-{s:08d}").exists() for s in (step, step + 2, step + 4))


def test_a_finished_run_is_only_read(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its model or data, and with the settings it was finished with."""
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=3)
    crosscoder = run(run_config(value), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    def load_models(*arguments: object, **options: object) -> None:
        raise AssertionError("a finished run needs no model")

    monkeypatch.setattr(sys.modules[run.__module__], "load_models", load_models)
    again = run(run_config(value), tmp_path / "run", resume=True)
    for name, tensor in crosscoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not again.training
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    other = training_runs.settings(model_folder("gpt2"), tokens, n_steps=3, training={"seed": 7})
    with pytest.raises(ValueError, match=r"holds a run with training\.seed=0, the settings say 7"):
        run(run_config(other), tmp_path / "run", resume=True)


def change(file: Path, name: str) -> None:
    """Other weights, or other tokens, in a file of the same name and size."""
    if name == "data":
        rows_RT = np.load(file)
        rows_RT[150, 7] += 1
        np.save(file, rows_RT)
    else:
        tensors = load_file(file)
        first = min(tensors)
        save_file({**tensors, first: tensors[first] * 1.5}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["data", "model"])
def test_other_inputs_of_the_same_name_are_refused(
    name: str, tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model, data = tmp_path / "model", tmp_path / "tokens.npy"
    shutil.copytree(model_folder("gpt2"), model)
    shutil.copy(tokens, data)
    file = data if name == "data" else model / "model.safetensors"
    shutil.copy(file, tmp_path / "original")
    config, out = run_config(training_runs.settings(model, data, n_steps=10)), tmp_path / "run"
    with pytest.raises(Interrupted):
        run(config, out, progress=stop_after(6))
    change(file, name)
    called = f"the data {data}" if name == "data" else f"the model {model}"
    with pytest.raises(ValueError, match=re.escape(f"{called} is not what it was when the run in {out} began")):
        run(config, out, resume=True)
    assert not (out / "crosscoder").exists()
    shutil.copy(tmp_path / "original", file)
    run(config, out, resume=True)
    assert (out / "crosscoder").exists()


def test_fingerprints_are_those_of_the_run_that_has_begun(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A run without a checkpoint has not; one from before there were fingerprints goes on."""
    data, out = tmp_path / "tokens.npy", tmp_path / "run"
    shutil.copy(tokens, data)
    config = run_config(training_runs.settings(model_folder("gpt2"), data, n_steps=10))

    def fail(progress: Progress) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(config, out, progress=fail)
    before = (out / "inputs.json").read_text(encoding="utf-8")
    change(data, "data")
    with pytest.raises(Interrupted):
        run(config, out, progress=stop_after(6))
    assert (out / "inputs.json").read_text(encoding="utf-8") != before
    (out / "inputs.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"inputs\.json is damaged: expected a JSON object, got list"):
        run(config, out, resume=True)
    (out / "inputs.json").unlink()
    run(config, out, resume=True)
    assert (out / "crosscoder").exists()


def test_folders_in_use_and_other_settings_are_refused(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=2)
    run(run_config(value), tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run: choose another folder, or go on with it by --resume"):
        run(run_config(value), tmp_path / "run")
    other = training_runs.settings(model_folder("gpt2"), tokens, n_steps=2, training={"seed": 7})
    with pytest.raises(ValueError, match=r"holds a run with training\.seed=0, the settings say 7"):
        run(run_config(other), tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="is in use and holds no run"):
        run(run_config(value), tmp_path / "other")


def test_processes_started_again_by_torchrun_resume(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is there to say --resume after an elastic restart."""
    config = run_config(training_runs.settings(model_folder("gpt2"), tokens, n_steps=10))
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", progress=stop_after(6))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(config, tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_damaged_checkpoint_is_named(tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = run_config(training_runs.settings(model_folder("gpt2"), tokens, n_steps=10))
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", progress=stop_after(6))
    (file,) = (tmp_path / "run" / "snapshots" / "step-00000006").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=re.escape("step-00000006 is damaged or of another run")):
        run(config, tmp_path / "run", resume=True)
