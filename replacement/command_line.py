"""What the `replacement` and `circuits` commands share: how a command runs and ends, and the options that load a model."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from replacement.splicing.replacement_model import ReplacementModel

T = TypeVar("T")
DEMO = "demo"
DTYPES = ("float32", "bfloat16", "float16", "float64")
PANEL = "Model"
"""Title of these options in the help."""
MOST_OF_WORD, MOST_OF_MESSAGE = 160, 800
"""Characters of a word and of a whole error message that are shown; the middle of longer ones is left out."""


def path_option(text: str) -> Path:
    """Parser of options that name something to write: an empty text is not the working directory."""
    if not str(text).strip():
        raise typer.BadParameter(f"expected the name of a file or folder, given {str(text)!r}")
    return Path(text)


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Most memory for the process, such as 4GB; a trace that would need more is refused.",
        show_default="what is available",
    ),
]


# Running -----------------------------------------------------------------------------------------------------------------


def new_app(description: str) -> typer.Typer:
    """An app with `--version` and without shell completion or decorated tracebacks."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.callback(help=description)
    def shared(
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        pass

    return app


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C.

    A mistake is one line `error: ...` on stderr.

    Args:
        name: of the command.
        arguments: those of the process by default; without any, the help is shown.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        return _fail(error.format_message())
    except BrokenPipeError:  # whoever read our output has seen enough; nothing is left to flush when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    return code if isinstance(code, int) else 0


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"crosstrace {importlib.metadata.version('crosstrace')}")
        raise typer.Exit
    return wanted


def _fail(message: str) -> int:
    """One line, whatever a library put into its message, and no more of a long input than is needed to recognise it."""
    words = (_without_middle(word, MOST_OF_WORD) for word in message.split())
    typer.echo(f"error: {_without_middle(' '.join(words), MOST_OF_MESSAGE)}", err=True)
    return 2


def _without_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-most // 3 :]}"


# Options that load a model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options of every verb that loads a model; `model_options` gives them to a verb."""

    model: Annotated[
        str | None,
        typer.Option(rich_help_panel=PANEL, help="`demo`, a hub name or a Hugging Face folder.", show_default="demo"),
    ] = None
    crosscoder: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            help="`demo`, the folder of a training run, a crosscoder in any layout that `replacement layouts` lists, or one "
            "on the Hugging Face hub: hf:ORG/REPO/PATH.",
            show_default="the demo's for the demo",
        ),
    ] = None
    attention_crosscoder: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL, help="A second crosscoder, which replaces attention.", show_default="attention stays"
        ),
    ] = None
    base: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            help="For an adapter: the model that the language model was fine-tuned from, named as --model is.",
            show_default="none",
        ),
    ] = None
    device: Annotated[str, typer.Option(rich_help_panel=PANEL, help="auto, cpu, cuda, cuda:1 or mps.")] = "cpu"
    dtype: Annotated[str, typer.Option(rich_help_panel=PANEL, help=f"{' or '.join(DTYPES)}.")] = DTYPES[0]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, given {self.dtype!r}")
        for name in ("model", "crosscoder", "attention_crosscoder", "base", "device"):
            given = getattr(self, name)
            if given is not None and not given.strip():
                raise ValueError(f"{name.replace('_', '-')}: expected a name or folder, given {given!r}")

    @property
    def is_demo(self) -> bool:
        """Whether the language model is the one that ships with the project."""
        return self.model in (None, DEMO)

    @property
    def is_joint(self) -> bool:
        """Whether the crosscoder named replaces MLPs and attention, so that there is none of attention beside it."""
        if self.crosscoder in (None, DEMO) or self.attention_crosscoder is not None:
            return False
        from replacement.crosscoder.families import JOINT
        from replacement.crosscoder.formats.layouts import open_published
        from replacement.loading import crosscoder_folder

        return open_published(crosscoder_folder(self.crosscoder)).wiring.name == JOINT

    def with_attention(self) -> ModelOptions:
        """The same with an attention crosscoder: the one named, the part of a joint crosscoder, or else the demo's."""
        if self.is_joint:
            return self
        return replace(self, attention_crosscoder=self.attention_crosscoder or self._shipped("attention-crosscoder"))

    def for_graph(self, metadata: Mapping[str, Any]) -> ModelOptions:
        """The same, filled up with what a graph says about where its model and crosscoders were loaded from.

        Graphs of earlier releases do not say it; theirs is the demo.

        Raises:
            ValueError: an attention crosscoder for a graph traced without one, or a graph that does not say it and is not of
                the demo.
        """
        stored = metadata.get("loaded_from") or {}
        filled = replace(
            self,
            model=self.model or stored.get("model"),
            crosscoder=self.crosscoder or stored.get("crosscoder"),
            attention_crosscoder=self.attention_crosscoder or stored.get("attention_crosscoder"),
            base=self.base or stored.get("base"),
        )
        traced_in = metadata.get("model", DEMO)
        if filled.model is None and traced_in != DEMO:
            raise ValueError(
                f"model: the graph was traced in {traced_in} and does not say where that is: give --model and --crosscoder"
            )
        if metadata.get("attention", "linear") != "linear":
            return filled.with_attention()
        if self.attention_crosscoder is not None:
            raise ValueError("attention-crosscoder: the graph was traced with linear attention, it takes none")
        return filled

    def load(self) -> ReplacementModel:
        """Load the model.

        Raises:
            ValueError: a crosscoder is missing for a model other than the demo, the device cannot be used, or anything that
                `replacement.load` says.
        """
        crosscoder = self.crosscoder or self._shipped("crosscoder")
        import replacement
        from replacement.threads import fit_threads

        loaded = replacement.load(
            self.model or DEMO,
            crosscoder=crosscoder,
            attention_crosscoder=self.attention_crosscoder,
            base=self.base,
            dtype=self.dtype,
            device=self.device,
        )
        fit_threads(loaded.language_model.shape.d_model)
        return loaded

    def use(self, work: Callable[[ReplacementModel, Callable[[str], None]], T]) -> T:
        """Load the model and do some work with it, with what libraries print sent to stderr.

        Args:
            work: called with the model and a function that changes the text of the spinner.
        """
        with contextlib.redirect_stdout(sys.stderr), _spinner("loading the model") as say:
            return work(self.load(), say)

    def _shipped(self, name: str) -> str:
        if not self.is_demo:
            raise ValueError(f"{name}: expected a crosscoder made for {self.model}, given none: name its folder")
        return DEMO


def model_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `ModelOptions` in place of its keyword parameter `options: ModelOptions`.

    >>> @app.command()                                  # doctest: +SKIP
    ... @model_options
    ... def trace(prompt: str, *, options: ModelOptions) -> None: ...
    """
    signature = inspect.signature(verb, eval_str=True)
    annotations = inspect.get_annotations(ModelOptions, eval_str=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotations[field.name]
        )
        for field in fields(ModelOptions)
    ]
    parameters = []
    for parameter in signature.parameters.values():
        parameters += shared if parameter.name == "options" else [parameter]

    @functools.wraps(verb)
    def wrapper(*arguments: Any, **given: Any) -> None:
        options = ModelOptions(**{field.name: given.pop(field.name) for field in fields(ModelOptions)})
        verb(*arguments, **given, options=options)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr when that is a terminal; gives a function that changes its text."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(text) as status:
        yield status.update
