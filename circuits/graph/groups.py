"""Groups of nodes that a reader takes for one thing, and the graph among them.

A grouping is a way to read a graph, which keeps all of its nodes and edges. What flows between two groups is a sum over the
edges between their members, each as the share of the output that it carries (`edge_influence`), with the sign of its weight:

    influence[g -> h] = sum of edge influences                       what flows into a group is what flows into its members
    weight[g -> h]    = sum of edge influences x signs of weights    in -influence..influence; equal to it where all edges raise

Groups are stored as `graph.metadata["groups"]`, by node ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from circuits.graph.edge_heads import EdgeRow, ranges
from circuits.graph.edges import GraphData
from circuits.graph.influence import edge_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.text import shorten

GROUPS = "groups"
"""Key of the metadata: a list of objects with a `name`, the ids of the `members`, and `f1` where it is known."""
KINDS = {
    NodeKind.TOKEN: "tokens",
    NodeKind.POSITION: "tokens",
    NodeKind.ERROR: "errors",
    NodeKind.FEATURE: "features",
    NodeKind.LOGIT: "outputs",
}
"""Kind of the group that a node may be in."""


@dataclass(frozen=True)
class Group:
    """Nodes of one kind that are read as one."""

    name: str
    members: tuple[int, ...]
    """Numbers of the nodes, ascending."""
    kind: str
    """`tokens` (with their learned positions), `errors`, `features` or `outputs`."""
    f1: float | None = None
    """How well the name detects the members that it was taken from, see `circuits.graph.group_names`; None if not known."""


@dataclass(frozen=True)
class GroupEdge:
    """All edges from the members of one group to those of another."""

    source: int
    target: int
    """Numbers of the groups."""
    weight: float
    """Signed share of the output: edge influences with the signs of the weights, summed."""
    influence: float
    """Share of the output, summed over the edges."""
    parts: EdgeRow | None
    """`weight` divided into the direct stream, the heads listed for the edges, and the rest; None where heads are unknown."""

    @property
    def heads(self) -> str:
        """`L1H3 62 %, direct 30 %`: what carries the edge, in words; empty where that is unknown."""
        return "" if self.parts is None else self.parts.text()


@dataclass(frozen=True, eq=False)
class Grouping:
    """Every node of a graph in exactly one group.

    Raises `ValueError` for a node in no group, in two, or in one of another kind, or for members that do not ascend.
    """

    graph: GraphData
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        nodes, ids = self.graph.nodes, self.graph.nodes.ids()
        for group in self.groups:
            members = group.members
            if not members or list(members) != sorted(set(members)) or not 0 <= members[0] <= members[-1] < len(ids):
                expected = f"ascending numbers of nodes in 0..{len(ids) - 1}"
                raise ValueError(f"group {group.name!r:.60}: expected {expected}, given {shorten(str(members), 60)}")
            for node in members:
                if (kind := KINDS[NodeKind(int(nodes.kind[node]))]) != group.kind:
                    raise ValueError(
                        f"group {group.name!r:.60}: expected nodes for a group of {group.kind}, given {ids[node]} of {kind}"
                    )
        times = np.bincount([node for group in self.groups for node in group.members], minlength=len(ids))
        for node in np.flatnonzero(times != 1)[:1].tolist():
            raise ValueError(f"groups: expected every node in exactly one group, given {ids[node]} in {times[node]}")

    @classmethod
    def build(
        cls, graph: GraphData, names: Sequence[str], members: Sequence[Sequence[int]], f1: Sequence[float | None]
    ) -> Grouping:
        """A grouping from columns; the kind of a group is that of its first member."""
        rows = zip(names, members, f1, strict=True)
        return cls(
            graph, tuple(Group(name, tuple(nodes), _kind(graph, nodes[0]), score) for name, nodes, score in rows)
        )

    @classmethod
    def of(cls, graph: GraphData) -> Grouping:
        """The groups that a graph carries in its metadata; a node that none of them lists is a group of its own, named by id.

        Raises:
            ValueError: it carries none, or they list a node that the graph does not have, or one twice.
        """
        if GROUPS not in graph.metadata:
            raise ValueError("groups: expected a graph with groups, given one without; `graph.group()` makes them")
        ids = graph.nodes.ids()
        number, left = {name: row for row, name in enumerate(ids)}, dict.fromkeys(range(len(ids)))
        names, parts, f1 = [], [], []
        for stored in graph.metadata[GROUPS]:
            if unknown := [name for name in stored["members"] if name not in number]:
                raise ValueError(
                    f"group {stored['name']!r:.60}: expected ids of nodes of the graph, given {shorten(unknown[0], 60)!r}"
                )
            parts.append(sorted(number[name] for name in stored["members"]))
            names.append(stored["name"])
            f1.append(stored.get("f1"))
            for node in parts[-1]:
                left.pop(node, None)
        alone = [ids[node] for node in left]
        return cls.build(graph, [*names, *alone], [*parts, *([node] for node in left)], [*f1, *(None for _ in alone)])

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def group_of(self) -> np.ndarray:
        """int64[N], the number of the group that each node is in."""
        numbers = np.empty(len(self.graph.nodes), dtype=np.int64)
        for number, group in enumerate(self.groups):
            numbers[list(group.members)] = number
        return numbers

    def edges(self) -> tuple[GroupEdge, ...]:
        """The graph among the groups, the most influential edges first: one for every two groups with an edge between them.

        Edges inside a group are left out; `internal` has their influence.
        """
        edges, influence = self.graph.edges, edge_influence(self.graph)
        source, target = self.group_of[edges.source], self.group_of[edges.target]
        between = np.flatnonzero(source != target)
        pairs, pair_of = np.unique(source[between] * len(self) + target[between], return_inverse=True)
        mass = influence[between]
        total = np.bincount(pair_of, mass, minlength=len(pairs))
        signed = np.bincount(pair_of, mass * np.sign(edges.weight[between]), minlength=len(pairs))
        parts = self._parts(between, mass, pair_of, len(pairs))
        return tuple(
            GroupEdge(*divmod(int(pairs[pair]), len(self)), float(signed[pair]), float(total[pair]), parts[pair])
            for pair in np.argsort(-total, kind="stable").tolist()
        )

    def internal(self) -> np.ndarray:
        """float64[G], influence of the edges inside each group."""
        edges, influence = self.graph.edges, edge_influence(self.graph)
        source, target = self.group_of[edges.source], self.group_of[edges.target]
        return np.bincount(target, np.where(source == target, influence, 0.0), minlength=len(self))

    def _parts(
        self, between: np.ndarray, mass: np.ndarray, pair_of: np.ndarray, n_pairs: int
    ) -> list[EdgeRow] | list[None]:
        """The parts of the weight of every pair of groups: of each edge, its parts as shares of its signed influence."""
        heads = self.graph.heads
        if heads is None:
            return [None] * n_pairs
        size = np.abs(self.graph.edges.weight[between].astype(np.float64))
        scale = np.divide(mass, size, out=np.zeros_like(mass), where=size > 0)
        direct, rest = (
            np.bincount(pair_of, scale * part[between], minlength=n_pairs).tolist()
            for part in (heads.direct, heads.rest)
        )
        counts = heads.indptr[between + 1] - heads.indptr[between]
        listed = ranges(heads.indptr[between], heads.indptr[between + 1])
        n_heads = int(heads.head.max(initial=0)) + 1
        head = heads.layer[listed].astype(np.int64) * n_heads + heads.head[listed]
        n_names = int(head.max(initial=0)) + 1
        unique, key_of = np.unique(np.repeat(pair_of, counts) * n_names + head, return_inverse=True)
        weight = np.bincount(key_of, np.repeat(scale, counts) * heads.weight[listed], minlength=len(unique))
        found: list[list[tuple[int, int, float]]] = [[] for _ in range(n_pairs)]
        for place in np.argsort(-np.abs(weight), kind="stable").tolist():
            pair, name = divmod(int(unique[place]), n_names)
            found[pair].append((*divmod(name, n_heads), float(weight[place])))
        return [EdgeRow(*parts) for parts in zip(direct, rest, found, strict=True)]

    def metadata(self) -> list[dict[str, Any]]:
        """What `graph.metadata["groups"]` holds of them."""
        ids = self.graph.nodes.ids()
        return [
            {"name": group.name, "members": [ids[node] for node in group.members], "f1": group.f1}
            for group in self.groups
        ]


def stored_feature_groups(graph: GraphData) -> list[Group]:
    """The groups of several features that a graph carries; none if it carries no groups."""
    groups = Grouping.of(graph).groups if GROUPS in graph.metadata else ()
    return [group for group in groups if group.kind == "features" and len(group.members) > 1]


def without_nodes(groups: Sequence[dict[str, Any]], removed: set[str]) -> list[dict[str, Any]]:
    """Groups as they are stored, without the nodes of some ids, and without those that are empty then."""
    left = [{**group, "members": [name for name in group["members"] if name not in removed]} for group in groups]
    return [group for group in left if group["members"]]


def are_groups(value: object) -> bool:
    """Whether this may be metadata of the key `GROUPS`."""
    return isinstance(value, list) and all(map(_is_group, value))


def _is_group(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    members, f1 = value.get("members"), value.get("f1")
    are_ids = isinstance(members, list) and members and all(isinstance(name, str) for name in members)
    is_score = f1 is None or (isinstance(f1, int | float) and not isinstance(f1, bool) and 0 <= f1 <= 1)
    return bool(are_ids) and is_score


def _kind(graph: GraphData, node: int) -> str:
    return KINDS[NodeKind(int(graph.nodes.kind[node]))]
