"""Recipes fit the demo model, and the examples that compare crosscoders run on tiny budgets."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replacement.training.build import Models, build_crosscoder, load_models
from replacement.training.penalties import Tanh
from replacement.training.run_config import read_config

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.toml"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`example(name)`: a script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def demo() -> Models:
    """The demo model."""
    return load_models("demo")


@pytest.fixture
def data(example: Any, demo: Models, tmp_path: Path) -> Any:
    """`data(sites)`: two batches' worth of activations."""

    def build(sites: Any) -> Any:
        module = example("demo_activations")
        return module.DemoActivations(
            tmp_path / "data", demo.first, sites, n_tokens=2048, held_out_rows=4, buffer_tokens=2048
        )

    return build


def test_there_are_recipes_of_every_family() -> None:
    wirings = {read_config(path).crosscoder.wiring for path in RECIPES}
    families = {"autoencoder", "transcoder", "per_layer", "strictly_causal", "weakly_causal", "acausal", "attention"}
    assert wirings == families | {"joint", "lorsa", "model_diffing", "adapter"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_demo(path: Path, demo: Models) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) < 25
    config = read_config(path)
    models = demo if isinstance(config.model, str) else Models(demo.all * len(config.model))
    if config.crosscoder.wiring == "adapter":
        models = Models((demo.first.with_base(tiny.base_of(demo.first)),))
    crosscoder = build_crosscoder(config.crosscoder, models, torch.zeros(1, 4, dtype=torch.int64), seed=0)
    assert crosscoder.wiring.n_models == len(models.all)
    crosscoder.wiring.check_fits(demo.first)
    assert crosscoder.undecomposed_positions == 0


def test_a_recipe_is_trained_once_and_becomes_a_row(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = example("recipes")
    assert "demo" not in recipes.recipes()
    settings = ["training.n_tokens=1024", "training.batch_tokens=512", "data.buffer_tokens=2048"]
    settings += ["data.held_out_rows=2", "crosscoder.n_features=24"]
    rows = [recipes.train_recipe("plt", tmp_path / "plt", overrides=settings) for _ in range(2)]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match=r"holds a run with training\.n_tokens=1024, the settings say 1536"):
        recipes.train_recipe("plt", tmp_path / "plt", overrides=[*settings, "training.n_tokens=1536"])
    assert rows[0]["features"] == 4 * 24
    assert rows[0]["L0"] == pytest.approx(32, abs=1)
    recipes.print_table({"plt": rows[0], "none": {**rows[0], "KL": None}})
    header, plt, none = capsys.readouterr().out.splitlines()
    assert len(header) == len(plt) == len(none)
    assert f"{rows[0]['unexplained']:.4f}" in plt


def test_joint_training_compares_equal_budgets(
    example: Any, demo: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, table = example("joint_training"), []
    settings = ["training.n_tokens=3584", "training.batch_tokens=512", "data.buffer_tokens=2048"]
    settings += ["data.held_out_rows=2", "crosscoder.n_features=24"]
    for choice in module.CHOICES:
        parts = module.train(choice, tmp_path, settings)
        assert [part.wiring.name for part in parts] == ["strictly_causal", "attention"]
        assert [part.activation.k for part in parts] == [(16, 8, 4, 4), (8, 8, 8, 8)]
        table.append({"name": choice, **module.measure(demo.first, parts, 4), "CPU s": 1.0})
        assert table[-1]["sum"] == pytest.approx(table[-1]["KL MLPs"] + table[-1]["KL attention"])
    assert len({row["KL both"] for row in table}) == len(table)
    module.print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line.rstrip()) for line in lines[: 1 + len(table)]}) == 1
    assert [line.split(":")[0] for line in lines[1 + len(table) :]] == list(module.CHOICES[1:])


def test_result_rows_grow_and_are_found(example: Any, tmp_path: Path) -> None:
    module, path = example("result_rows"), tmp_path / "new" / "results.json"
    assert module.read_rows(path) == []
    for level in (1, 2):
        module.append_row(path, {"name": "a", "level": level, "value": level / 3})
    assert module.find_row(path, name="a", level=2)["value"] == 2 / 3
    assert module.find_row(path, name="b", level=2) is None
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "name", ["CLT", "tied CLT", "skip PLT", "CLT BatchTopK", "CLT JumpReLU", "random CLT", "neurons"]
)
def test_frontier_runs_every_kind_of_method(
    name: str, example: Any, demo: Models, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontier, lm = example("frontier"), demo.first
    monkeypatch.setattr(frontier, "N_FEATURES", 32)
    monkeypatch.setattr(frontier, "BATCH_TOKENS", 512)
    sites = [*frontier.Wiring.per_layer(lm, read="mlp_in").read_sites, *frontier.Wiring.per_layer(lm).write_sites]
    row = frontier.train_and_measure(name, 16, 0, 1024, lm, data(sites))
    assert {"l0", "unexplained", "kl", "agreement_all"} <= set(row)
    assert row["unexplained"] > 0
    # Few of so few features are positive with random decoders; BatchTopK and JumpReLU do not count per row.
    if name in ("CLT", "tied CLT", "skip PLT", "neurons"):
        assert row["l0"] == pytest.approx(16, abs=0.5)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slope=st.floats(0.6, 2.0),
    scale=st.floats(4.0, 1000.0),
    bend=st.floats(0.0, 0.1),
    level=st.sampled_from([16, 32, 64]),
)
def test_penalties_are_found_in_a_few_runs(example: Any, slope: float, scale: float, bend: float, level: int) -> None:
    """L0 that falls as a power of the coefficient, with some curvature, over hundredfold ranges."""
    module, runs = example("penalty_search"), []

    def run(c: float) -> float:
        runs.append((c, scale * c ** -(slope + bend * math.tanh(math.log(c)))))
        return runs[-1][1]

    best = module.search(run, level=level, first=1.0)
    assert len(runs) <= module.MOST_RUNS
    nearest = min(abs(math.log(l0 / level)) for _, l0 in runs)
    assert abs(math.log(dict(runs)[best] / level)) == nearest
    assert nearest < 0.06
    n_runs = len(runs)
    assert module.search(run, level=level, first=1.0, known=runs) == best  # nothing is run twice
    assert len(runs) == n_runs


def test_a_search_goes_by_the_nearest_runs(example: Any) -> None:
    next_coefficient = example("penalty_search").next_coefficient
    assert next_coefficient([(1.0, 32.0)], 16) == pytest.approx(2.0)
    assert next_coefficient([(1.0, 64.0), (4.0, 4.0)], 16) == pytest.approx(2.0)
    assert next_coefficient([(1.0, 400.0), (2.0, 100.0)], 25) == pytest.approx(4.0)  # past both, by their slope
    assert next_coefficient([(1.0, 1e6)], 16) == pytest.approx(8.0)  # no leap into the dark
    assert next_coefficient([(1.0, 0.0)], 16) == pytest.approx(1 / 8)


def test_frozen_decoders_stay_and_their_encoders_learn(example: Any, demo: Models, data: Any) -> None:
    frontier, lm = example("frontier"), demo.first
    sites = [*frontier.Wiring.per_layer(lm, read="mlp_in").read_sites, *frontier.Wiring.per_layer(lm).write_sites]
    batches = data(sites)
    config = frontier.TrainingConfig(n_tokens=1024, batch_tokens=512, losses=[])
    trainer = frontier.new_trainer(frontier.METHODS["random CLT"], lm, batches, config, 4)
    before = {name: value.clone() for name, value in trainer.crosscoder.state_dict().items()}
    assert before["W_dec.0"].norm(dim=-1).flatten().tolist() == pytest.approx([1.0] * (1024 * 4))
    for batch in batches.batches(2, batch_tokens=512):
        trainer.step(batch)
    after = trainer.crosscoder.state_dict()
    assert all(torch.equal(before[name], after[name]) == name.startswith("W_dec") for name in before)


def test_the_order_of_the_runs(example: Any) -> None:
    frontier = example("frontier")
    runs = frontier.runs()
    assert len(runs) == len(set(runs)) == 3 * (len(frontier.METHODS) + 1) + 3 * 4
    assert [run[0] for run in runs[3:9]] == ["CLT"] * 3 + ["PLT"] * 3
    assert {run for run in runs if run[2] > 0} == {
        (n, v, s) for n in ("CLT", "PLT") for v in (16, 32, 64) for s in (1, 2)
    }
    assert frontier.runs(["PLT"], [16], 1) == [("PLT", 16, 0)]


def test_searches_are_kept_and_go_on(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frontier, runs = example("frontier"), []

    def train(*_: object, penalty: float) -> dict[str, float]:
        runs.append(penalty)
        return {"l0": 64 / penalty, "kl": penalty}

    monkeypatch.setattr(frontier, "train_and_measure", train)
    arguments = ("CLT ReLU + L1", 32, 0, 100, None, None, tmp_path / "searches.json")
    found = frontier.search_and_measure(*arguments)
    assert runs == [1.0, pytest.approx(2.0)]
    assert (found["l0"], found["penalty"]) == (pytest.approx(32), pytest.approx(2.0))
    assert frontier.search_and_measure(*arguments) == found
    assert len(runs) == 2
    method = frontier.METHODS["CLT JumpReLU"]
    tanh, pull = frontier._losses(method, 3.0)
    assert tanh == Tanh(3e-3)
    assert pull == method.losses[1]


def test_all_neurons_are_the_demo_itself(example: Any, demo: Models) -> None:
    neurons = example("frontier_neurons")
    rows_RT = torch.arange(3, 35).view(2, 16)
    everything = neurons.measure_neurons(demo.first, rows_RT, 512)
    assert everything["unexplained"] < 1e-10
    assert everything["kl"] < 1e-8
    assert everything["agreement_all"] == 1.0


def test_the_frontier_is_drawn(example: Any, tmp_path: Path) -> None:
    plot = example("frontier_plot")
    row = {"name": "CLT", "level": 16, "l0": 16.0, "unexplained": 0.1, "kl": 0.2, "agreement_all": 0.9}
    plot.draw([{**row, "seed": 0}, {**row, "seed": 1, "unexplained": 0.2}], tmp_path / "frontier")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert "<path" in (tmp_path / "frontier.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no results"):
        plot.draw([], tmp_path / "frontier")


def test_acausal_against_saes(example: Any, demo: Models, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, lm = example("acausal_against_saes"), demo.first
    batches = data(module.Wiring.acausal(lm).read_sites)
    for kind in (module.SAES, module.CROSSCODER):
        row = module.train_and_measure((kind, 64, 8), 1024, lm, batches)
        assert row["l0"] == pytest.approx(8, abs=0.5)
        assert len(row["unexplained_by_layer"]) == 4
    with pytest.raises(ValueError, match="63 features and 8 active ones do not divide into 4 layers"):
        module.train_and_measure((module.SAES, 63, 8), 1024, lm, batches)
    # Losses 1/size for the autoencoders and 1/(3 size) for the crosscoder: a factor of 3 wherever both have points.
    found = {run: {"unexplained": 1 / run[1]} for run in module.size_sweep(module.SAES)}
    found |= {run: {"unexplained": 1 / (3 * run[1])} for run in module.size_sweep(module.CROSSCODER)}
    sweeps = {kind: module.size_sweep(kind) for kind in (module.SAES, module.CROSSCODER)}
    assert module.print_sweep("title", "features", found, sweeps) == pytest.approx([3.0] * 3)
    assert "768: 3.00 times as many" in capsys.readouterr().out
    assert module.needed([(1, 0.5), (2, 0.6), (4, 0.1)], 0.3) is None


def test_fine_tuning_text_is_new_and_old(example: Any, demo: Models) -> None:
    module = example("fine_tune_demo")
    sentences = {" ".join(sentence) for sentence in module.new_sentences()}
    assert "today the capital of Texas is TX ." in sentences
    assert "today the code of the state containing Houston is Austin ." in sentences
    assert not any("Dallas" in sentence for sentence in sentences)  # held out of everything the demo model was asked
    assert "the capital of Texas is Austin ." in {" ".join(sentence) for sentence in module.old_sentences()}
    tokenizer = demo.first.tokenizer
    rows_RT = module.rows_of(tokenizer, n_rows=4, context=64, seed=0, new_share=1.0)
    assert rows_RT.shape == (4, 64)
    assert int((rows_RT == tokenizer.encode("today", add_special_tokens=False)[0]).sum()) >= 4 * 4
    assert not bool((rows_RT == tokenizer.unk_token_id).any())
    options = {"n_rows": 4, "context": 64, "seed": 3}
    assert torch.equal(module.rows_of(tokenizer, **options), module.rows_of(tokenizer, **options))


def test_model_diffing(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("model_diffing")
    losses = module.fine_tune(tmp_path / "fine_tuned", steps=2, batch_rows=2)
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    models = load_models(["demo", str(tmp_path / "fine_tuned")])
    assert models.first.fingerprint != models.all[1].fingerprint
    rows = []
    for name in module.METHODS:
        crosscoder = module.train(name, tmp_path, n_tokens=1024, n_features=24, held_out_rows=2)
        rows.append(module.compare(name, crosscoder, models, n_rows=4))
        assert rows[-1]["look exclusive"] >= rows[-1]["truly exclusive"]
        assert len(rows[-1]["norms"]) == rows[-1]["features that fire"] > 0
        with pytest.raises(ValueError, match=r"holds a run with crosscoder\.n_features=24, the settings say 32"):
            module.train(name, tmp_path, n_tokens=1024, n_features=32, held_out_rows=2)
    module.print_comparison(rows)
    assert "truly exclusive" in capsys.readouterr().out
    module.draw(rows, tmp_path / "plot")
    assert (tmp_path / "plot.svg").exists()


def test_jacobian_matching_measures_a_run(
    example: Any, tmp_path: Path, demo: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with an override of the demo's recipe, measured as `circuits validate` does."""
    module = example("jacobian_matching")
    small = ["training.batch_tokens=512", "data.buffer_tokens=2048", "data.held_out_rows=2", "crosscoder.n_features=64"]
    # So short a run leaves few features that fire on the prompt: samples are far apart, and 2 of 64 are little.
    small += ['crosscoder.start="random"', 'crosscoder.activation={name="batchtopk", k=[19, 7, 7, 7]}']
    read = module.read_config
    monkeypatch.setattr(module, "read_config", lambda path, overrides: read(path, overrides=[*overrides, *small]))
    folder = module.train(0.1, tmp_path, 1024)
    assert folder == tmp_path / "0.1" / "crosscoder"
    row = module.measure(demo.first, folder, ["the capital of the state containing Dallas is"], n_rows=4)
    figures = ("unexplained", "KL", "encoder", "random", "upstream", "among features", "one layer", "ablation")
    assert tuple(row) == figures
    assert all(-1 <= row[name] <= 1 for name in figures[2:])


def test_reads_while_training_are_compared(
    example: Any, tmp_path: Path, demo: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("read_modes")
    small = ["training.batch_tokens=512", "data.buffer_tokens=2048", "data.held_out_rows=2", "crosscoder.n_features=64"]
    read = module.read_config
    monkeypatch.setattr(module, "read_config", lambda path, overrides: read(path, overrides=[*overrides, *small]))
    monkeypatch.setattr(module, "HELD_OUT_ROWS", 4)
    row = module.train_and_measure("clean", tmp_path, 1024, demo.first)
    kinds = ("clean", "propagated", "single_layer")
    assert list(row) == ["unexplained", *(f"kl_{kind}" for kind in kinds), *(f"loss_{kind}" for kind in kinds)]
    assert row["kl_single_layer"] < row["kl_clean"]
