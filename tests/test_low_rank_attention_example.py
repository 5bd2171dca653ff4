"""The example that compares ways to replace attention: its definition of a match has known answers, and it runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import replacement
from replacement import Lorsa, TopK, Wiring
from replacement.language_model.bridge_scores import value_weights
from replacement.training.head_start import query_keys_like, start_at_heads
from replacement.training.scaling import Statistics

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("low_rank_attention")


@torch.no_grad()
def test_heads_that_are_parts_of_the_models_heads_match_and_random_ones_do_not(example: Any) -> None:
    """Queries and keys of the model's heads, values and outputs their singular vectors: every sparse head is one of them."""
    lm = replacement.load("demo").language_model
    sizes = query_keys_like(lm, n_groups=lm.shape.n_heads, width=lm.shape.d_head)
    lorsa = Lorsa(Wiring.lorsa(lm), query_keys=sizes, n_features=32, activation=TopK(8), seed=0)
    start_at_heads(lorsa, lm, Statistics.blank(lorsa), seed=0)
    for layer in range(lm.shape.n_layers):
        W_O_HKD = lm.parts.attention_weights(layer).W_O
        for head, ov_DD in enumerate(value_weights(lm.parts, layer) @ W_O_HKD):
            left_DD, _, right_DD = torch.linalg.svd(ov_DD)
            lorsa.W_enc[layer][head * 8 : (head + 1) * 8] = left_DD[:, :8].T
            lorsa.W_dec[layer][head * 8 : (head + 1) * 8, 0] = right_DD[:8]
        lorsa.b_enc[layer].fill_(1)
    rows_RT = torch.from_numpy(example.held_out_rows(lm.tokenizer, n_rows=4, context=24, seed=0))
    same = example.matches(lm, lorsa, rows_RT)
    assert same["both, one head"] == 1
    assert same["OV, median"] == pytest.approx(1, abs=1e-3)
    assert same["patterns, median"] == pytest.approx(1, abs=1e-4)
    assert example.matches(lm, example.random_lorsa(lorsa), rows_RT)["both, one head"] < 0.05


def test_the_example_prints_its_tables(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["data.held_out_rows=2", "crosscoder.n_features=32", "data.buffer_tokens=2048", "training.batch_tokens=512"]
    settings = [argument for setting in small for argument in ("--set", setting)]
    options = ["--out", str(tmp_path), "--tokens", "1024", "--rows", "4", "--prompts", "0"]
    monkeypatch.setattr(sys, "argv", ["low_rank_attention.py", *options, *settings])
    monkeypatch.setattr(example, "print_graphs", lambda *_: None)
    example.main()
    printed = capsys.readouterr().out.splitlines()
    for name in ("MLPs alone", "attention", "lorsa", "lorsa, random start", "MLPs and lorsa", "random weights"):
        assert any(line.startswith(name.ljust(32)) for line in printed), name
