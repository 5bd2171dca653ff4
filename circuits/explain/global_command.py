"""`circuits global`: build a file of global circuits, or ask it for neighbours of a feature or what it explains of a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from tqdm import tqdm

from circuits.explain.global_circuits import MEMORY, NEIGHBOURS, GlobalCircuits
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.text import printable, shorten
from replacement.command_line import AsJson, ModelOptions, model_options
from replacement.console import pairs, section, show, show_json, table
from replacement.index.records import UNCLEAR
from replacement.index.showing import DEMO, DEMO_FOLDER, file_of
from replacement.index.store import ATTENTION_FILE_NAME, FeatureIndex

if TYPE_CHECKING:
    from replacement import ReplacementModel

CONTROL_SEED = 0
_LONGEST_LABEL = 64


@model_options
def global_(
    file: Annotated[
        Path, typer.Argument(help="A file of global circuits, .safetensors; written with --data.", show_default=False)
    ],
    *,
    data: Annotated[
        str | None,
        typer.Option(help="Build the file from this corpus: text files, a dataset, stored token ids, or `demo`."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="With --data: tokens to read, rounded down to rows.")] = 100_000,
    context: Annotated[
        int | None, typer.Option(min=1, help="With --data: tokens per row.", show_default="the source's")
    ] = None,
    paths: Annotated[
        str, typer.Option(help="With --data: `all`, or `direct` for the residual stream alone, without attention.")
    ] = "all",
    neighbours: Annotated[int, typer.Option(min=1, help="With --data: edges kept into each feature.")] = NEIGHBOURS,
    memory: Annotated[str, typer.Option(help="With --data: most memory for the table of pairs of features.")] = MEMORY,
    feature: Annotated[
        str | None, typer.Option(help="Show what drives this feature and what it drives: `2/345`, `attention:2/345`.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="With --feature: neighbours of each side.")] = 10,
    graph: Annotated[
        Path | None, typer.Option(help="Say how much of this graph's edges between features are global.")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="Feature index for labels.", show_default="features.sqlite beside the crosscoder"),
    ] = None,
    options: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Edges between features that hold over a corpus: what drives a feature, and what it drives."""
    if sum(question is not None for question in (data, feature, graph)) > 1:
        raise ValueError("expected one of --data, --feature and --graph, given several")
    facts: dict[str, Any]
    if data is not None:
        settings = {"paths": paths, "neighbours": neighbours, "memory": memory}

        def work(model: ReplacementModel, say: object) -> GlobalCircuits:
            return build(model, file, data=data, n_tokens=tokens, context=context, **settings)

        found = options.use(work)
    else:
        found = GlobalCircuits.load(file)
    if feature is not None:
        facts = neighbour_facts(found, feature, top=top, index=index)
        page: RenderableType = neighbour_page(facts)
    elif graph is not None:
        local = CircuitGraph.load(graph)
        facts = {
            "prompt": local.metadata["prompt"],
            "global": found.explained(local),
            "control": found.shuffled(CONTROL_SEED).explained(local),
        }
        page = explained_page(facts)
    else:
        facts = {"file": str(file), "bytes": file.stat().st_size, "edges": len(found.source), **found.metadata}
        page = summary_page(found, facts)
    if as_json:
        show_json(facts)
    else:
        show(page)


def build(
    model: ReplacementModel, file: Path, *, data: str, n_tokens: int, context: int | None, **settings: Any
) -> GlobalCircuits:
    """Read a corpus and write the file, with a bar on stderr where that is a terminal; a killed build goes on when it is
    started again with the same settings.

    Raises:
        ValueError: a source that cannot be opened, fewer tokens than a row, or anything that `global_circuits` says.
    """
    from circuits.explain.global_pass import global_circuits
    from replacement.data.open_tokens import open_source
    from replacement.data.token_sources import first_rows
    from replacement.files import check_file

    check_file(file)
    source = open_source(data, model.language_model, context=context)
    if n_tokens < source.context:
        raise ValueError(f"tokens: expected at least {source.context}, one row of {source.name}, got {n_tokens}")
    rows = (row_T for block_RT in first_rows(source.one_pass(), n_tokens // source.context) for row_T in block_RT)
    with tqdm(total=n_tokens, desc="global circuits", unit="tok", unit_scale=True, disable=None) as bar:
        found = global_circuits(
            model,
            rows,
            corpus=f"{source.name}, in rows of {source.context} tokens",
            state=file.with_name(f"{file.name}.part.npz"),
            progress=bar.update,
            **settings,
        )
    found.save(file)
    return found


def neighbour_facts(found: GlobalCircuits, feature: str, *, top: int, index: Path | None = None) -> dict[str, Any]:
    """A feature, where its pre-activation comes from, and its neighbours with their labels, as one JSON object.

    Raises:
        ValueError: no such feature, or an index of another crosscoder.
    """
    number = found.numbers.named(feature)
    sides = {"upstream": found.upstream(feature, top=top), "downstream": found.downstream(feature, top=top)}
    name = found.numbers.name(number)
    labels = labels_of(found, [name, *(neighbour.name for side in sides.values() for neighbour in side)], index)
    return {
        "feature": name,
        "label": labels.get(name),
        "firings": int(found.features["firings"][number]),
        "n_tokens": found.metadata["n_tokens"],
        "account": found.account(feature),
        "largest_not_listed": float(found.features["omitted"][number]) / max(1, int(found.features["firings"][number])),
        **{
            side: [{**asdict(neighbour), "label": labels.get(neighbour.name)} for neighbour in neighbours]
            for side, neighbours in sides.items()
        },
    }


def labels_of(found: GlobalCircuits, names: Iterable[str], index: Path | None = None) -> dict[str, str]:
    """Labels of features by name, from an index, by default those beside the crosscoders; none for features without one.

    Raises:
        ValueError: the index given is of another crosscoder.
    """
    fingerprints, labels = found.metadata["crosscoder_fingerprint"].split("+"), dict[str, str]()
    wanted = {name: found.numbers.feature(found.numbers.named(name)) for name in names}
    for path in [index] if index is not None else _beside(found):
        with contextlib.closing(FeatureIndex.open(path)) as opened:
            if opened.facts["crosscoder_fingerprint"] not in fingerprints:
                if index is not None:
                    raise ValueError(f"index: {path} is of another crosscoder than the global circuits")
                continue
            part = opened.facts.get("part", "mlp")
            places = {name: (layer, number) for name, (of_part, layer, number) in wanted.items() if of_part == part}
            known = opened.labels(set(places.values()))
            labels |= {name: known[place].text for name, place in places.items() if place in known}
    return {name: text for name, text in labels.items() if text != UNCLEAR}


def _beside(found: GlobalCircuits) -> list[Path]:
    """Files of the feature indexes beside the crosscoders, where these are folders of this machine."""
    loaded = found.metadata.get("loaded_from") or {}
    names = [name for name in ("crosscoder", "attention_crosscoder") if name in loaded]
    files = [file_of(str(DEMO_FOLDER / name if loaded[name] == DEMO else loaded[name])) for name in names]
    files += [file.with_name(ATTENTION_FILE_NAME) for file in files]  # of joint crosscoders
    return [file for file in files if file.is_file()]


# Pages ---------------------------------------------------------------------------------------------------------------


def summary_page(found: GlobalCircuits, facts: dict[str, Any]) -> RenderableType:
    """What a file holds."""
    exact = "exact" if facts["is_exact"] else f"off by at most {found.largest_error:.2g} of the mean inflow"
    rows = {
        "file": f"{facts['file']}, {facts['bytes'] / 1e6:.2f} MB",
        "corpus": f"{facts['n_tokens']:,} tokens of {facts['corpus']}",
        "pairs seen": f"{facts['n_pairs']:,} ({exact})",
        "edges kept": f"{facts['edges']:,}, at most {facts['neighbours']} into each feature, paths: {facts['paths']}",
        "identity error": f"{facts['identity_error']:.1e}",
    }
    return pairs(rows.items())


def neighbour_page(facts: dict[str, Any]) -> RenderableType:
    """The neighbours of a feature."""
    rate = facts["firings"] / facts["n_tokens"]
    heading = (
        f"feature {facts['feature']}: {_label(facts['label'])}, active on {facts['firings']:,} tokens ({rate:.2%})"
    )
    account = "  ".join(f"{name.replace('_', ' ')} {value:+.3f}" for name, value in facts["account"].items())
    titles = {"upstream": "Driven by", "downstream": "Drives"}
    heads = ("feature", "effect", "share", "direct", "virtual weight", "label")
    return Group(
        section(heading, account),
        *(
            section(title, table(*heads, rows=map(_row, facts[side]), texts=("label",)))
            for side, title in titles.items()
        ),
    )


def explained_page(facts: dict[str, Any]) -> RenderableType:
    """How much of a graph is global, beside the control."""
    heads = {
        "edges": "edges between features",
        "share_of_edges": "of them global",
        "share_of_influence": "of their influence",
        "correlation": "correlation of weights",
    }
    rows = [(text, *(_number(facts[side][name]) for side in ("global", "control"))) for name, text in heads.items()]
    return section(printable(facts["prompt"]), table("", "global", "shuffled sources", rows=rows))


def _row(neighbour: dict[str, Any]) -> tuple[str, ...]:
    figures = (f"{neighbour['effect']:+.3f}", f"{neighbour['share']:+.1%}", f"{neighbour['direct']:+.3f}")
    return (neighbour["name"], *figures, _number(neighbour["virtual_weight"]), _label(neighbour["label"]))


def _label(label: str | None) -> str:
    return shorten(printable(label), _LONGEST_LABEL) if label else "(no clear label)"


def _number(value: float | int | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
