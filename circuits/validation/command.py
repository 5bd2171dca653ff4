"""`circuits validate`: does a saved graph predict what interventions on the model do?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.metadata import check_traced_here
from circuits.validation.survival import explains_the_answer
from replacement import console
from replacement.command_line import AsJson, ModelOptions, model_options
from replacement.files import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from replacement import ReplacementModel

OTHERS = 8
"""Prompts that features are resampled from."""
VARIANTS = 6
"""Prompts of each kind that a demo prompt is compared with."""
MOST = 2**63 - 1
_LINES = "a text file with one prompt per line"


@model_options
def validate(
    file: Annotated[Path, typer.Argument(help="A graph saved as .safetensors.", show_default=False)],
    *,
    features: Annotated[int, typer.Option(min=1, max=MOST, help="Features drawn from the graph.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="Seed of the draw.")] = 0,
    resample: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one prompt per line to resample features from. Lines with at least as many tokens as the "
            "graph's prompt are used, cut to its length. By default rows of the demo's corpus, for the demo; other models "
            "then have no resampled ablation."
        ),
    ] = None,
    paraphrases: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one prompt per line: prompts that should have the same circuit. By default the prompt's own "
            "template with other names, for prompts of the demo."
        ),
    ] = None,
    other_crosscoder: Annotated[
        str | None,
        typer.Option(
            help="Another crosscoder of the same model, named as for --crosscoder: does it give the same circuit?"
        ),
    ] = None,
    options: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Measure how far a graph predicts interventions, whether its circuit is sufficient and necessary, and how robust it is."""
    lines = None
    if resample is not None:
        lines = read_text(resample, expected=_LINES).splitlines()
    given = None
    if paraphrases is not None:
        given = [line for line in read_text(paraphrases, expected=_LINES).splitlines() if line.strip()]
        if not given:
            raise ValueError(f"paraphrases: expected at least one prompt in {paraphrases}, one per line; given none")
    graph = CircuitGraph.load(file)
    check_traced_here(graph.metadata)
    options = options.for_graph(graph.metadata)

    def work(loaded: ReplacementModel, say: object) -> dict[str, object]:
        from circuits.validation.validate import validate as run

        others = other_prompts(loaded, graph, lines, is_demo=options.is_demo)
        prompts = prompts_to_compare(graph, given, is_demo=options.is_demo)
        crosscoder = None
        if other_crosscoder is not None:
            from replacement import checkpoint
            from replacement.loading import crosscoder_folder

            crosscoder = checkpoint.load(crosscoder_folder(other_crosscoder), device=loaded.language_model.device)
        return run(
            loaded,
            graph,
            others=others,
            prompts=prompts,
            other_crosscoder=crosscoder,
            n_features=features,
            seed=seed,
        )

    facts = options.use(work)
    if as_json:
        console.show_json(facts)
    else:
        from circuits.validation.report import page

        console.show(page(facts))


def prompts_to_compare(graph: CircuitGraph, given: list[str] | None, *, is_demo: bool) -> dict[str, tuple[str, ...]]:
    """Kind -> prompts that should have the same circuit: those given, or variants of a prompt of the demo, or none."""
    if given is not None:
        return {"paraphrase": tuple(given)}
    if not is_demo or not explains_the_answer(graph):
        return {}
    from replacement.demo.corpus.variants import variants

    return variants(graph.metadata["prompt"], VARIANTS)


def other_prompts(
    model: ReplacementModel,
    graph: CircuitGraph,
    lines: list[str] | None,
    *,
    is_demo: bool,
    most: int = 0,
    seed: int = 0,
) -> list[Tensor]:
    """Prompts of the graph's length: from the lines given, from the demo's corpus, or none.

    Args:
        most: number of prompts; 0 for `OTHERS`.
        seed: of the rows drawn from the demo's corpus.

    Raises:
        ValueError: no line has as many tokens as the graph's prompt.
    """
    import torch

    length, lm = len(graph.metadata["tokens"]), model.language_model
    if lines is not None:
        prompts = [lm.tokens(line) for line in lines if line.strip()]
        long_enough = [tokens_T[:length] for tokens_T in prompts if len(tokens_T) >= length][: most or OTHERS]
        if not long_enough:
            raise ValueError(f"resample: expected a prompt of at least {length} tokens, the graph's number; given none")
        return long_enough
    if not is_demo:
        return []
    from replacement.demo.corpus.mixture import held_out_rows

    rows = held_out_rows(lm.tokenizer, n_rows=most or OTHERS, context=length, seed=seed)
    return [torch.from_numpy(row) for row in rows]
