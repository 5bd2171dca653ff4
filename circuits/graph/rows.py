"""Nodes and edges of a graph as rows a person can read: plain values, a table in a terminal, HTML in a notebook."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table

from circuits.graph.edges import GraphData
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind, Part
from circuits.graph.text import parse_feature_name, printable, shorten
from replacement.console import first_rows, table
from replacement.notebook import repr_html, to_html
from replacement.number_checks import integer

if TYPE_CHECKING:
    from replacement import Intervention

_WIDTH = 140
SIMILAR = 4
"""Nodes that an error message proposes instead of an unknown one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """One node of a graph."""

    number: int
    """Row in `CircuitGraph.nodes`."""
    id: str
    kind: str
    """`token`, `position`, `error`, `feature` or `logit`."""
    part: str
    """`mlp` or `attention`: whose output an error or feature is of; `mlp` elsewhere."""
    layer: int
    index: int
    position: int
    label: str
    activation: float
    influence: float
    """Share of the output that reaches the node through all paths; a target's own share included."""

    @property
    def name(self) -> str:
        """`2/345@7` or `attention:2/345@7` for a feature, as `CircuitGraph.node` and targets read it; the id of other nodes."""
        if self.kind != "feature":
            return self.id
        return f"{'attention:' if self.part == 'attention' else ''}{self.layer}/{self.index}@{self.position}"

    def intervention(
        self, *, activation: float | None = None, scale: float | None = None, add: float | None = None
    ) -> Intervention:
        """The change of this feature at its position, for `ReplacementModel.intervene`.

        >>> model.intervene(prompt, [graph.node("2/345@7").intervention(scale=0.0)])    # doctest: +SKIP

        Args:
            activation: what it is set to.
            scale: multiple of its activation in the run; 0 suppresses it.
            add: what is added to that.

        Raises:
            ValueError: the node is no feature, or not exactly one of the three is given.
        """
        if self.kind != "feature":
            raise ValueError(f"only features can be changed, and node {self.id} is of kind {self.kind}")
        from replacement.splicing.intervention import Intervention

        return Intervention(
            layer=self.layer,
            index=self.index,
            position=self.position,
            part=self.part,
            activation=activation,
            scale=scale,
            add=add,
        )

    def cells(self) -> tuple[str, ...]:
        """The columns of `NODE_HEADS`."""
        activation = f"{self.activation:.3g}" if self.kind == "feature" and self.activation else ""
        return self.name, self.kind, shorten(printable(self.label), 60), activation, f"{self.influence:.4f}"

    def __rich__(self) -> Table:
        return Rows((self,), NODE_HEADS).__rich__()

    _repr_html_ = repr_html


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeRow:
    """One edge of a graph."""

    number: int
    """Row in `CircuitGraph.edges`."""
    source: NodeRow
    target: NodeRow
    weight: float
    """Signed direct effect of the source on the target's pre-activation or logit."""
    influence: float
    """Share of the output that crosses the edge."""
    heads: str
    """The heads that carry it, in words; empty where they are not known."""

    def cells(self) -> tuple[str, ...]:
        """The columns of `EDGE_HEADS`."""
        ends = (f"{end.name} {shorten(printable(end.label), 30)}".strip() for end in (self.source, self.target))
        return *ends, f"{self.weight:+.4g}", f"{self.influence:.4f}", self.heads

    def __rich__(self) -> Table:
        return Rows((self,), EDGE_HEADS).__rich__()

    _repr_html_ = repr_html


NODE_HEADS = ("node", "kind", "label", "activation", "influence")
EDGE_HEADS = ("source", "target", "weight", "influence", "heads")
_TEXTS = ("kind", "label", "target", "heads")
Row = TypeVar("Row", NodeRow, EdgeRow)


@dataclass(frozen=True, repr=False)
class Rows(Sequence[Row], Generic[Row]):
    """Rows in order; shown as a table."""

    rows: tuple[Row, ...]
    heads: tuple[str, ...] = field(compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Rows[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | Rows[Row]:
        return Rows(self.rows[place], self.heads) if isinstance(place, slice) else self.rows[place]

    def __rich__(self) -> Table:
        return table(*self.heads, rows=(row.cells() for row in self.rows), texts=_TEXTS)

    def __repr__(self) -> str:
        console = Console(width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as captured:
            console.print(self._first(), highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        return to_html(self._first())

    def _first(self) -> RenderableType:
        """The rows that `repr` and notebooks show; indexing and iteration give all."""
        return first_rows(*self.heads, rows=(row.cells() for row in self.rows), n_rows=len(self), texts=_TEXTS)


def top_nodes(graph: GraphData, count: int | None, *kinds: NodeKind) -> Rows[NodeRow]:
    """The nodes of some kinds, or of all, with the largest influence (a target's own share included)."""
    influence = node_influence(graph) + graph.nodes.output_weight
    candidates = np.flatnonzero(graph.nodes.mask(*(kinds or tuple(NodeKind))))
    order = candidates[np.argsort(-influence[candidates], kind="stable")][: _checked(count)]
    return Rows(node_rows(graph, order, influence), NODE_HEADS)


def top_edges(graph: GraphData, count: int | None) -> Rows[EdgeRow]:
    """The edges with the largest influence."""
    influence = edge_influence(graph)
    order = np.argsort(-influence, kind="stable")[: _checked(count)]
    source, target = graph.edges.source[order], graph.edges.target[order]
    mass = node_influence(graph) + graph.nodes.output_weight
    ends = zip(node_rows(graph, source, mass), node_rows(graph, target, mass), strict=True)
    rows = (
        EdgeRow(
            number=edge,
            source=source_row,
            target=target_row,
            weight=float(graph.edges.weight[edge]),
            influence=float(influence[edge]),
            heads="" if graph.heads is None else graph.heads.text(edge),
        )
        for edge, (source_row, target_row) in zip(order.tolist(), ends, strict=True)
    )
    return Rows(tuple(rows), EDGE_HEADS)


def node_rows(graph: GraphData, numbers: np.ndarray, influence: np.ndarray) -> tuple[NodeRow, ...]:
    """Rows of the nodes of some numbers, with `influence` (float64[N]) noted."""
    nodes, ids = graph.nodes, graph.nodes.ids()
    return tuple(
        NodeRow(
            number=number,
            id=ids[number],
            kind=NodeKind(int(nodes.kind[number])).name.lower(),
            part=Part(int(nodes.part[number])).name.lower(),
            layer=int(nodes.layer[number]),
            index=int(nodes.index[number]),
            position=int(nodes.position[number]),
            label=nodes.label[number],
            activation=float(nodes.activation[number]),
            influence=float(influence[number]),
        )
        for number in numbers.tolist()
    )


def node_number(graph: GraphData, name: str | int) -> int:
    """Row of a node given by number, id, or the name of a feature such as `2/345@7` (a negative position counts from the end).

    Raises:
        ValueError: there is no such node; similar ones are named.
    """
    nodes = graph.nodes
    if isinstance(name, int | np.integer) and not isinstance(name, bool):
        if not 0 <= name < len(nodes):
            raise ValueError(f"node: expected a number in 0..{len(nodes) - 1}, given {name}")
        return int(name)
    if not isinstance(name, str):
        raise ValueError(f"node: expected a name, an id or a number, given {type(name).__name__}")
    ids, name = nodes.ids(), name.strip()
    if name in ids:
        return ids.index(name)
    if "/" not in name:
        similar = difflib.get_close_matches(shorten(name, 60), ids, n=SIMILAR, cutoff=0.5)
        hint = f"; similar ones: {', '.join(similar)}" if similar else ""
        raise ValueError(f"node: the graph has no node {shorten(name, 60)!r}{hint}")
    part, layer, index, position = parse_feature_name(name)
    position += len(graph.metadata["tokens"]) if position < 0 else 0
    features = nodes.mask(NodeKind.FEATURE) & (nodes.of_attention == (part == "attention"))
    same = features & (nodes.layer == min(layer, 2**31 - 1)) & (nodes.index == min(index, 2**62))
    matches = np.flatnonzero(same & (nodes.position == min(position, 2**31 - 1)))
    if not len(matches):
        places = ", ".join(map(str, nodes.position[same].tolist()))
        known = f"; it has that feature at {places}" if places else ""
        raise ValueError(f"node: the graph has no feature {shorten(name, 60)}{known}")
    return int(matches[0])


def edge_number(graph: GraphData, text: str) -> int:
    """Row of the edge written `SOURCE->TARGET`, both ends as `node_number` reads them.

    Raises:
        ValueError: another form, a node that is not in the graph, or no such edge (the target's strongest sources are named).
    """
    ends = [end.strip() for end in text.split("->", 1)]
    if len(ends) != 2 or not all(ends):
        raise ValueError(f"edge: expected two node ids as SOURCE->TARGET, given {shorten(text, 60)!r}")
    try:
        source, target = (node_number(graph, end) for end in ends)
    except ValueError as error:
        raise ValueError(f"edge: {str(error).removeprefix('node: ')}") from error
    into = graph.edges.into(np.array([target]))
    matches = into[graph.edges.source[into] == source]
    if not len(matches):
        ids = graph.nodes.ids()
        strongest = into[np.argsort(-np.abs(graph.edges.weight[into]), kind="stable")][:SIMILAR]
        names = ", ".join(ids[graph.edges.source[number]] for number in strongest)
        known = f"{ids[target]} is reached from {names or 'no node'}"
        raise ValueError(f"edge: the graph has no edge {ids[source]}->{ids[target]}; {known}")
    return int(matches[0])


def _checked(count: int | None) -> int | None:
    if count is not None and integer("the count", count) < 1:
        raise ValueError(f"expected a count of at least 1, given {count}")
    return count
