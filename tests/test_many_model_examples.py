"""The examples over several small language models, at sizes at which nothing is learned."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {"n_tokens": 1024, "n_features": 32, "n_rows": 8}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`example(name)`: a script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    return importlib.import_module


@pytest.fixture
def small(example: Any) -> Any:
    """A language model that is trained in no time."""
    return example("train_demo").LanguageModelRun(n_layers=2, d_model=16, n_heads=2, steps=8, compile=False)


def test_births_of_features_are_told_and_drawn(
    example: Any, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, files = example("feature_birth"), example("train_demo_files")
    assert files.snapshot_steps(3000, 10) == [0, 12, 23, 47, 94, 188, 375, 750, 1500, 3000]
    with pytest.raises(ValueError, match="100 steps are too few for 10 snapshots: expected 256"):
        files.snapshot_steps(100, 10)
    result = module.run_all(small, tmp_path, **SIZES, n_snapshots=4)
    assert [row["step"] for row in result["rows"]] == [0, 2, 4, 8]
    # A feature is alive in a snapshot if it was born by then and has not died.
    counts = [(row["born"], row["died"], row["alive"]) for row in result["rows"]]
    assert sum(born for born, _, _ in counts) == result["features"] == len(result["norms"])
    for place, (_, _, alive) in enumerate(counts):
        assert alive == sum(born - died for born, died, _ in counts[: place + 1])
    assert result["rows"][3]["loss"] < result["rows"][0]["loss"]
    module.print_table(result)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == result
    assert (tmp_path / "feature_birth.svg").exists()
    # What is finished is kept.
    monkeypatch.setattr(module, "train_language_model", None)
    assert module.run_all(small, tmp_path, **SIZES, n_snapshots=4) == result


def test_wider_models_are_compared(
    example: Any, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("wider_models")
    result = module.run_all(small, (8, 16), tmp_path, **SIZES)
    pairs = {(row["features of"], row["in"]): row for row in result["pairs"]}
    assert pairs.keys() == {(8, 8), (8, 16), (16, 8), (16, 16)}
    for row in pairs.values():
        assert row["robust"] == len(row["correlations"]) <= row["fire"]
        assert row["robust without"] == sum(value < module.NONE for value in row["correlations"])
    assert pairs[8, 8]["robust"] == round(pairs[8, 8]["counterpart"] * pairs[8, 8]["fire"])
    assert set(result["joint"]["unexplained"]) == {"resid_post.1", "resid_post.1@1"}
    module.print_tables(result)
    assert "joint crosscoder, look exclusive to the widest" in capsys.readouterr().out
    assert (tmp_path / "wider_models.png").exists()


def test_a_dictionary_knows_its_twin_and_how_densely_it_is_packed(example: Any) -> None:
    """Against features made by hand: the same ones in another order, and two at right angles among four."""
    module = example("wider_models")
    acts_NF = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)).relu()
    first, second = (object.__new__(module.Dictionary) for _ in range(2))
    first.acts_NF, second.acts_NF = acts_NF, 2 * acts_NF[:, [2, 0, 1]]
    assert first.best(second).tolist() == pytest.approx([1.0] * 3)
    first.decoders_FD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert first.density().tolist() == pytest.approx([0.36, 0.64, 1.0])
