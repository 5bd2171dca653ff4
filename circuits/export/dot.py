"""DOT text for Graphviz, and pictures where its `dot` program is installed."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator

import graphviz
import numpy as np

from circuits.export.style import EDGE_COLOURS, NODE_COLOURS, emphasis, head_tags, picture_rows, row_title
from circuits.graph.edges import GraphData
from circuits.graph.exporters import MissingProgramError, register
from circuits.graph.feature_labels import label_note
from circuits.graph.influence import edge_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.text import full_name, short_name, shorten

_LINE_LENGTH = 18
_MOST_TAGS = 40
"""Edges labelled with their strongest heads: the most influential of those that heads carry."""


@register("dot", suffix=".dot", description="Graphviz text")
def to_dot(graph: GraphData) -> Iterator[str]:
    """The graph as lines of DOT: one rank per layer from tokens (bottom) to logits (top), edges by sign and influence."""
    picture = graphviz.Digraph("circuit")
    # Circuits are wide: stretching ranks apart to a third of the width keeps edges apart and the page in proportion.
    picture.attr(rankdir="BT", bgcolor="white", nodesep="0.1", ranksep="0.5", ratio="0.35", outputorder="edgesfirst")
    picture.attr("node", fontname="Helvetica", fontsize="11", shape="box", height="0.3", margin="0.08,0.04")
    picture.attr("edge", arrowsize="0.5", fontname="Helvetica", fontsize="9", fontcolor="#374151")
    _add_ranks(picture, graph)
    *nodes, end = picture
    yield from nodes
    yield from _edges(graph)  # as they come: beside them the nodes are few
    yield end


def render(dot: Iterable[str], picture_format: str) -> bytes:
    """DOT text as `svg`, `png` or `pdf`.

    Raises `MissingProgramError` without the `dot` program, and `ValueError` with its words when it fails.
    """
    try:
        return bytes(graphviz.Source("".join(dot)).pipe(format=picture_format))
    except graphviz.ExecutableNotFound as error:
        raise MissingProgramError(
            "expected Graphviz's `dot` program on the PATH, given none; install Graphviz or use the `svg` format"
        ) from error
    except graphviz.CalledProcessError as error:
        words = (error.stderr or b"").decode("utf-8", errors="replace").strip()
        raise ValueError(
            f"expected Graphviz to draw the graph as {picture_format}, but `dot` failed ({words})"
        ) from error


for _format in ("svg", "png", "pdf"):
    register(
        f"dot-{_format}", suffix=f".{_format}", description=f"{_format.upper()} drawn by Graphviz", fallback="dot"
    )(lambda graph, picture_format=_format: render(to_dot(graph), picture_format))


def _add_ranks(picture: graphviz.Digraph, graph: GraphData) -> None:
    nodes = graph.nodes
    ids = nodes.ids()
    outputs = np.iinfo(np.int64).max  # logits come last whatever their layer says
    rank = np.where(nodes.kind == NodeKind.LOGIT, outputs, picture_rows(nodes))
    names = []
    for row in np.unique(rank).tolist():
        rows = np.flatnonzero(rank == row)
        rows = rows[np.argsort(nodes.position[rows], kind="stable")]
        title = "output" if row == outputs else row_title(row)
        names.append(f"rank {title}")
        with picture.subgraph() as line:
            line.attr(rank="same")
            line.node(names[-1], label=title, shape="plaintext", style="", fontcolor="#6b7280")
            for node in rows.tolist():
                _add_node(line, graph, node, ids[node])
    for below, above in itertools.pairwise(names):  # keeps layers apart that no edge joins
        picture.edge(below, above, style="invis")


def _add_node(line: graphviz.Digraph, graph: GraphData, row: int, name: str) -> None:
    nodes = graph.nodes
    kind = NodeKind(int(nodes.kind[row]))
    fill, stroke, text = NODE_COLOURS[kind]
    style = "filled,rounded,dashed" if nodes.unexpanded[row] else "filled,rounded"
    words = "; ".join(filter(None, (full_name(nodes, row), label_note(graph, row))))
    look = {"fillcolor": fill, "color": stroke, "fontcolor": text, "tooltip": graphviz.escape(words)}
    if kind is NodeKind.ERROR:
        look |= {"shape": "diamond", "style": "filled", "width": "0.16", "height": "0.16", "fixedsize": "true"}
        line.node(name, label="", **look)
        return
    if kind is NodeKind.POSITION:
        look["shape"] = "ellipse"
    line.node(name, label=_label(short_name(nodes, row)), style=style, **look)


def _label(text: str) -> str:
    """At most two lines, every character of the text taken literally by DOT."""
    before, arrow, after = text.partition(" → ")
    if arrow and len(text) > _LINE_LENGTH:
        lines = [shorten(before, _LINE_LENGTH), shorten(f"→ {after}", _LINE_LENGTH)]
    else:
        lines = textwrap.wrap(text, _LINE_LENGTH) or [""]
        lines = lines[:1] + [shorten(" ".join(lines[1:]), _LINE_LENGTH)] * (len(lines) > 1)
    # Doubled backslashes are literal, `\\n` is a line break; nohtml keeps "<b>" from being read as markup.
    return graphviz.nohtml("\\n".join(line.replace("\\", "\\\\") for line in lines))


def _edges(graph: GraphData) -> Iterator[str]:
    ids, edges, influence = graph.nodes.ids(), graph.edges, edge_influence(graph)
    shares = emphasis(influence).tolist()
    named = head_tags(graph, influence, most=_MOST_TAGS)
    columns = (edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), shares)
    rows = itertools.repeat(None, len(edges)) if graph.heads is None else graph.heads
    for edge, (source, target, weight, share, row) in enumerate(zip(*columns, rows, strict=True)):
        alpha = f"{round(255 * (0.2 + 0.8 * share)):02x}"
        heads = "" if row is None else f"; {row.text()}"
        width, label = f"{0.4 + 3.6 * share:.2f}", f' label="{named[edge]}"' if edge in named else ""
        # Written as text: nothing here needs DOT's quoting, which takes longer than all the rest.
        yield (
            f'\t"{ids[source]}" -> "{ids[target]}" [tooltip="{weight:+.4g}{heads}" '
            f'color="{EDGE_COLOURS[weight > 0]}{alpha}" penwidth={width}{label}]\n'
        )
