"""The scripts that made the demo run, and the same settings give the same weights twice."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from replacement import LanguageModel, checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The two training scripts as modules."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_demo"), importlib.import_module("train_demo_crosscoder")


def test_the_demo_is_rebuilt_the_same_twice(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    train_demo, train_crosscoder = scripts
    threads = torch.get_num_threads()
    run = train_demo.LanguageModelRun(n_layers=2, d_model=16, n_heads=2, steps=4, threads=1, compile=False)
    small = [
        "crosscoder.n_features=32",
        'crosscoder.activation={name="topk", k=[4, 2]}',
        "training.n_tokens=3072",
        "training.batch_tokens=512",
        "data.buffer_tokens=1024",
    ]
    for name in ("first", "second"):
        train_demo.language_model_stage(run, tmp_path / name, None, 10)
        train_crosscoder.crosscoder_stage(tmp_path / name, small)
    torch.set_num_threads(threads)
    models = [LanguageModel.from_pretrained(tmp_path / name / "language_model") for name in ("first", "second")]
    assert models[0].fingerprint == models[1].fingerprint
    first, second = (checkpoint.load(tmp_path / name / "crosscoder").state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path.name for path in (tmp_path / "first").iterdir()} == {
        "accuracy.json", "fidelity.json", "language_model", "crosscoder",
    }  # fmt: skip
