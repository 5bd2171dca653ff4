"""The page for people of what `circuits compare` says; takes its JSON facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from circuits.graph.text import printable, shorten
from replacement.console import pairs, section, table

Facts = Mapping[str, Any]
_LABEL = 44
"""Most characters of a label in a table."""


def page(facts: Facts) -> Group:
    """The difference of two graphs, or the consensus of more, and the file written."""
    parts: list[RenderableType] = []
    if facts["without_graph"]:
        names = ", ".join(facts["without_graph"])
        parts += [
            Text(f"{len(facts['without_graph'])} prompts without a graph left out: {shorten(names, 100)}", style="red"),
            Text(),
        ]
    difference = facts["difference"]
    parts += _consensus(facts["consensus"]) if difference is None else _difference(difference)
    if facts["file"] is not None:
        parts.append(section("File", pairs([("consensus", facts["file"])], width=14)))
    return Group(*parts)


def _difference(facts: Facts) -> list[RenderableType]:
    prompts = pairs(zip(("first", "second"), map(printable, facts["prompts"]), strict=True), width=8)
    overlap = table(
        *("", "shared", "only first", "only second", "shared of all", "shared influence"),
        rows=(
            (name, *(f"{row[key]:,}" for key in _COUNTS), f"{row['jaccard']:.3f}", f"{row['influence_overlap']:.3f}")
            for name, row in facts["overlap"].items()
        ),
    )
    note = f"{facts['edges_not_compared']:,} edges into features whose causes were not computed in both are left out"
    parts = [
        section("Prompts", Group(prompts, *_tokens(facts["tokens"]))),
        section("Overlap", Group(overlap, Text(note))),
    ]
    if not facts["nodes"] and not facts["edges"]:
        return [*parts, Text("Nothing differs.")]
    total = facts["differing"]
    return [
        *parts,
        section(_title("nodes", len(facts["nodes"]), total["nodes"]), _nodes(facts["nodes"])),
        section(_title("edges", len(facts["edges"]), total["edges"]), _edges(facts["edges"])),
    ]


_COUNTS = ("shared", "only_first", "only_second")


def _title(kind: str, shown: int, total: int) -> str:
    return (
        f"{shown:,} of {total:,} {kind} that differ, the largest changes of influence (second minus first) at the top"
    )


def _tokens(tokens: list[Facts]) -> list[Text]:
    """Each place where the prompts differ."""
    changes = (" → ".join("–" if text is None else printable(text) for text in token["texts"]) for token in tokens)
    return [Text(f"at {token['position']}: {change}") for token, change in zip(tokens, changes, strict=True)]


def _nodes(nodes: list[Facts]) -> Table:
    rows = (
        (
            _named(node),
            node["status"],
            _both(node["activation"], node),
            _both(node["influence"]),
            f"{node['influence_change']:+.4f}",
        )
        for node in nodes
    )
    return table("node", "", "activation", "influence", "change", rows=rows, texts=("",))


def _edges(edges: list[Facts]) -> Table:
    rows = (
        (
            *(_named(edge[end]) for end in ("source", "target")),
            edge["status"],
            _both(edge["weight"]),
            f"{edge['influence_change']:+.4f}",
        )
        for edge in edges
    )
    return table("source", "target", "", "weight", "change of influence", rows=rows, texts=("target", ""))


def _both(values: list[float], node: Facts | None = None) -> str:
    """A figure in both graphs; none of nodes that have no activation."""
    if node is not None and node["kind"] != "feature":
        return ""
    return " → ".join(f"{value:.3g}" for value in values)


def _named(node: Facts) -> str:
    """Label and name: `Texas 0/340@7`; where the position is another in the second graph, both names."""
    names = " → ".join(dict.fromkeys(name for name in node.get("names", [node.get("name")]) if name is not None))
    return f"{shorten(printable(node['label']), _LABEL)} {names}".strip()


def _consensus(facts: Facts) -> list[RenderableType]:
    circuit, n_prompts = facts["circuit"], facts["prompts"]
    share = f"in {100 * circuit['frequency']:g} % or more"
    counts = table(
        *("", "in any prompt", share, "in all", "in one alone"),
        rows=((name, *(f"{count:,}" for count in row.values())) for name, row in facts["counts"].items()),
    )
    outputs = (
        "The prompts' targets differ: their outputs are one node, the answer." if facts["outputs"] == "merged" else ""
    )
    consensus = (
        f"Consensus circuit ({share} of the prompts): {circuit['nodes']:,} nodes, {circuit['edges']:,} edges, "
        f"replacement {circuit['replacement']:.3f}, completeness {circuit['completeness']:.3f}"
    )
    features = (
        (
            _named(row),
            f"{row['frequency']:.2f}",
            _with_spread(row, "activation"),
            _with_spread(row, "influence"),
            f"{row['influence_of_all']:.4f}",
        )
        for row in facts["features"]
    )
    edges = (
        (
            _named(row["source"]),
            _named(row["target"]),
            f"{row['frequency']:.2f}",
            _with_spread(row, "weight"),
            f"{row['influence_of_all']:.4f}",
        )
        for row in facts["edges"]
    )
    tokens = " ".join(printable(token) for token in facts["tokens"])
    lines = [Text(tokens), *([Text(outputs)] if outputs else [])]
    in_both = "means ± standard deviation over the prompts that have it; influence in all counts the others as 0"
    return [
        section(f"{n_prompts:,} prompts, aligned", Group(*lines)),
        section("How many prompts share them", Group(counts, Text(consensus))),
        section(
            f"Features of the largest mean influence: {in_both}",
            table("feature", "frequency", "activation", "influence", "in all", rows=features),
        ),
        section(
            "Edges of the largest mean influence",
            table("source", "target", "frequency", "weight", "influence in all", rows=edges, texts=("target",)),
        ),
    ]


def _with_spread(row: Facts, name: str) -> str:
    return f"{row[name]:.3g} ± {row[f'{name}_spread']:.2g}"
