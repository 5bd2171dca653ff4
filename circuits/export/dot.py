"""DOT text for Graphviz, and pictures where its `dot` program is installed."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping

import graphviz
import numpy as np

from circuits.export.picture import head_tag, item_facts, item_text, path_shares
from circuits.export.style import (
    EDGE_COLOURS,
    NODE_COLOURS,
    PATH_COLOURS,
    QUIET_EDGE,
    link_width,
    picture_rows,
    row_title,
)
from circuits.export.text_metrics import wrap
from circuits.graph.edges import GraphData
from circuits.graph.exporters import MissingProgramError, register
from circuits.graph.feature_labels import label_note
from circuits.graph.influence import edge_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.paths import strongest_paths
from circuits.graph.text import full_name

_LABEL_WIDTH, _FONT, _MOST_LINES = 130.0, 11.0, 3


@register("dot", suffix=".dot", description="Graphviz text")
def to_dot(graph: GraphData) -> Iterator[str]:
    """The graph as lines of DOT: one rank per layer from tokens (bottom) to logits (top).

    The edges of the strongest paths are bold, coloured by sign and named after their heads; all others are thin and grey.
    """
    picture = graphviz.Digraph("circuit")
    # Circuits are wide: stretching ranks apart to a third of the width keeps edges apart and the page in proportion.
    picture.attr(rankdir="BT", bgcolor="white", nodesep="0.1", ranksep="0.5", ratio="0.35", outputorder="edgesfirst")
    picture.attr("node", fontname="Helvetica", fontsize=f"{_FONT:g}", shape="box", height="0.3", margin="0.08,0.04")
    picture.attr("edge", arrowsize="0.5", fontname="Helvetica", fontsize="9", fontcolor="#374151")
    paths = strongest_paths(graph)
    _add_ranks(picture, graph, set(itertools.chain.from_iterable(path.nodes for path in paths)))
    *nodes, end = picture
    yield from nodes
    yield from _edges(graph, path_shares(paths))  # as they come: beside them the nodes are few
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


def _add_ranks(picture: graphviz.Digraph, graph: GraphData, on_path: Container[int]) -> None:
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
                _add_node(line, graph, node, ids[node], on_path=node in on_path)
    for below, above in itertools.pairwise(names):  # keeps layers apart that no edge joins
        picture.edge(below, above, style="invis")


def _add_node(line: graphviz.Digraph, graph: GraphData, row: int, name: str, *, on_path: bool) -> None:
    nodes = graph.nodes
    kind = NodeKind(int(nodes.kind[row]))
    fill, stroke, text = PATH_COLOURS if on_path and kind is NodeKind.FEATURE else NODE_COLOURS[kind]
    style = "filled,rounded,dashed" if nodes.unexpanded[row] else "filled,rounded"
    words = "; ".join(filter(None, (full_name(nodes, row), label_note(graph, row))))
    look = {"fillcolor": fill, "color": stroke, "fontcolor": text, "tooltip": graphviz.escape(words)}
    look |= {"penwidth": "1.6"} if on_path else {}
    if kind is NodeKind.ERROR:
        look |= {"shape": "diamond", "style": "filled", "width": "0.16", "height": "0.16", "fixedsize": "true"}
        line.node(name, label="", **look)
        return
    if kind is NodeKind.POSITION:
        look["shape"] = "ellipse"
    line.node(name, label=_label(item_text(nodes, row), item_facts(nodes, [row])), style=style, **look)


def _label(text: str, facts: str) -> str:
    """A few lines, every character of the text taken literally by DOT."""
    lines = [*wrap(text, _LABEL_WIDTH, _FONT, _MOST_LINES), *([facts] if facts else [])]
    # Doubled backslashes are literal, `\\n` is a line break; nohtml keeps "<b>" from being read as markup.
    return graphviz.nohtml("\\n".join(line.replace("\\", "\\\\") for line in lines))


def _edges(graph: GraphData, shares: Mapping[tuple[int, int], float]) -> Iterator[str]:
    ids, edges, influence = graph.nodes.ids(), graph.edges, edge_influence(graph)
    most = {True: max(shares.values(), default=1.0), False: influence.max(initial=0.0) or 1.0}
    columns = (edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), influence.tolist())
    rows = itertools.repeat(None, len(edges)) if graph.heads is None else graph.heads
    for source, target, weight, crossing, row in zip(*columns, rows, strict=True):
        on_path = (source, target) in shares
        strength = (shares[source, target] if on_path else crossing) / most[on_path]
        heads = "" if row is None else f"; {row.text()}"
        colour = EDGE_COLOURS[weight > 0] if on_path else QUIET_EDGE
        look = f'color="{colour}" penwidth={link_width(strength, on_path=on_path):.2f}'
        look += "" if weight > 0 else " style=dashed"
        look += f' label="{head_tag(row)}"' if on_path and row is not None else ""
        # Written as text: nothing here needs DOT's quoting, which takes longer than all the rest.
        yield f'\t"{ids[source]}" -> "{ids[target]}" [tooltip="{weight:+.4g}{heads}" {look}]\n'
