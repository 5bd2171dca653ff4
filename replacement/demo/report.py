"""Measure the demo as it ships: what its language model can do, and how faithful its replacement model is."""

from __future__ import annotations

from typing import Any

import torch

from replacement.demo.accuracy import measure_accuracy
from replacement.demo.corpus import behaviours, held_out_rows
from replacement.loading import load
from replacement.splicing.replacement_model import ReplacementModel
from replacement.validation.fidelity import measure_fidelity

HELD_OUT_SEED = 0


@torch.no_grad()
def measure_demo(*, n_rows: int = 512, model: ReplacementModel | None = None) -> dict[str, Any]:
    """Accuracy on the held-out probes of every behaviour and fidelity on held-out rows, as plain JSON values.

    Args:
        n_rows: rows of the corpus (64 tokens each) that no training drew.
        model: a replacement model with the demo's tokenizer; the shipped one by default.
    """
    model = load() if model is None else model
    lm = model.language_model
    accuracy = measure_accuracy(lm, lm.tokenizer, behaviours())
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=HELD_OUT_SEED))
    fidelity = measure_fidelity(lm, model.crosscoder, rows)
    return {
        "behaviours": [row._asdict() for row in accuracy],
        "fidelity": fidelity.to_dict(),
    }
