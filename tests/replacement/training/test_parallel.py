"""Two processes see the batches of one and follow its loss curve, whether they share the rows or the features."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training_runs

from replacement import checkpoint
from replacement.training.metrics_log import read_metrics
from replacement.training.parallel import connect

CROSSCODERS: dict[str, dict[str, Any]] = {
    "topk": {
        "crosscoder": {"activation": {"name": "topk", "k": [6, 4, 4]}},
        "training": {"reads": "subset", "losses": [{"name": "auxiliary"}, {"name": "strongest", "k": [3, 1, 2]}]},
    },
    "batchtopk, tied": {
        "crosscoder": {"activation": {"name": "batchtopk", "k": 4}, "tied": True},
        "training": {"reads": "subset"},
    },
    "jumprelu, skip": {
        "crosscoder": {"activation": {"name": "jumprelu"}, "skip": True, "read": "mlp_in"},
        "training": {
            "reads": "clean",
            "losses": [
                {"name": "tanh", "coefficient": 1e-3},
                {"name": "distance", "coefficient": 1e-3},
                {"name": "preactivation"},
                {"name": "auxiliary"},
            ],
        },
    },
    "lorsa": {
        "crosscoder": {"wiring": "lorsa", "query_key_groups": 8},
        "training": {"reads": "subset", "losses": [{"name": "auxiliary"}, {"name": "preactivation"}]},
    },
}
MODES = {"data": 1, "features": 2}
PAIRS = [(name, mode) for name in CROSSCODERS for mode in MODES if (name, mode) != ("lorsa", "features")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Path:
    """Every crosscoder trained by one process and, in both modes, by two; and half runs to go on with."""
    root = tmp_path_factory.mktemp("runs")
    tokens = training_runs.write_tokens(root / "tokens.npy")
    single, double = [], []
    for name, changes in CROSSCODERS.items():
        value = training_runs.settings(model_folder("gpt2"), tokens, **changes)
        made = {"config": value, "float64": True}
        single.append(made | {"out": str(root / f"{name} single")})
        modes = [mode for other, mode in PAIRS if other == name]
        double += [made | {"out": str(root / f"{name} {m}"), "feature_shards": MODES[m]} for m in modes]
    whole = {"config": training_runs.settings(model_folder("gpt2"), tokens), "float64": True}
    half = whole | {"stop_at": 13}
    single.append(whole | {"out": str(root / "whole")})
    single.append(half | {"out": str(root / "one, then two")})
    double.append(half | {"out": str(root / "two, then one"), "feature_shards": 2})
    training_runs.execute(single, root)
    training_runs.execute(double, root, n_processes=2)
    dying = whole | {"out": str(root / "killed"), "die_at": 13}
    with pytest.raises(AssertionError):
        training_runs.execute([dying], root, n_processes=2)
    go_on = whole | {"resume": True}
    training_runs.execute([go_on | {"out": str(root / "two, then one")}], root)
    two = [go_on | {"out": str(root / "one, then two"), "feature_shards": 2}, go_on | {"out": str(root / "killed")}]
    training_runs.execute(two, root, n_processes=2)
    return root


def losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_folder, kind="train")]


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_two_processes_follow_one(folder: Path, name: str, mode: str) -> None:
    expected, actual = losses(folder / f"{name} single"), losses(folder / f"{name} {mode}")
    assert len(expected) == 6
    assert actual == pytest.approx(expected, rel=1e-9)
    one, two = (read_metrics(folder / f"{name} {kind}", kind="train")[-1] for kind in ("single", mode))
    assert two["l0"] == pytest.approx(one["l0"], rel=1e-9)
    assert one["dead_fraction"] > 0, "the auxiliary loss should have had something to do"
    assert two["dead_fraction"] == pytest.approx(one["dead_fraction"], abs=1e-9)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-6)


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_what_two_processes_save_is_one_crosscoder(folder: Path, name: str, mode: str) -> None:
    one, two = (checkpoint.load(folder / f"{name} {kind}" / "crosscoder") for kind in ("single", mode))
    assert two.activation == one.activation
    for key, value in one.state_dict().items():
        if key.startswith("b_K."):
            continue  # shifts all scores of a query alike: its gradient is rounding, of which Adam makes whole steps
        error = (two.state_dict()[key] - value).norm() / value.norm().clamp(min=1e-6)
        assert float(error) < 1e-6, key  # single steps agree to rounding; Adam divides by small numbers


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_held_out_rows_are_measured_once_on_the_whole_crosscoder(folder: Path, name: str, mode: str) -> None:
    one, two = (read_metrics(folder / f"{name} {kind}", kind="held_out") for kind in ("single", mode))
    assert [record["step"] for record in two] == [record["step"] for record in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-6)
        assert ours["l0_total"] == pytest.approx(theirs["l0_total"], rel=1e-6)


@pytest.mark.parametrize("name", ["one, then two", "two, then one", "killed"])
def test_a_run_goes_on_with_other_processes(folder: Path, name: str) -> None:
    assert losses(folder / name) == pytest.approx(losses(folder / "whole"), rel=1e-9)


def test_processes_that_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("feature_shards=3 does not divide the 1 process(es) of this run")):
        connect(feature_shards=3)
