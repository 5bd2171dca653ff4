"""The `replacement` command: train, describe, convert, validate and index crosscoders, measure the demo.

Every mistake of the user is one line `error: ...` on stderr and exit code 2. Models are imported by the verb that needs
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from replacement.command_line import DEMO, AsJson, ModelOptions, model_options, new_app, path_option, run
from replacement.console import section, show_json, table
from replacement.console import show as show_page
from replacement.crosscoder_commands import architectures, convert, layouts, show
from replacement.index_commands import features, index

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


app.command()(index)
app.command()(features)
app.command()(show)
app.command()(convert)
app.command()(layouts)
app.command()(architectures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    return run(app, "replacement", arguments)
