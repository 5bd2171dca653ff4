"""The `replacement` command: train, describe, convert, validate and index crosscoders, measure the demo.

Every mistake of the user is one line `error: ...` on stderr and exit code 2. Models are imported by the verb that needs
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from replacement.command_line import DEMO, AsJson, ModelOptions, model_options, new_app, path_option, run
from replacement.console import add_row, pairs, section, show_json, table
from replacement.console import show as show_page

if TYPE_CHECKING:
    from replacement.validation.claims import Compared

OTHER_TOOLS = "Files of other tools"
"""Title of these options in the help."""

app = new_app("Crosscoders, and the replacement model that a crosscoder makes of a language model.")


@app.command()
@model_options
def demo(
    *,
    options: ModelOptions,
    rows: Annotated[int, typer.Option(help="Held-out rows of 64 tokens to measure fidelity on.")] = 512,
    probes: Annotated[
        str, typer.Option(help="`judge`, used for nothing else, or `choose`, to choose settings of a training run by.")
    ] = "judge",
    families: Annotated[bool, typer.Option(help="Measure feature families, too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure the demo: accuracy on every behaviour, what its features mean, and fidelity of its replacement model.

    With --model and --crosscoder, another model trained on the demo's corpus.
    """
    if not 1 <= rows <= 100_000:
        raise ValueError(f"rows: expected 1 to 100000, given {rows}")
    from replacement.demo.families import FAMILIES
    from replacement.demo.family_cases import check_probes
    from replacement.demo.page import page
    from replacement.demo.report import measure_demo

    check_probes(probes)
    facts = measure_demo(n_rows=rows, model=options.load(), probes=probes, families=FAMILIES if families else ())
    if as_json:
        show_json(facts)
    else:
        show_page(page(facts))


class _TrainCommand(TyperCommand):
    """Shows all settings below the help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from replacement.training import settings_table

        heads = ("setting", "default", "unit", "meaning")
        settings = table(*heads, rows=settings_table(), texts=heads)
        show_page(section("Settings of the TOML file, and of --set", settings))


@app.command(cls=_TrainCommand)
def train(
    config: Annotated[Path, typer.Argument(help="TOML file with the settings.", show_default=False)],
    *,
    out: Annotated[
        Path,
        typer.Option(parser=path_option, help="Folder of the run; the result is OUT/crosscoder.", show_default=False),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as training.n_tokens=1_000_000."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    feature_shards: Annotated[
        int, typer.Option(help="Under torchrun: processes that share the features; the others share the tokens.")
    ] = 1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to OUT/tensorboard.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also log to Weights & Biases.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a crosscoder: SAE, transcoder, PLT, CLT and the rest, on any language model.

    SIGINT and SIGTERM write a checkpoint before the run ends; --resume goes on exactly there.
    """
    from replacement.training.command import run_with_bar, summary
    from replacement.training.parallel import is_first_process
    from replacement.training.run_config import read_config
    from replacement.training.runs import Interrupted

    loggers = [name for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb)) if wanted]
    settings = read_config(config, overrides=overrides or [])
    try:
        facts = run_with_bar(
            settings, out, resume=resume, device=device, feature_shards=feature_shards, loggers=loggers
        )
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from None
    if not is_first_process():
        return
    if as_json:
        show_json(facts)
    else:
        show_page(section(f"Held-out rows after {facts['step']:,} steps", summary(facts)))


@app.command()
@model_options
def validate(
    *,
    options: ModelOptions,
    data: Annotated[
        str | None,
        typer.Option(help="Text files, a dataset, token ids or `demo`, not used in training.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the data that are measured.")] = 32_768,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", metavar="NAME=DATA", help="More data, measured beside the whole; may be repeated."),
    ] = None,
    training_curve: Annotated[
        Path | None, typer.Option(help="JSON list of (compute, loss) pairs of the original's training.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per row; the data's own by default.")] = None,
    controls: Annotated[bool, typer.Option(help="Measure what the crosscoder has to beat.")] = True,
    report: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="Folder for a page, plots, tables and facts.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far a replacement model can be trusted: reconstruction, protocols, slices, controls."""
    from replacement.files import check_folder
    from replacement.validation.command import config_of, validate_with_bar
    from replacement.validation.report import write_report
    from replacement.validation.terminal import page

    if report is not None:
        check_folder(report)
    config = config_of(
        model=options.model or DEMO,
        data=data,
        tokens=tokens,
        slices=slices or [],
        training_curve=training_curve,
        context=context,
        controls=controls,
    )
    facts = validate_with_bar(options.load(), config)
    if report is not None:
        write_report(facts, report)
    if as_json:
        show_json(facts)
    else:
        show_page(page(facts))


@app.command()
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


@app.command()
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


Source = Annotated[
    str,
    typer.Argument(
        help="The crosscoder: `demo`, the folder of a training run, a file or folder in any layout that `replacement layouts` "
        "lists, or one on the Hugging Face hub: hf:ORG/REPO, hf:ORG/REPO/PATH, hf:ORG/REPO/PATH@REVISION. A file that does "
        "not say what it reads and writes takes it from the end of its path: params.npz?read=mlp_in&write=mlp_out&layer=5.",
        show_default=False,
    ),
]


@app.command()
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


@app.command()
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


@app.command()
def layouts() -> None:
    """List the layouts (files and folders that crosscoders are published in) that can be read, and which can be written.

    A crosscoder's layout is told by its content: `replacement show` and every option --crosscoder take all of them.
    `replacement convert --to` takes those that can be written.
    """
    from replacement.crosscoder.formats.layouts import LAYOUTS

    rows = [(entry.name, "yes", "no" if entry.write is None else "yes", entry.description) for entry in LAYOUTS]
    show_page(table("layout", "read", "written", "what it is", rows=rows, texts=("read", "written", "what it is")))


@app.command()
def architectures() -> None:
    """Which architectures can be traced, and why the others cannot, as a Markdown table."""
    from replacement.language_model.architectures import markdown_table

    typer.echo(markdown_table())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    return run(app, "replacement", arguments)


def _claims(compared: Sequence[Compared]) -> Table:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    result = table("quantity", "where", "measured", "the file says", texts=("where",))
    for quantity in compared:
        for place, (name, value) in enumerate(zip(quantity.places, quantity.measured, strict=True)):
            add_row(result, quantity.quantity, name, text(value), text(quantity.claim(place)))
        add_row(result, quantity.quantity, quantity.over_all, text(quantity.total), text(quantity.claimed_total))
    return result
