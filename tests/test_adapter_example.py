"""The example of adapters at a reduced size, and a removal that is known."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from replacement import Wiring
from replacement.loading import load_language_model

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = [
    "crosscoder.n_features=32",
    "training.n_tokens=2048",
    "training.batch_tokens=512",
    "data.buffer_tokens=2048",
    "data.held_out_rows=2",
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return importlib.import_module("transcoder_adapter")


def test_the_example_runs_and_is_taken_up_again(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "REMOVED", (1, 2))
    monkeypatch.setattr(example, "CANDIDATES", 12)
    out = tmp_path / "mlps"
    for _ in range(2):
        example.prepare(out, steps=1, weights=example.TAUGHT["mlps"], overrides=SMALL, n_rows=64)
    with torch.no_grad():
        facts = example.measure(out, every=20, n_rows=4)
    example.print_results(facts)
    printed = capsys.readouterr().out
    assert "fine-tuned model with base MLPs + adapter" in printed
    assert json.loads(json.dumps(facts))["circuit"]["identity_error"] <= 1e-4
    assert [row["removed"] for row in facts["removals"]] == [1, 2]
    assert facts["models"]["base model"]["no today"]["old"] > 0.9  # questions without `today` are the demo's own
    assert (out / "circuit.safetensors").exists()
    # Nothing but MLPs was taught: with the base model's the fine-tuned model is the base model.
    base, fine_tuned = load_language_model("demo"), load_language_model(out / "fine_tuned")
    rows = torch.arange(10)[None]
    torch.testing.assert_close(example.with_mlps_of(fine_tuned, base)(rows), base(rows), rtol=0, atol=1e-3)
    assert float((fine_tuned(rows) - base(rows)).abs().max()) > 1e-2


def test_questions_of_both_halves_are_about_different_states(example: Any) -> None:
    lm = load_language_model("demo")
    halves = [{question.tokens for question in example.questions(lm, half=half, today=True)} for half in (0, 1)]
    assert not halves[0] & halves[1]
    question = example.questions(lm, half=1, today=True)[0]
    names = lm.token_strings([*question.tokens, question.old, question.new])
    assert names[1:4] == ["today", "the", "capital"]
    assert all(old != new for _, old, new in example.questions(lm, half=0, today=True))
    assert Wiring.adapter(lm).writes_differences
