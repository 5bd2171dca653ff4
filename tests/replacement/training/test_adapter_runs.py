"""Adapters from settings to graph: training on two models, and every command that takes the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import training_runs

import replacement
from circuits import CircuitGraph
from circuits.cli import main as circuits_main
from replacement.cli import main as replacement_main
from replacement.training.metrics_log import read_metrics
from replacement.training.run_config import run_config
from replacement.training.runs import run


@pytest.fixture(scope="module")
def models(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a fine-tuned model, its base, a base in which layer 1 is the same, and an unrelated one."""
    folder, fine_tuned = tmp_path_factory.mktemp("bases"), model_folder("gpt2")
    return {
        "fine_tuned": str(fine_tuned),
        "base": str(tiny.write_base(fine_tuned, folder / "base")),
        "partly": str(tiny.write_base(fine_tuned, folder / "partly", layers=(0, 2))),
        "unrelated": str(model_folder("llama")),
    }


def settings(names: list[str], tokens: Path, **crosscoder: Any) -> dict[str, Any]:
    value = training_runs.settings(Path(), tokens, n_steps=30, crosscoder={"wiring": "adapter", **crosscoder})
    losses = [{"name": "l1", "coefficient": 1e-3}, {"name": "output_kl", "coefficient": 0.1}]
    return value | {"model": names, "training": value["training"] | {"losses": losses}}


@pytest.fixture(scope="module")
def trained(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, beside its tokens, `tokens.npy`."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    tokens = training_runs.write_tokens(folder.parent / "tokens.npy")
    run(run_config(settings([models["fine_tuned"], models["base"]], tokens)), folder)
    return folder


def test_a_run_learns_the_difference_and_records_both_models(models: dict[str, str], trained: Path) -> None:
    records = [record for record in read_metrics(trained) if record["kind"] == "held_out"]
    assert set(records[0]["unexplained"]) == {f"mlp_difference.{layer}" for layer in range(3)}
    assert sum(records[-1]["unexplained"].values()) < 0.9 * sum(records[0]["unexplained"].values())
    # Zeroed sites are the base model's MLPs: what remains of their loss is recovered by features.
    assert records[-1]["kl"] < records[0]["kl"]
    assert {"l1", "output_kl"} <= set(read_metrics(trained)[0]["terms"])
    model = replacement.load(models["fine_tuned"], crosscoder=trained, base=models["base"])
    base = model.language_model.base
    assert base is not None
    assert (model.crosscoder.base_name, model.crosscoder.base_fingerprint) == (base.name, base.fingerprint)
    assert model.loaded_from == {
        "model": models["fine_tuned"],
        "crosscoder": str(trained),
        "base": models["base"],
    }
    inputs = json.loads((trained / "inputs.json").read_text(encoding="utf-8"))
    assert {f"the model {models[name]}" for name in ("fine_tuned", "base")} <= set(inputs)


def test_the_commands_take_an_adapter(
    models: dict[str, str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", models["fine_tuned"], "--crosscoder", str(trained)]
    with_base = [*options, "--base", models["base"]]
    assert circuits_main(["trace", "w5 w6 w7 w8", *with_base, "--out", str(tmp_path / "circuit")]) == 0
    graph = CircuitGraph.load(tmp_path / "circuit" / "circuit.safetensors")
    assert graph.metadata["loaded_from"]["base"] == models["base"]
    assert graph.identity_error is not None
    assert graph.identity_error <= 1e-4
    capsys.readouterr()
    measuring = ["show", str(trained), "--data", str(trained.parent / "tokens.npy"), "--tokens", "256"]
    assert replacement_main([*measuring, "--model", models["fine_tuned"], "--base", models["base"]]) == 0
    assert "base model" in capsys.readouterr().out
    validating = ["validate", "--data", str(trained.parent / "tokens.npy"), "--tokens", "512", "--json"]
    assert replacement_main([*validating, *with_base]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in facts["controls"]] == ["this crosscoder", "random encoder", "oracle dictionary"]
    assert facts["protocols"]["errors kept"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert facts["protocols"]["zero"]["kl"]["mean"] > facts["protocols"]["propagated"]["kl"]["mean"] > 0
    for arguments, message in (
        (
            options,
            f"this adapter adds to the MLPs of the base model '{Path(models['base']).name}': give the base model",
        ),
        ([*options, "--base", models["partly"]], "this crosscoder was trained on another base model: on 'base' with"),
        ([*options, "--base", models["unrelated"]], "expected a base model of the fine-tuned model's kind"),
        ([*options, "--base", ""], "base: expected a name or folder, given ''"),
    ):
        assert circuits_main(["trace", "w5 w6 w7 w8", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert replacement_main([*validating, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_runs_that_cannot_work_are_refused(models: dict[str, str], trained: Path, tmp_path: Path) -> None:
    tokens, fine_tuned = trained.parent / "tokens.npy", models["fine_tuned"]
    mistakes = [
        (settings([fine_tuned], tokens), r"the wiring adapter needs two models, .*; got 1"),
        (settings([fine_tuned, models["unrelated"]], tokens), "expected a base model of the fine-tuned model's kind"),
        (settings([fine_tuned, fine_tuned], tokens), "is named twice: expected different models"),
        (
            settings([fine_tuned, models["partly"]], tokens),
            r"the MLP of layer 1 is the same in both models, .*: set crosscoder.layers=\[0, 2\]",
        ),
    ]
    for value, message in mistakes:
        with pytest.raises(ValueError, match=message):
            run(run_config(value), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("wiring", ["adapter", "cross_layer_adapter"])
def test_layers_that_stayed_the_same_are_left_out(
    models: dict[str, str], trained: Path, tmp_path: Path, wiring: str
) -> None:
    value = settings(
        [models["fine_tuned"], models["partly"]], trained.parent / "tokens.npy", wiring=wiring, layers=[0, 2]
    )
    value["training"]["n_tokens"] = 256
    adapter = run(run_config(value), tmp_path / "run")
    writes = [[site.layer for site in sites] for sites in adapter.wiring.writes]
    assert writes == ([[0], [2]] if wiring == "adapter" else [[0, 2], [2]])
