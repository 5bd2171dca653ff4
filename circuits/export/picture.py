"""What a picture of a circuit shows, before anything has a place: boxes, links between them, and the strongest paths.

The graph is untouched; the picture joins what a reader takes for one thing. A learned position belongs to the token of its
position, many outputs of one class are a group, and so are the features of a group that the graph carries
(`graph.with_groups`), which stands where its most influential member does. Other features with the same label at the same place
are a stack. An edge of such a box is the sum of its members' edges; edges inside a box are not drawn. Of the edges, those of
the strongest paths are emphasised, and the weakest others are counted instead of drawn.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from circuits.export.picture_text import edge_facts, head_tag, item_facts, item_text, joined_parts, listed, node_facts
from circuits.export.style import ATTENTION_MARK, MARKS, picture_rows
from circuits.graph.edges import GraphData
from circuits.graph.groups import stored_feature_groups
from circuits.graph.inclusion import stored_inclusion
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.outputs import output_groups
from circuits.graph.paths import StrongPath, strongest_paths

FEW_TOKENS = 24
"""Of a longer prompt, tokens are drawn only where their column holds something else."""
QUIET_LINKS = 60
"""Links beside those of the paths, the most influential ones; every box keeps its strongest link in and out as well."""


@dataclass(frozen=True)
class Item:
    """One box: a node, or several that are drawn as one."""

    nodes: tuple[int, ...]
    """Numbers in the table, the most influential first."""
    kind: NodeKind
    row: int
    """See `style.picture_rows`."""
    position: int
    mark: str
    """Shape that tells its kind, see `style.MARKS`."""
    name: str
    """What stands above the text: the name that a feature's label begins with, such as `Texas`; often empty."""
    text: str
    small: str
    """What is written below the text in small type, see `picture_text.item_facts`."""
    influence: float
    on_path: bool
    unexpanded: bool
    is_target: bool
    inclusion: float | None
    """Inclusion frequency (see `circuits.graph.inclusion`), of several nodes the largest; None where it is not known."""
    tooltip: str


@dataclass(frozen=True)
class Link:
    """The edges from one box to another."""

    source: int
    target: int
    """Numbers of items."""
    weight: float
    """Sum over the edges."""
    strength: float
    """In 0..1, relative to the strongest of its kind: on a path the path's share, elsewhere the link's influence."""
    on_path: bool
    heads: str
    """`L1H3 L0H2`: the heads that carry most of it; empty where none does."""
    tooltip: str


@dataclass(frozen=True)
class Picture:
    """Everything that is drawn, and how much is not."""

    items: tuple[Item, ...]
    links: tuple[Link, ...]
    """Those of paths last, the strongest at the end: they are drawn over the others."""
    paths: tuple[tuple[float, tuple[int, ...]], ...]
    """Share and items of the emphasised paths, in the order of `strongest_paths`."""
    answer: str
    """The target, or group of outputs, of the largest weight: `→ Austin (99.9 %)`."""
    n_nodes: int
    """Nodes of the graph that the items stand for."""
    n_edges: int
    """Edges of the graph that the links stand for, or that run inside a box."""


def picture_of(graph: GraphData, *, max_nodes: int) -> Picture:
    """The picture of a graph; of a larger one, targets, paths and the most influential other nodes up to `max_nodes`."""
    influence = node_influence(graph)
    paths = strongest_paths(graph)
    on_path = np.zeros(len(graph.nodes), dtype=bool)
    on_path[list(itertools.chain.from_iterable(path.nodes for path in paths))] = True
    shown = _shown(graph.nodes, influence, on_path, max_nodes)
    items, item_of = _items(graph, influence, stored_inclusion(graph), shown, on_path)
    shares: dict[tuple[int, int], float] = {}
    for (source, target), share in path_shares(paths).items():
        if (pair := (int(item_of[source]), int(item_of[target])))[0] != pair[1]:
            shares[pair] = max(share, shares.get(pair, 0.0))
    links, n_edges = _links(graph, items, item_of, shares)
    boxes = [(path.share, item_of[list(path.nodes)].tolist()) for path in paths]
    drawn_paths = tuple((share, tuple(box for box, _ in itertools.groupby(numbers))) for share, numbers in boxes)
    return Picture(items, links, drawn_paths, _answer(graph.nodes, items), int(shown.sum()), n_edges)


def _answer(nodes: NodeTable, items: Sequence[Item]) -> str:
    top = max(items, key=lambda item: nodes.output_weight[list(item.nodes)].sum())
    chance = f" ({top.small})" if top.kind is NodeKind.LOGIT and top.small else ""
    return f"→ {top.name or top.text}{chance}"


def _shown(nodes: NodeTable, influence: np.ndarray, on_path: np.ndarray, max_nodes: int) -> np.ndarray:
    """bool[N]: targets, paths, tokens of a short prompt, and the most influential others up to `max_nodes` in all.

    Of a long prompt, the `FEW_TOKENS` most influential tokens are among those others, and tokens of columns that show something
    else are added: a column needs its word.
    """
    is_token = nodes.mask(NodeKind.TOKEN)
    few = is_token.sum() <= FEW_TOKENS
    shown = nodes.mask(NodeKind.LOGIT) | nodes.is_target | on_path | (is_token & few)
    order = np.argsort(-influence, kind="stable")
    order = order[~shown[order]]
    order = order[~is_token[order] | (np.cumsum(is_token[order]) <= FEW_TOKENS)]
    shown[order[: max(max_nodes - int(shown.sum()), 0)]] = True
    return shown | (is_token & np.isin(nodes.position, nodes.position[shown]))


def _items(
    graph: GraphData, influence: np.ndarray, inclusion: np.ndarray | None, shown: np.ndarray, on_path: np.ndarray
) -> tuple[tuple[Item, ...], np.ndarray]:
    """The items by row, position and influence, and int64[N], the item of each node (-1 where it is not shown)."""
    nodes, rows = graph.nodes, picture_rows(graph.nodes)
    group_of = {node: group for group in output_groups(nodes) for node in group}
    groups = stored_feature_groups(graph)
    group_of |= {node: group.members for group in groups for node in group.members}
    names: dict[tuple[object, ...], str] = {group.members: group.name for group in groups}
    members: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for node in sorted(np.flatnonzero(shown).tolist(), key=lambda node: (nodes.kind[node], -influence[node])):
        kind, position, label = NodeKind(int(nodes.kind[node])), int(nodes.position[node]), nodes.label[node]
        if node in group_of:
            key: tuple[object, ...] = group_of[node]
        elif kind in (NodeKind.TOKEN, NodeKind.POSITION):
            key = ("input", position)
        elif kind is NodeKind.FEATURE and label.strip() and not nodes.is_target[node]:
            key = (int(rows[node]), position, label, bool(on_path[node]))
        else:
            key = ("alone", node)
        members[key].append(node)
    items = [
        _item(graph, numbers, names.get(key, ""), int(rows[numbers[0]]), influence, inclusion, on_path)
        for key, numbers in members.items()
    ]
    items.sort(key=lambda item: (item.row, item.position, -item.influence))
    item_of = np.full(len(nodes), -1)
    for number, item in enumerate(items):
        item_of[list(item.nodes)] = number
    return tuple(items), item_of


def _item(
    graph: GraphData,
    numbers: list[int],
    group: str,
    row: int,
    influence: np.ndarray,
    inclusion: np.ndarray | None,
    on_path: np.ndarray,
) -> Item:
    nodes, first = graph.nodes, numbers[0]
    kind = NodeKind(int(nodes.kind[first]))
    name, text = (group, f"{len(numbers)} features") if group else item_text(nodes, numbers)
    is_of_attention = kind is NodeKind.FEATURE and nodes.of_attention[first]
    return Item(
        nodes=tuple(numbers),
        kind=kind,
        row=row,
        position=int(nodes.position[first]),
        mark=ATTENTION_MARK if is_of_attention else MARKS[kind],
        name=name,
        text=text,
        small=item_facts(nodes, numbers),
        influence=float(influence[numbers].sum()),
        on_path=bool(on_path[numbers].any()),
        unexpanded=bool(nodes.unexpanded[numbers].all()),
        is_target=bool(nodes.is_target[numbers].any()),
        inclusion=None if inclusion is None else float(inclusion[numbers].max()),
        tooltip=listed(node_facts(graph, node, influence, inclusion) for node in numbers),
    )


def path_shares(paths: Sequence[StrongPath]) -> dict[tuple[int, int], float]:
    """(source, target) of every edge on a path -> share of the strongest path through it."""
    shares: dict[tuple[int, int], float] = {}
    for path in paths:
        for pair in itertools.pairwise(path.nodes):
            shares[pair] = max(path.share, shares.get(pair, 0.0))
    return shares


def _links(
    graph: GraphData, items: Sequence[Item], item_of: np.ndarray, shares: dict[tuple[int, int], float]
) -> tuple[tuple[Link, ...], int]:
    """The links that are drawn, and how many edges they stand for."""
    edges, influence = graph.edges, edge_influence(graph)
    chosen = np.flatnonzero((item_of[edges.source] >= 0) & (item_of[edges.target] >= 0))
    source, target = item_of[edges.source[chosen]], item_of[edges.target[chosen]]
    between, n_edges = source != target, int((source == target).sum())
    chosen, source, target = chosen[between], source[between], target[between]
    pairs, link_of = np.unique(source * len(items) + target, return_inverse=True)
    total = np.bincount(link_of, influence[chosen], minlength=len(pairs))
    ends = [divmod(pair, len(items)) for pair in pairs.tolist()]
    kept = [ends[number] for number in _kept(ends, total)]
    quiet = [pair for pair in kept if pair not in shares]
    by_pair = dict(zip(ends, range(len(pairs)), strict=True))
    loud = sorted(shares, key=lambda pair: shares[pair])
    best = {
        False: max((total[by_pair[pair]] for pair in quiet), default=0.0) or 1.0,
        True: max(shares.values(), default=1.0),
    }
    members = np.split(chosen[np.argsort(link_of, kind="stable")], np.cumsum(np.bincount(link_of, minlength=1))[:-1])
    links = []
    for pair in [*reversed(quiet), *loud]:
        numbers, on_path = members[by_pair[pair]], pair in shares
        strength = (shares[pair] if on_path else total[by_pair[pair]]) / best[on_path]
        links.append(
            _link(graph, pair, numbers[np.argsort(-influence[numbers], kind="stable")], float(strength), on_path)
        )
        n_edges += len(numbers)
    return tuple(links), n_edges


def _kept(ends: Sequence[tuple[int, int]], total: np.ndarray) -> list[int]:
    """Links to draw, the most influential first: `QUIET_LINKS`, and the strongest into and out of every item."""
    kept, begun, ended = [], set(), set()
    for rank, number in enumerate(np.argsort(-total, kind="stable").tolist()):
        source, target = ends[number]
        if rank < QUIET_LINKS or source not in begun or target not in ended:
            kept.append(number)
        begun.add(source)
        ended.add(target)
    return kept


def _link(graph: GraphData, pair: tuple[int, int], numbers: np.ndarray, strength: float, on_path: bool) -> Link:
    weight = float(graph.edges.weight[numbers].sum())
    rows = [None] * len(numbers) if graph.heads is None else graph.heads.rows(numbers)
    heads = "" if graph.heads is None else head_tag(joined_parts(row for row in rows if row is not None))
    lines = (edge_facts(graph, edge, row) for edge, row in zip(numbers.tolist(), rows, strict=True))
    return Link(*pair, weight, strength, on_path, heads, listed(lines))
