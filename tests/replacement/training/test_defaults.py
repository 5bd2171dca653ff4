"""What a run chooses where its settings say nothing: values that fit each other, for any model, and are recorded."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch
import training_runs
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from replacement.data.activation_stream import ActivationStream
from replacement.data.token_sources import StoredRows
from replacement.training import command, pacing, snapshots
from replacement.training.command import run_with_bar, summary
from replacement.training.config import TrainingConfig
from replacement.training.defaults import default_context, default_learning_rate, fill_batches
from replacement.training.metrics_log import read_metrics
from replacement.training.run_config import read_config, run_config
from replacement.training.runs import Interrupted, run
from replacement.training.trainer import Progress
from replacement.validation.fidelity import measure_fidelity

RECIPES = sorted((Path(__file__).parents[3] / "examples" / "recipes").glob("*.toml"))
WEIGHTS = Path("crosscoder") / "crosscoder.safetensors"


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads 1,024 tokens; of four layers, because the demo's recipe has a k for each of four."""
    folder = tmp_path_factory.mktemp("models") / "long"
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, **tiny.GROUPED, "max_position_embeddings": 1024, "num_hidden_layers": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flat_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 token ids in one row."""
    path = tmp_path_factory.mktemp("data") / "flat.npy"
    np.save(path, np.random.default_rng(0).integers(3, tiny.VOCABULARY, 20_000, dtype=np.int64))
    return path


# Values that fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "batch", "context"),
    [(100, 100, 12), (40_000, 256, 32), (1_000_000, 1024, 128), (2_000_000, 2048, 256), (10**10, 4096, 512)],
)
def test_batch_and_context_follow_the_budget(n_tokens: int, batch: int, context: int) -> None:
    """A million tokens make 1,024 tokens a step and rows of 128, as measured to be good."""
    config = run_config({"training": {"n_tokens": n_tokens}})
    assert config.training.step_tokens == batch
    assert default_context(config) == context


def test_short_runs_take_larger_steps() -> None:
    """Twice as large for a thousand steps, as measured to be good: 4 times was worse, and so was 1."""
    rates = [
        default_learning_rate(TrainingConfig(n_tokens=n * 1024, batch_tokens=1024), 100)
        for n in (10, 1000, 4000, 10**6)
    ]
    assert rates == pytest.approx([0.02, 0.02, 0.01, 0.01])


@given(
    n_tokens=st.integers(10_000, 10**9),
    context=st.integers(2, 700),
    batch=st.none() | st.integers(1, 10_000),
    shards=st.none() | st.integers(1, 20),
    whole_rows=st.booleans(),
)
def test_what_is_chosen_makes_batches_or_says_what_would(
    n_tokens: int, context: int, batch: int | None, shards: int | None, whole_rows: bool
) -> None:
    reads = "propagated" if whole_rows else "clean"
    value: dict[str, Any] = {"training": {"n_tokens": n_tokens, "reads": reads}, "data": {}}
    value["training"] |= {} if batch is None else {"batch_tokens": batch}
    value["data"] |= {} if shards is None else {"shards": shards}
    refusal = ""
    try:
        config = fill_batches(run_config(value), context, whole_rows=whole_rows)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert batch is not None
        assert re.search(r"; set |is not a multiple of|is less than one batch", refusal), refusal
        return
    data, training = config.data, config.training
    assert (data.context, training.batch_tokens or batch) == (context, training.step_tokens)
    assert batch in (None, training.batch_tokens)
    assert shards in (None, data.shards)
    rows = torch.arange(8 * data.shards * context).view(-1, context)
    stream = ActivationStream(
        StoredRows(rows),
        lambda tokens: {},
        batch_tokens=training.step_tokens,
        buffer_tokens=data.buffer_tokens,
        shards=data.shards,
        seed=0,
    )
    if whole_rows:
        n_rows = len(next(stream.row_batches()).tokens_RT)
        assert n_rows == training.step_tokens // context
        assert batch is not None or n_rows >= 4
    assert (config.checkpoint_every or 0) >= 1


@pytest.mark.parametrize(
    ("batch", "context", "shards", "remedies"),
    [
        (
            2048,
            512,
            8,
            ["training.batch_tokens=4096", "data.context=256", "data.shards=4"],
        ),
        (256, 512, None, ["training.batch_tokens=512", "data.context=256"]),
        (4608, 512, 4, ["training.batch_tokens=4096", "data.shards=1"]),
    ],
)
def test_rows_that_fill_no_batch_are_refused_before_loading_and_every_remedy_works(
    batch: int, context: int, shards: int | None, remedies: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    shown = "" if shards is None else f"shards = {shards}"
    text = f"model = 'nowhere'\n[data]\ncontext = {context}\n{shown}\n[training]\nn_tokens = 100_000\nbatch_tokens = {batch}"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"batch_tokens={batch} hold {batch // context} rows of {context}") as caught:
        read_config(file)
    for remedy in remedies:
        assert remedy in str(caught.value)
        read_config(file, overrides=[remedy])
    assert read_config(file, overrides=["training.reads=clean"]).training.batch_tokens == batch


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_on_a_model_of_long_context(
    path: Path, long_context: Path, flat_tokens: Path, tmp_path: Path
) -> None:
    """Their batches of 2,048 tokens would hold 4 rows of the model's context, fewer than the shards."""
    model = str(long_context)
    if not isinstance(read_config(path).model, str):  # a recipe of several models, each named once
        copy = shutil.copytree(long_context, tmp_path / "copy")
        stored = load_file(copy / "model.safetensors")  # other weights, as if one were fine-tuned from the other
        save_file({name: 1.01 * value for name, value in stored.items()}, copy / "model.safetensors", {"format": "pt"})
        model = json.dumps([model, str(copy)])
    overrides = [f"model={model}", f"data.source={flat_tokens}", "data.held_out_rows=4"]
    config = read_config(path, overrides=[*overrides, "training.n_tokens=2048", "data.buffer_tokens=4096"])
    run(config, tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["context"] == 256


# Recorded values ------------------------------------------------------------------------------------------------------


def settings(model: Path, tokens: Path) -> dict[str, Any]:
    """Ten steps that name no batch, context, shards, step size or interval."""
    value = training_runs.settings(model, tokens)
    value["training"] = {"n_tokens": 2560}
    value["data"] = {"source": str(tokens), "held_out_rows": 4, "buffer_tokens": 2048}
    del value["checkpoint_every"]
    return value


def stop_after(step: int) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return show


def test_choices_are_recorded_and_kept_on_resume(long_context: Path, flat_tokens: Path, tmp_path: Path) -> None:
    value, out = settings(long_context, flat_tokens), tmp_path / "run"
    with pytest.raises(Interrupted):
        run(run_config(value), out, progress=stop_after(6))
    recorded = json.loads((out / "run.json").read_text(encoding="utf-8"))
    expected = {"batch_tokens": 256, "learning_rate": 2 * 0.1 / 8}
    assert {name: recorded["training"][name] for name in expected} == expected
    assert {name: recorded["data"][name] for name in ("context", "shards")} == {"context": 32, "shards": 8}
    assert (recorded["training"]["reads"], recorded["crosscoder"]["undecomposed_positions"]) == ("subset", 0)
    assert recorded["checkpoint_every"] == 10
    assert None not in {recorded["crosscoder"]["n_features"], recorded["checkpoint_every"]}
    run(run_config(value), out, resume=True)  # with the same file, which says none of it
    other = value | {"training": {"n_tokens": 2560, "batch_tokens": 128}}
    with pytest.raises(ValueError, match=r"holds a run with training\.batch_tokens=256, the settings say 128"):
        run(run_config(other), out, resume=True)
    explicit = {
        **value,
        "training": value["training"] | {"batch_tokens": 256, "learning_rate": expected["learning_rate"]},
    }
    explicit["data"] = value["data"] | {"context": 32, "shards": 8}
    run(run_config(explicit), tmp_path / "explicit")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "explicit" / WEIGHTS).read_bytes()


def test_a_run_of_an_earlier_version_goes_on_with_what_it_recorded(
    model_folder: Callable[[str], Path], flat_tokens: Path, tmp_path: Path
) -> None:
    """It left context, step size, reads and features open, and meant the model's context and 0.1 / sqrt(F)."""
    model, out = model_folder("llama"), tmp_path / "run"
    value = settings(model, flat_tokens)
    value["training"] |= {"batch_tokens": 256, "learning_rate": 0.1 / 8, "reads": "subset"}
    value["data"] |= {"context": tiny.CONTEXT, "shards": 8}
    value["checkpoint_every"] = 500
    run(run_config(value), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(run_config(value), out, progress=stop_after(6))
    recorded = json.loads((out / "run.json").read_text(encoding="utf-8"))
    for section, name in (("data", "context"), ("training", "learning_rate"), ("training", "reads")):
        recorded[section][name] = None
        del value[section][name]
    recorded["crosscoder"]["undecomposed_positions"] = None
    (out / "run.json").write_text(json.dumps(recorded), encoding="utf-8")
    run(run_config(value), out, resume=True)
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


# Snapshots by time ----------------------------------------------------------------------------------------------------


def test_a_killed_run_has_a_snapshot_of_every_two_minutes(
    long_context: Path, flat_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no measurement is due before the end, and bit for bit; here no time has to pass."""
    monkeypatch.setattr(pacing, "SNAPSHOT_SECONDS", 0.0)
    monkeypatch.setattr(pacing, "SAVING_SHARE", math.inf)

    def die(progress: Progress) -> None:
        if progress.step == 8:
            raise RuntimeError("killed")

    config = run_config(settings(long_context, flat_tokens))
    assert config.training.n_steps == 10
    with pytest.raises(RuntimeError, match="killed"):
        run(config, tmp_path / "killed", progress=die)
    assert snapshots.newest_step(tmp_path / "killed" / "snapshots") == 7
    monkeypatch.undo()
    run(config, tmp_path / "killed", resume=True)
    run(config, tmp_path / "whole")
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert [record["step"] for record in read_metrics(tmp_path / "killed", kind="held_out")] == [10]


def test_large_states_are_saved_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pacing, "perf_counter", lambda: now[0])
    clock = pacing.Clock(1, 0)
    now[0] = 119.0
    assert not clock.wants_snapshot()
    now[0] = 120.0
    assert clock.wants_snapshot()
    clock.save(lambda: now.__setitem__(0, 220.0))  # took 100 seconds
    now[0] += 1999
    assert not clock.wants_snapshot()
    now[0] += 1
    assert clock.wants_snapshot()


# What the bar and the summary say -------------------------------------------------------------------------------------


class Bar:
    """Stands in for tqdm and keeps its descriptions."""

    shown: ClassVar[list[str]] = []

    def __init__(self, *, total: int, desc: str, **options: Any) -> None:
        self.n, self.total = 0, total
        self.shown.append(desc)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def update(self, n: int) -> None:
        self.n += n

    def set_postfix(self, *arguments: object, **options: object) -> None:
        pass

    def set_description(self, text: str, **options: object) -> None:
        self.shown.append(text)


def test_the_bar_names_its_stages(
    long_context: Path, flat_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "tqdm", Bar)
    monkeypatch.setattr(Bar, "shown", [])
    facts = run_with_bar(run_config(settings(long_context, flat_tokens)), tmp_path / "run")
    stages = list(dict.fromkeys(text.split(",")[0] for text in Bar.shown))
    assert stages == ["load", "train", "measure held-out rows", "done"]
    assert Bar.shown[-2] == "measure held-out rows, 100%"
    rows = summary(facts).columns[1]._cells
    assert any("10 of 256 tokens in rows of 32, peak step size" in str(cell) for cell in rows)


# The threshold of BatchTopK -------------------------------------------------------------------------------------------


def test_a_short_batchtopk_run_ships_the_l0_it_was_asked_for(
    model_folder: Callable[[str], Path], language_model: Any, tmp_path: Path
) -> None:
    """Thirty steps; the running threshold of training, which lags behind, lets through far more or fewer."""
    tokens = training_runs.write_tokens(tmp_path / "tokens.npy", n_rows=400)
    activation = {"activation": {"name": "batchtopk", "k": 4}, "n_features": 256}
    value = training_runs.settings(model_folder("gpt2"), tokens, crosscoder=activation)
    steps: list[Progress] = []
    crosscoder = run(run_config(value), tmp_path / "run", progress=steps.append)
    assert steps[-1].step == 30
    rows_RT = torch.from_numpy(np.load(tokens))[: value["data"]["held_out_rows"]]
    keep_RT = (rows_RT != 1) & (torch.arange(rows_RT.shape[1]) > 0)
    shipped = measure_fidelity(language_model("gpt2"), crosscoder, rows_RT, keep_RT=keep_RT)
    assert shipped.total_l0 == pytest.approx(4 * 3, rel=0.1)
    assert read_metrics(tmp_path / "run", kind="held_out")[-1]["l0_total"] == pytest.approx(shipped.total_l0)
