"""`circuits validate`: does a saved graph predict what interventions on the model do?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from circuits.graph.circuit_graph import CircuitGraph
from circuits.with_model import with_model

if TYPE_CHECKING:
    from torch import Tensor

    from replacement import ReplacementModel

OTHERS = 8
"""Prompts that features are resampled from."""


def validate(
    file: Annotated[Path, typer.Argument(help="A graph saved as .safetensors.", show_default=False)],
    *,
    features: Annotated[int, typer.Option(help="Features drawn from the graph.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    resample: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one prompt per line, for resampled ablation: those with as many tokens as the graph's or more "
            "are used, their first ones. Without it, rows of the demo's corpus, or for other models no resampled ablation."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="`demo`, a hub name or a Hugging Face folder.")] = "demo",
    crosscoder: Annotated[str, typer.Option(help="`demo` or a crosscoder checkpoint folder.")] = "demo",
    attention_crosscoder: Annotated[
        str, typer.Option(help="For graphs traced with `--attention features`: `demo` or a checkpoint folder.")
    ] = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Measure how far a graph predicts interventions, and whether its circuit is enough and needed."""
    if features < 1:
        raise ValueError(f"features: expected at least 1, given {features}")
    if resample is not None and not resample.is_file():
        raise ValueError(f"{resample}: expected a text file with one prompt per line, but there is no such file")
    lines = None if resample is None else resample.read_text(encoding="utf-8").splitlines()
    graph = CircuitGraph.load(file)
    linear = graph.metadata.get("attention", "linear") == "linear"

    def work(loaded: ReplacementModel, say: object) -> dict[str, object]:
        from circuits.validation.validate import validate as run

        others = other_prompts(loaded, graph, lines, is_demo=model == "demo")
        return run(loaded, graph, others=others, n_features=features, seed=seed)

    facts = with_model(
        work, model=model, crosscoder=crosscoder, attention_crosscoder=None if linear else attention_crosscoder
    )
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        from circuits.validation.report import page

        Console().print(page(facts), highlight=False, markup=False, soft_wrap=False)


def other_prompts(
    model: ReplacementModel, graph: CircuitGraph, lines: list[str] | None, *, is_demo: bool
) -> list[Tensor]:
    """Prompts of the graph's length: from the lines given, from the demo's corpus, or none.

    Raises:
        ValueError: no line has as many tokens as the graph's prompt.
    """
    import torch

    length, lm = len(graph.metadata["tokens"]), model.language_model
    if lines is not None:
        tokens = [lm.tokenize(line) for line in lines if line.strip()]
        found = [one[:length] for one in tokens if len(one) >= length][:OTHERS]
        if not found:
            raise ValueError(f"resample: expected a prompt of at least {length} tokens, the graph's number; given none")
        return found
    if not is_demo:
        return []
    from replacement.demo.corpus.mixture import held_out_rows

    rows = held_out_rows(lm.tokenizer, n_rows=OTHERS, context=length, seed=0)
    return [torch.from_numpy(row) for row in rows]
