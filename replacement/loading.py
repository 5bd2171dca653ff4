"""Load a replacement model in one call: the demo that ships with the project, or any model folder and checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from replacement.crosscoder import checkpoint
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.replacement_model import ReplacementModel

ARTIFACTS = Path(__file__).parent / "demo" / "artifacts"
DEMO = "demo"


def load(
    model: str | Path = DEMO,
    *,
    crosscoder: str | Path = DEMO,
    attention_crosscoder: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReplacementModel:
    """A language model with a crosscoder spliced in for its MLPs, and one for attention if asked for.

    Args:
        model: `demo`, a hub name, or a local folder in Hugging Face layout.
        crosscoder: `demo` or a crosscoder checkpoint folder.
        attention_crosscoder: the same for a second crosscoder, which replaces attention; attention is left as it is if None.
        dtype: dtype both are loaded in.
        device: device both are put on.

    Raises:
        ValueError: one of them is missing, damaged or of another model.
    """
    folders = [_folder(crosscoder, "crosscoder")]
    if attention_crosscoder is not None:
        folders.append(_folder(attention_crosscoder, "attention_crosscoder"))
    for folder in folders:
        checkpoint.read_config(folder)  # a wrong path should not cost loading the language model
    is_demo = str(model) == DEMO
    lm = LanguageModel.from_pretrained(ARTIFACTS / "language_model" if is_demo else model, dtype=dtype, device=device)
    lm.name = DEMO if is_demo else lm.name
    loaded = [checkpoint.load(folder, dtype=dtype, device=device) for folder in folders]
    return ReplacementModel(lm, loaded[0], attention_crosscoder=loaded[1] if attention_crosscoder is not None else None)


def _folder(given: str | Path, shipped: str) -> Path:
    return ARTIFACTS / shipped if str(given) == DEMO else Path(given)
