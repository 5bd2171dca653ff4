"""`replacement show`, `convert`, `layouts` and `architectures`: published crosscoders, and models that can be traced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from replacement.command_line import path_option
from replacement.console import add_row, pairs, section, table
from replacement.console import show as show_page

if TYPE_CHECKING:
    from replacement.validation.claims import Compared

Source = Annotated[
    str,
    typer.Argument(
        help="The crosscoder: `demo`, the folder of a training run, a file or folder in any layout that `replacement layouts` "
        "lists, or one on the Hugging Face hub: hf:ORG/REPO, hf:ORG/REPO/PATH, hf:ORG/REPO/PATH@REVISION. A file that does "
        "not say what it reads and writes takes it from the end of its path: params.npz?read=mlp_in&write=mlp_out&layer=5.",
        show_default=False,
    ),
]


def show(
    crosscoder: Source,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="Language model to measure it in, on --data: `demo`, a folder, or a name on the hub.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="For an adapter: the model that --model was fine-tuned from.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text to measure it on: a text file, a dataset, token ids, or `demo`.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the data that are measured.")] = 8192,
) -> None:
    """Describe a crosscoder: its layout, what it computes, reads and writes, and what its file claims.

    With --model and --data it is measured, too, and the claims are compared with what was found.
    """
    if (model is None) != (data is None):
        raise ValueError("expected --model and --data together, to measure the crosscoder, or neither of them")
    from replacement.crosscoder.formats.layouts import open_published
    from replacement.loading import crosscoder_folder, load_language_model

    published = open_published(crosscoder_folder(crosscoder))
    wiring = published.wiring
    facts = {
        "folder": published.path,
        "layout": published.layout,
        "function": published.rule,
        "model": f"{published.model_name or 'not recorded'} {published.model_fingerprint}".strip(),
        **({"base model": f"{published.base_name} {published.base_fingerprint}"} if published.base_name else {}),
        "wiring": f"{wiring.name}, {wiring.n_groups} groups",
        "features per group": published.n_features,
        "activation": published.activation.to_dict(),
        "reads": ", ".join(map(str, wiring.read_sites)),
        "writes": ", ".join(map(str, wiring.write_sites)),
        "tied, skip": f"{published.tied}, {published.skip}",
        "positions without features": published.undecomposed_positions,
        **published.facts,
    }
    show_page(pairs(facts.items()))
    if model is None or data is None:
        return
    import torch

    from replacement.validation.claims import compare_with_claims

    lm, loaded = load_language_model(model), published.load(dtype=torch.float32, device="cpu", lazy=None)
    lm = lm if base is None else lm.with_base(load_language_model(base))
    n_tokens, compared = compare_with_claims(lm, loaded, published.facts, data=data, n_tokens=tokens)
    show_page(section(f"Measured on {n_tokens:,} tokens of {data}", _claims(compared)))
    for warning in filter(None, (quantity.warning() for quantity in compared)):
        typer.echo(f"warning: {warning}", err=True)


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(parser=path_option, help="A new or empty folder.", show_default=False)],
    *,
    to: Annotated[
        str, typer.Option(help="Layout to write: one that `replacement layouts` lists as written.")
    ] = "crosstrace",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16 or float64: of the weights that are written.",
            show_default="that of the source; float32 where its scales are folded in",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Language model that the copy belongs to (name and fingerprint): `demo`, a folder, or a name on the hub.",
            show_default="what the source says",
        ),
    ] = None,
) -> None:
    """Write a crosscoder in another layout; the copy computes the same function.

    What the other layout cannot say is an error, and nothing is written then.
    """
    from replacement.crosscoder.formats.convert import convert as write_copy
    from replacement.crosscoder.formats.layouts import open_published
    from replacement.loading import crosscoder_folder, dtype_of, load_language_model
    from replacement.memory import size_text

    wanted = None if dtype is None else dtype_of(dtype)
    lm = None if model is None else load_language_model(model)
    write_copy(crosscoder_folder(source), target, to=to, dtype=wanted, model=lm)
    written, files = open_published(target), [path for path in target.rglob("*") if path.is_file()]
    facts = {
        "folder": target,
        "layout": written.layout,
        "wiring": f"{written.wiring.name}, {written.wiring.n_groups} groups of {written.n_features} features",
        "stored as": str(written.stored_dtype).removeprefix("torch."),
        "files": f"{len(files)}, {size_text(sum(path.stat().st_size for path in files))}",
    }
    show_page(pairs(facts.items()))


def layouts() -> None:
    """List the layouts (files and folders that crosscoders are published in) that can be read, and which can be written.

    A crosscoder's layout is told by its content: `replacement show` and every option --crosscoder take all of them.
    `replacement convert --to` takes those that can be written.
    """
    from replacement.crosscoder.formats.layouts import LAYOUTS

    rows = [(entry.name, "yes", "no" if entry.write is None else "yes", entry.description) for entry in LAYOUTS]
    show_page(table("layout", "read", "written", "what it is", rows=rows, texts=("read", "written", "what it is")))


def architectures() -> None:
    """Which architectures can be traced, and why the others cannot, as a Markdown table."""
    from replacement.language_model.architectures import markdown_table

    typer.echo(markdown_table())


def _claims(compared: Sequence[Compared]) -> Table:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    result = table("quantity", "where", "measured", "the file says", texts=("where",))
    for quantity in compared:
        for place, (name, value) in enumerate(zip(quantity.places, quantity.measured, strict=True)):
            add_row(result, quantity.quantity, name, text(value), text(quantity.claim(place)))
        add_row(result, quantity.quantity, quantity.over_all, text(quantity.total), text(quantity.claimed_total))
    return result
