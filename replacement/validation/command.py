"""What `replacement validate` does: load, measure with a progress bar on a terminal, print, and write the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from tqdm import tqdm

from replacement.loading import DEMO, load
from replacement.validation.protocols import protocols
from replacement.validation.tables import Table, tables
from replacement.validation.validate import ValidationConfig, curve_of, expected_tokens, validate

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SHIPPED_CURVE = Path(__file__).parent.parent / "demo" / "artifacts" / "training_curve.json"
"""Written by `examples/train_demo.py`; used for the demo where it is there."""
WORST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of the command, as given."""

    model: str
    crosscoder: str | None
    attention_crosscoder: str | None
    data: str | None
    n_tokens: int
    slices: Sequence[str]
    training_curve: Path | None
    context: int | None
    dtype: str
    device: str
    controls: bool


def validate_with_bar(request: Request) -> dict[str, Any]:
    """Load and measure; a bar on stderr where that is a terminal.

    Raises:
        ValueError: an option outside its choices, or anything that cannot be loaded, opened or measured.
    """
    if request.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, given {request.dtype}")
    is_demo = request.model == DEMO
    if request.data is None and not is_demo:
        raise ValueError(f"data: expected text files, a dataset or token ids to measure {request.model} on, given none")
    if request.crosscoder is None and not is_demo:
        raise ValueError(f"crosscoder: expected a checkpoint folder for {request.model}, given none")
    curve = request.training_curve
    if curve is None and is_demo and SHIPPED_CURVE.is_file():
        curve = SHIPPED_CURVE
    config = ValidationConfig(
        data=request.data or DEMO,
        n_tokens=request.n_tokens,
        slices=tuple(map(parse_slice, request.slices)),
        curve=curve_of(curve),
        context=request.context,
        controls=request.controls,
    )
    model = load(
        request.model,
        crosscoder=request.crosscoder or DEMO,
        attention_crosscoder=request.attention_crosscoder,
        dtype=DTYPES[request.dtype],
        device=request.device,
    )
    total = expected_tokens(model.language_model, config, len(protocols(list(model.crosscoders.values()))))
    with tqdm(total=total, desc="validate", unit="tok", unit_scale=True, disable=None) as bar:
        facts = validate(model, config, progress=bar.update)
        bar.update(max(0, bar.total - bar.n))
    return facts


def parse_slice(text: str) -> tuple[str, str]:
    """`NAME=DATA`.

    Raises:
        ValueError: another form.
    """
    name, equals, data = text.partition("=")
    if not (equals and name.strip() and data.strip()):
        raise ValueError(f"slice: expected NAME=DATA such as news=news/*.txt, given {text!r}")
    return name.strip(), data.strip()


def show(facts: dict[str, Any], console: Console) -> None:
    """Print every table; of the worst tokens the first few."""
    for table in tables(facts):
        few = WORST_SHOWN if table.key == "worst_tokens" else None
        console.print(Text(table.title, style="bold"))
        console.print(_rich(table, n_rows=few))
        console.print(Text(table.note + "\n", style="dim"))


def _rich(table: Table, *, n_rows: int | None) -> RichTable:
    """A table for the terminal; nothing in it is read as markup."""
    places = table.brief or tuple(range(len(table.heads)))
    shown = RichTable(box=None, header_style="bold blue", padding=(0, 2, 0, 0))
    for place in places:
        is_text = place < table.n_texts
        shown.add_column(
            Text(table.heads[place]),
            justify="left" if is_text else "right",
            vertical="bottom",
            overflow="fold",
            no_wrap=is_text and table.n_texts == 1,
        )
    for row in table.rows[:n_rows]:
        shown.add_row(*(Text(row[place]) for place in places))
    return shown
