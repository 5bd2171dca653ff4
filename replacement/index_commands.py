"""`replacement index` and `replacement features`: make the index of a crosscoder's features, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from replacement.command_line import DEMO, AsJson, ModelOptions, model_options, path_option
from replacement.console import pairs, section, show_json
from replacement.console import show as show_page

OTHER_TOOLS = "Files of other tools"
"""Title of these options in the help."""


@model_options
def index(
    *,
    options: ModelOptions,
    data: Annotated[
        str | None,
        typer.Option(help="Text files, a dataset, token ids or `demo`.", show_default="demo for the demo"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the data that examples are from.")] = 1_000_000,
    context: Annotated[int | None, typer.Option(help="Tokens per row; the data's own by default.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path_option, help="File to write.", show_default="features.sqlite in the crosscoder's folder"
        ),
    ] = None,
    part: Annotated[
        str, typer.Option(help="Features of the crosscoder that replaces the MLPs (`mlp`) or `attention`.")
    ] = "mlp",
    word_lists: Annotated[
        Path | None,
        typer.Option(
            parser=path_option,
            help="Names for labels: a CSV file with lines `Texas,Dallas,Houston,...`.",
            show_default="those of the demo's corpus for its data",
        ),
    ] = None,
    labeller: Annotated[
        str | None,
        typer.Option(help="Command that reads evidence as JSON lines and writes labels.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Index a crosscoder's features: what they fire on, read and promote, and labels with a score.

    Started again it goes on where it was killed; under torchrun processes share the work. Labels of people are kept.
    """
    from replacement.files import check_file
    from replacement.index.command import index_file, index_page, index_with_bar, settings_of

    if part not in ("mlp", "attention"):
        raise ValueError(f"part: expected mlp or attention, given {part!r}")
    settings = settings_of(
        model=options.model or DEMO, data=data, tokens=tokens, context=context, word_lists=word_lists
    )
    options = options.with_attention() if part == "attention" else options
    if out is None:
        joint = options.is_joint
        named = options.crosscoder if part == "mlp" or joint else options.attention_crosscoder
        out = index_file(named or DEMO, part=part, joint=joint)
    facts = index_with_bar(options.load(), check_file(out), settings, part=part, labeller=labeller)
    if facts is None:
        return
    if as_json:
        show_json(facts)
    else:
        show_page(section("Feature index", index_page(facts)))


def features(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] [LAYER/INDEX]...",
            help="The index, or the folder of its crosscoder (the demo's if left out), and features such as 2/345.",
            show_default=False,
        ),
    ] = None,
    *,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Find features by label, or by a token they fire on, read or promote.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Most features that a search shows.")] = 20,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="Write all features as feature JSON: `neuronpedia`, or `saedashboard` for its batches.",
            show_default=False,
            rich_help_panel=OTHER_TOOLS,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="Folder to export to.", show_default=False, rich_help_panel=OTHER_TOOLS),
    ] = None,
    import_from: Annotated[
        Path | None,
        typer.Option(
            "--import",
            parser=path_option,
            help="Take the explanations in Neuronpedia's feature JSON, a file or folder, as people's labels.",
            show_default=False,
            rich_help_panel=OTHER_TOOLS,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show features of an index: labels, activations, tokens and examples; search for them; write them for other tools."""
    from replacement.index.formats.exchange import exchange
    from replacement.index.showing import file_of, is_feature, show_or_search

    given = list(names or [])
    file = file_of(DEMO if not given or is_feature(given[0]) else given.pop(0))
    if export is None and out is None and import_from is None:
        page, facts = show_or_search(file, given, search, limit)
    elif given or search is not None:
        raise ValueError("expected features or --search, or --export and --import, given both")
    else:
        facts = exchange(file, export=export, out=out, import_from=import_from)
        page = section("Feature index", pairs(facts.items()))
    if as_json:
        show_json(facts)
    else:
        show_page(page)
