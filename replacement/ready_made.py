"""Load a replacement model in one call: the demo that ships with the project, or any model folder and checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from replacement import checkpoint
from replacement.language_model import LanguageModel
from replacement.model import ReplacementModel

ARTIFACTS = Path(__file__).parent / "demo" / "artifacts"
DEMO = "demo"


def load(
    model: str | Path = DEMO,
    *,
    crosscoder: str | Path = DEMO,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReplacementModel:
    """A language model with a crosscoder spliced in.

    Args:
        model: `demo`, a hub name, or a local folder in Hugging Face layout.
        crosscoder: `demo` or a crosscoder checkpoint folder.
        dtype: dtype both are loaded in.
        device: device both are put on.

    Raises:
        ValueError: one of them is missing, damaged or of another model.
    """
    folder = ARTIFACTS / "crosscoder" if str(crosscoder) == DEMO else Path(crosscoder)
    checkpoint.read_config(folder)  # a wrong path should not cost loading the language model
    is_demo = str(model) == DEMO
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model" if is_demo else model, dtype=dtype, device=device)
    lm.name = DEMO if is_demo else lm.name
    return ReplacementModel(lm, checkpoint.load(folder, dtype=dtype, device=device))
