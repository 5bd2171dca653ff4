"""The example of co-training, at sizes at which nothing is learned."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from replacement.training.co_training import steps_of_both

EXAMPLES = Path(__file__).parent.parent / "examples"
COSTS = {
    "language model": 1.0,
    "subset": 2.0,
    "one": 2.5,
    "propagated": 4.0,
    "language model with frozen transcoders": 1.5,
    "transcoders": 0.5,
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    return importlib.import_module("co_training")


def test_every_way_has_the_same_compute(example: Any) -> None:
    for name, way in example.WAYS.items():
        n_steps, turns = example.plan(100, way, COSTS)
        if turns is None:
            compute = n_steps * COSTS[way.reads]
        else:
            n_model, n_crosscoder = steps_of_both(turns, n_steps)
            of_model = "language model" if name == "after the fact" else "language model with frozen transcoders"
            compute = n_model * COSTS[of_model] + n_crosscoder * COSTS["transcoders"]
            assert steps_of_both(turns, n_steps - 1) == (n_model, n_crosscoder - 1)  # the crosscoder has the last step
        assert compute == 200, name
    assert example.plan(100, example.WAYS["after the fact"], COSTS) == (300, (100, 200))
    assert example.plan(100, example.WAYS["frozen, caught up"], COSTS) == (200, (20, 20))


def test_every_way_becomes_a_row_once(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "PILOT_STEPS", 6)
    monkeypatch.setattr(example, "BATCH_TOKENS", 512)
    monkeypatch.setattr(example, "WAYS", {name: example.WAYS[name] for name in ("after the fact", "in turn")})
    untrained = str(tmp_path / "untrained")
    study = example.Study(
        n_layers=2, d_model=16, fine_tuned=untrained, steps=5, n_features=16, n_rows=4, label_tokens=1024
    )
    rows = example.run_all(study, tmp_path)
    assert [(row["start"], row["name"]) for row in rows] == [
        (start, name) for start in ("scratch", "fine-tuned") for name in example.WAYS
    ]
    compute = example.read_json(tmp_path / "compute.json")
    costs = compute["fine-tuned"]
    assert compute["scratch"] == costs  # of the same model
    assert costs["language model"] == 1 < costs["language model with frozen transcoders"] < costs["propagated"]
    assert costs["transcoders"] < costs["subset"]
    for row in rows:
        assert row["KL, one"] < row["KL"]
        assert 0 <= row["state F1"] <= 1
        assert 10 < row["L0"] <= 16
    example.print_table(rows, compute)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines if not line.startswith("compute")}) == 1
    monkeypatch.setattr(example, "train_and_measure", None)
    assert example.run_all(study, tmp_path) == rows


def test_the_mean_over_subsets_does_not_depend_on_which_were_drawn(example: Any) -> None:
    """Of three MLPs none is replaced in a quarter of the steps."""
    for drawn in ([10, 20, 22, 18], [10, 10, 10, 20], [20, 20, 20, 20, 20, 10]):
        assert example.over_subsets(drawn, 3) == pytest.approx((10 + 3 * 20) / 4)
    assert example.over_subsets([20, 21, 20], 3) == pytest.approx(61 / 3)
