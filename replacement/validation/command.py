"""What `replacement validate` does: check the options, measure with a progress bar on a terminal, and show the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from replacement.splicing.replacement_model import ReplacementModel
from replacement.validation.compute import read_curve
from replacement.validation.validate import ValidationConfig, expected_tokens, validate

DEMO = "demo"
DEMO_CURVE = Path(__file__).parent.parent / "demo" / "artifacts" / "training_curve.json"
"""Written by `examples/train_demo.py`; used for the demo where it is there."""
MOST_TOKENS = 10**9
"""More than any data is worth: months of computing, and the demo's corpus has no end."""


def config_of(
    *,
    model: str,
    data: str | None,
    tokens: int,
    slices: Sequence[str],
    training_curve: Path | None,
    context: int | None,
    controls: bool,
) -> ValidationConfig:
    """The settings that the options of the command mean; checked before any model is loaded.

    Raises:
        ValueError: an option outside its choices, or a training curve that cannot be read.
    """
    if tokens > MOST_TOKENS:
        raise ValueError(f"tokens: expected at most {MOST_TOKENS:_}, given {tokens}")
    if data is not None and not data.strip():
        raise ValueError(f"data: expected text files, a dataset or token ids, given {data!r}")
    if data is None and model != DEMO:
        raise ValueError(f"data: expected text files, a dataset or token ids to measure {model} on, given none")
    if training_curve is None and model == DEMO and DEMO_CURVE.is_file():
        training_curve = DEMO_CURVE
    return ValidationConfig(
        data=data or DEMO,
        n_tokens=tokens,
        slices=tuple(map(_slice, slices)),
        curve=() if training_curve is None else tuple(read_curve(training_curve)),
        context=context,
        controls=controls,
    )


def _slice(text: str) -> tuple[str, str]:
    name, equals, data = text.partition("=")
    if not (equals and name.strip() and data.strip()):
        raise ValueError(f"slice: expected NAME=DATA such as news=news/*.txt, given {text!r}")
    return name.strip(), data.strip()


def validate_with_bar(model: ReplacementModel, config: ValidationConfig) -> dict[str, Any]:
    """Measure; with a bar on stderr where that is a terminal."""
    total = expected_tokens(model, config)
    with tqdm(total=total, desc="validate", unit="tok", unit_scale=True, disable=None) as bar:
        facts = validate(model, config, progress=bar.update)
        bar.update(max(0, bar.total - bar.n))
    return facts
