"""The demo as it ships: small, loadable, and as good as its shipped tables say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import replacement
from replacement.console import show
from replacement.demo.corpus import held_out_rows
from replacement.demo.families import FAMILIES
from replacement.demo.page import page
from replacement.demo.report import measure_demo
from replacement.loading import ARTIFACTS
from replacement.validation.fidelity import measure_fidelity

TARGET = 0.98
NO_TARGET = {"two-hop, held-out states"}


@pytest.fixture(scope="module")
def model() -> replacement.ReplacementModel:
    """The shipped replacement model."""
    return replacement.load("demo")


@pytest.fixture(scope="module")
def measured(model: replacement.ReplacementModel) -> dict[str, Any]:
    """Measured now, on fewer rows than the shipped table."""
    families = [family for family in FAMILIES if family.name in ("state", "inside a question")]
    return measure_demo(n_rows=128, model=model, families=families)


def shipped(name: str) -> dict[str, Any]:
    """One of the tables that ship with the weights."""
    return json.loads((ARTIFACTS / name).read_text(encoding="utf-8"))


def test_artifacts_are_small_and_hold_no_pickle() -> None:
    files = [path for path in Path(ARTIFACTS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".sqlite"}


def test_errors_kept_give_the_original_logits(model: replacement.ReplacementModel) -> None:
    tokens = model.language_model.tokenize("the capital of the state containing Dallas is")
    torch.testing.assert_close(model(tokens, errors="keep"), model.language_model(tokens), rtol=0, atol=1e-5)


def test_accuracy_is_that_of_the_shipped_table(measured: dict[str, Any]) -> None:
    table = {row["name"]: row for row in shipped("accuracy.json")["behaviours"]}
    for row in measured["behaviours"]:
        assert row["top1"] == pytest.approx(table[row["name"]]["top1"], abs=0.01)
        assert row["top1"] >= TARGET or row["name"] in NO_TARGET


def test_fidelity_is_that_of_the_shipped_table(measured: dict[str, Any]) -> None:
    now, table = measured["fidelity"], shipped("fidelity.json")
    assert now["total_l0"] <= 16
    assert now["mean_unexplained"] <= 0.05
    assert now["kl"] <= 0.02
    assert now["agreement"] >= 0.98
    assert now["mean_unexplained"] == pytest.approx(table["mean_unexplained"], rel=0.2)
    assert now["kl"] == pytest.approx(table["kl"], rel=0.5)


def test_the_shipped_table_of_circuits_belongs_to_the_weights(measured: dict[str, Any]) -> None:
    assert measured["circuits"] == shipped("circuits.json")


def test_the_replacement_model_keeps_the_behaviours(measured: dict[str, Any]) -> None:
    for row in measured["behaviours"]:
        assert row["replacement_top1"] >= 0.95 * row["top1"] or row["name"] in NO_TARGET


def test_feature_families_are_measured_and_shown(measured: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for row in measured["families"]:
        assert 0 < row["f1"] <= 1
        assert 0 <= row["good_concepts"] <= row["concepts"] == len(row["features"])
        assert row["swaps"]["pairs"] == 40
        assert row["ablations"]["right_none"] == 1.0
    show(page(measured))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:3] == ["inside", "a", "question"] for line in lines) == 2
    assert any(line.split()[:2] == ["Dallas,", "pruned"] for line in lines)


def test_one_feature_of_a_state_decides_the_answer(measured: dict[str, Any]) -> None:
    """On the judging probes: it detects its state, and the original model answers as it says."""
    row = next(row for row in measured["families"] if row["name"] == "state")
    assert row["f1"] >= 0.95
    assert row["good_concepts"] >= 46
    assert row["swaps"]["best_feature"] >= 0.8
    assert measured["circuits"]["through_state_features"]["best_feature"] >= 0.5


@pytest.fixture(scope="module")
def complete() -> replacement.ReplacementModel:
    """The shipped replacement model with attention replaced too."""
    return replacement.load("demo", attention_crosscoder="demo")


def test_everything_replaced_with_errors_kept_gives_the_original_logits(complete: replacement.ReplacementModel) -> None:
    tokens = complete.language_model.tokenize("the capital of the state containing Dallas is")
    for patterns in ("live", "frozen"):
        kept = complete(tokens, errors="keep", patterns=patterns)
        torch.testing.assert_close(kept, complete.language_model(tokens), rtol=0, atol=1e-5)
    assert complete.language_model.token_strings([int(complete(tokens)[-1].argmax())]) == ["Austin"]


def test_attention_is_as_faithful_as_its_shipped_table(complete: replacement.ReplacementModel) -> None:
    lm = complete.language_model
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=48, context=lm.context_length, seed=0))
    table, mlps, attention = shipped("attention_fidelity.json"), complete.crosscoder, complete.attention_crosscoder
    assert attention is not None
    for crosscoders, written in (([attention], table), ([mlps, attention], table["both"])):
        measured = measure_fidelity(lm, crosscoders, rows)
        assert measured.total_l0 == pytest.approx(written["total_l0"], rel=0.05)
        assert measured.mean_unexplained == pytest.approx(written["mean_unexplained"], rel=0.2)
        assert measured.kl == pytest.approx(written["kl"], rel=0.5)
        assert measured.kl is not None
        assert measured.kl <= 0.04


def test_a_wrong_attention_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing does not exist: expected the folder of a crosscoder"):
        replacement.load("demo", attention_crosscoder=tmp_path / "missing")
    mlps = ARTIFACTS / "crosscoder"
    with pytest.raises(
        ValueError, match=r"attention needs a crosscoder that writes attn_out sites, this one writes mlp"
    ):
        replacement.load("demo", attention_crosscoder=mlps)


def test_unknown_words_are_named(model: replacement.ReplacementModel) -> None:
    with pytest.raises(ValueError, match="does not know 'Paris'"):
        model.language_model.tokenize("the capital of the state containing Paris is")
