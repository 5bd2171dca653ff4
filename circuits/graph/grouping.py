"""Which features are read as one: those that do the same, found by complete linkage and a loss that sets the number of groups.

What a feature does is told by its profiles: what flows into it from every node, what flows out of it into every node (edge
influences with the signs of their weights) and, where it is given, where it fires (its activations on probe prompts). Each
is scaled to length 1; two features are as alike as the kind of profile in which they are least alike (its cosine).

Loss. A reader who knows a group expects of each member what the others do: their mean profile, weighted by influence.

    e_i = max over kinds of |profile_i - mean of the other members' profiles|^2        1 for a feature on its own
    L   = sum_i I_i e_i / sum_i I_i                                                     I: influence

L is the share of the features' influence whose course is still to be told when the groups are known: a feature on its own is to
be told in full, a member as far as it differs from the others. Two features are joined if this says more than telling both
apart (a cosine above 1/2), whatever their number. Of all partitions that cut the tree of complete linkage the one of the least
L is found exactly, from the leaves upwards.

Then profiles are taken over groups instead of nodes, and the features are grouped again, until their number stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.feature_labels import HINT, label_facts, split_heading
from circuits.graph.groups import Grouping, distinct_names
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.outputs import group_name, output_groups
from circuits.graph.text import printable, short_name, shorten
from replacement.number_checks import whole_number
from replacement.token_texts import SPACE

ROUNDS = 10
"""Rounds of grouping at most; each has fewer groups than the one before."""
DIGITS = 9
"""Decimals of cosines that count, so that the order of a sum decides nothing."""
LONGEST_NAME = 40


def group(
    graph: GraphData,
    *,
    max_groups: int | None = None,
    neighbours: int | None = 1,
    signatures: np.ndarray | None = None,
) -> Grouping:
    """Every node of a graph in a group; see `CircuitGraph.group`."""
    if max_groups is not None:
        whole_number("max_groups", max_groups, least=1)
    if neighbours is not None:
        whole_number("neighbours", neighbours, least=0)
    if signatures is not None:
        _check_signatures(signatures, len(graph.nodes))
    nodes, influence = graph.nodes, node_influence(graph) + graph.nodes.output_weight
    others = _fixed_groups(graph)
    features = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & ~nodes.is_target)
    features = features[_canonical_order(graph, features, influence)]
    coordinate = np.arange(len(nodes))
    for members in others:
        coordinate[members] = members[0]
    parts = [[node] for node in features.tolist()]
    for _ in range(ROUNDS if len(features) else 0):
        evidence = _evidence(graph, features, coordinate, signatures)
        alike = _alike(evidence, nodes.position[features], neighbours)
        chosen = _least_loss(evidence, alike, np.maximum(influence[features], 1e-12))
        found = [features[numbers].tolist() for numbers in chosen]
        settled = len(found) == len(parts)
        parts = found
        for members in parts:
            coordinate[members] = min(members)
        if settled:
            break
    return _named(graph, [*others, *_capped(parts, influence, max_groups)], influence)


def _check_signatures(signatures: np.ndarray, n_nodes: int) -> None:
    if signatures.ndim != 2 or len(signatures) != n_nodes:
        raise ValueError(
            f"signatures: expected a row for each of {n_nodes} nodes, given an array of {signatures.shape}"
        )
    if signatures.dtype.kind not in "fiub" or not np.isfinite(signatures).all():
        raise ValueError("signatures: expected finite numbers, given others")


def _fixed_groups(graph: GraphData) -> list[list[int]]:
    """Tokens with the positions at their place; all errors; outputs that read as one answer; other targets alone."""
    nodes = graph.nodes
    inputs: dict[int, list[int]] = defaultdict(list)
    for node in np.flatnonzero(nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)).tolist():
        inputs[int(nodes.position[node])].append(node)
    errors = np.flatnonzero(nodes.mask(NodeKind.ERROR)).tolist()
    joined = [sorted(members) for members in output_groups(nodes)]
    alone = nodes.mask(NodeKind.LOGIT) | nodes.is_target
    alone[[node for members in joined for node in members]] = False
    return [
        *inputs.values(),
        *([errors] if errors else []),
        *joined,
        *([node] for node in np.flatnonzero(alone).tolist()),
    ]


def _canonical_order(graph: GraphData, features: np.ndarray, influence: np.ndarray) -> np.ndarray:
    """An order that does not depend on numbers of features: of features that are equally alike, the first are joined first."""
    nodes = graph.nodes
    exact = np.array([float(f"{value:.9e}") for value in influence[features]])
    label = np.array([nodes.label[node] for node in features.tolist()])
    keys = (
        nodes.activation[features],
        label,
        -exact,
        nodes.part[features],
        nodes.layer[features],
        nodes.position[features],
    )
    return np.lexsort(keys)


@dataclass(frozen=True)
class _Evidence:
    """Cosines of F features, by kind of profile: float32[F, F] and, of each feature, whether its profile is known."""

    cosines: list[np.ndarray]
    known: list[np.ndarray]
    heading: np.ndarray
    """int64[F], a number for every name that labels begin with; -1 where there is none."""


def _evidence(
    graph: GraphData, features: np.ndarray, coordinate: np.ndarray, signatures: np.ndarray | None
) -> _Evidence:
    edges, n_nodes = graph.edges, len(graph.nodes)
    row = np.full(n_nodes, -1)
    row[features] = np.arange(len(features))
    _, column = np.unique(coordinate, return_inverse=True)
    signed, target = edge_influence(graph) * np.sign(edges.weight), edges.target
    profiles = [
        _profiles(row[target], column[edges.source], edges.weight, len(features)),
        _profiles(row[edges.source], column[target], signed, len(features)),
    ]
    if signatures is not None:
        profiles.append(np.asarray(signatures, dtype=np.float64)[features])
    cosines, known = [], []
    for profile in profiles:
        length = np.linalg.norm(profile, axis=1, keepdims=True)
        unit = np.divide(profile, length, out=np.zeros_like(profile), where=length > 0)
        cosines.append(np.round(unit @ unit.T, DIGITS))
        known.append(length[:, 0] > 0)
    names = [split_heading(printable(graph.nodes.label[node]))[0] for node in features.tolist()]
    numbers = {name: number for number, name in enumerate(sorted(set(filter(None, names))))}
    return _Evidence(cosines, known, np.array([numbers.get(name, -1) for name in names]))


def _profiles(row: np.ndarray, column: np.ndarray, weight: np.ndarray, n_rows: int) -> np.ndarray:
    """float64[F, columns in use], sums of the weights of edges by row and column; a row of -1 is left out."""
    chosen = row >= 0
    used, place = np.unique(column[chosen], return_inverse=True)
    cells = np.bincount(row[chosen] * len(used) + place, weight[chosen], minlength=n_rows * len(used))
    return cells.reshape(n_rows, len(used))


def _alike(evidence: _Evidence, position: np.ndarray, neighbours: int | None) -> np.ndarray:
    """float64[F, F], how alike features are: -1 where they may not be joined."""
    alike = np.full((len(position), len(position)), np.inf)
    for cosine, known in zip(evidence.cosines, evidence.known, strict=True):
        np.minimum(alike, np.where(known[:, None] & known, cosine, np.inf), out=alike)
    alike[np.isinf(alike)] = 0.0
    heading = evidence.heading
    both = (heading[:, None] >= 0) & (heading >= 0)
    alike = np.where(both, (alike + (heading[:, None] == heading)) / 2, alike)
    if neighbours is not None:
        alike[np.abs(position[:, None] - position) > neighbours] = -1.0
    return alike


def _merges(alike: np.ndarray) -> Iterator[tuple[int, int]]:
    """Complete linkage: pairs of clusters to join, named by their first member, as a chain of nearest neighbours finds them.

    No clusters are joined that hold features with nothing in common.
    """
    alike = alike.copy()
    np.fill_diagonal(alike, -1.0)
    active, chain = np.ones(len(alike), dtype=bool), list[int]()
    while active.any():
        if not chain:
            chain.append(int(np.flatnonzero(active)[0]))
        last = chain[-1]
        best = int(alike[last].argmax())
        if alike[last, best] <= 0:
            active[last] = False
            alike[last], alike[:, last] = -1.0, -1.0
            chain.pop()
            continue
        if len(chain) > 1 and alike[last, chain[-2]] >= alike[last, best]:
            first, second = sorted(chain[-2:])
            del chain[-2:]
            yield first, second
            alike[first] = np.minimum(alike[first], alike[second])
            alike[:, first] = alike[first]
            alike[first, first] = -1.0
            alike[second], alike[:, second] = -1.0, -1.0
            active[second] = False
        else:
            chain.append(best)


def _least_loss(evidence: _Evidence, alike: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """Members of every group of the partition of least loss among those that cut the tree of complete linkage."""
    whole = {number: np.array([number]) for number in range(len(weight))}  # cluster -> all of its members
    best = {number: (float(weight[number]), [members]) for number, members in whole.items()}
    for first, second in _merges(alike):
        whole[first] = np.concatenate([whole[first], whole.pop(second)])
        apart_first, apart_second = best[first], best.pop(second)
        apart = apart_first[0] + apart_second[0]
        joined = _loss(evidence, whole[first], weight)
        best[first] = (
            (joined, [whole[first]]) if joined < apart * (1 - 1e-9) else (apart, apart_first[1] + apart_second[1])
        )
    return [members for _, groups in best.values() for members in groups]


def _loss(evidence: _Evidence, members: np.ndarray, weight: np.ndarray) -> float:
    """Sum over the members of influence x e."""
    w = weight[members]
    worst = np.full(len(members), -np.inf)
    for cosine, known in zip(evidence.cosines, evidence.known, strict=True):
        np.maximum(worst, _left_out(cosine[np.ix_(members, members)], known[members], w), out=worst)
    worst[np.isinf(worst)] = 1.0
    heading = evidence.heading[members]
    same = (heading[:, None] == heading).astype(np.float64)
    named = _left_out(same, heading >= 0, w)
    return float(w @ np.where(np.isinf(named), worst, (worst + named) / 2))


def _left_out(cosine: np.ndarray, known: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64[m], |profile - mean of the others'|^2 of every member; -inf where it or all others are unknown."""
    w = np.where(known, weight, 0.0)
    total = w.sum() - w  # of the others
    with_all = cosine @ w
    own = w * np.where(known, 1.0, 0.0)
    product = with_all - own  # profile . sum of the others
    square = w @ with_all - 2 * w * with_all + w * own
    with np.errstate(divide="ignore", invalid="ignore"):
        error = 1.0 - 2 * product / total + square / total**2
    return np.where(known & (total > 0), error, -np.inf)


def _capped(parts: list[list[int]], influence: np.ndarray, max_groups: int | None) -> list[list[int]]:
    """The groups, the most influential first; of more than `max_groups`, the least influential are put together."""
    parts = sorted((sorted(members) for members in parts), key=lambda members: (-influence[members].sum(), members))
    if max_groups is None or len(parts) <= max_groups:
        return parts
    rest = sorted(node for members in parts[max_groups - 1 :] for node in members)
    return [*parts[: max_groups - 1], rest]


def _named(graph: GraphData, parts: Sequence[Sequence[int]], influence: np.ndarray) -> Grouping:
    nodes, ids = graph.nodes, graph.nodes.ids()
    groups, further = [], []
    for members in sorted(parts, key=lambda members: (nodes.kind[members[0]], nodes.position[members[0]], members[0])):
        ordered = sorted(members, key=lambda node: (-influence[node], node))
        kind = NodeKind(int(nodes.kind[ordered[0]]))
        name, f1 = _name(graph, kind, ordered, influence)
        groups.append((name, tuple(sorted(members)), kind, f1))
        further.append((f"@{nodes.position[ordered[0]]}", f"({ids[ordered[0]]})"))
    names = distinct_names([name for name, *_ in groups], further)
    return Grouping.build(graph, names, [members for _, members, *_ in groups], [f1 for *_, f1 in groups])


def _name(graph: GraphData, kind: NodeKind, ordered: list[int], influence: np.ndarray) -> tuple[str, float | None]:
    """Name of a group, and the mean F1 of the labels that gave it, weighted by influence.

    Args:
        ordered: the members, the most influential first.
    """
    nodes = graph.nodes
    if kind is NodeKind.ERROR:
        return "errors", None
    if kind is NodeKind.LOGIT and len(ordered) > 1:
        return group_name(nodes, ordered), None
    if kind is not NodeKind.FEATURE:
        token = next((node for node in ordered if nodes.kind[node] != NodeKind.POSITION), ordered[0])
        text = short_name(nodes, token)
        return text.strip(SPACE) or text, None
    names = [feature_name(graph, node) for node in ordered]
    same = [node for node, name in zip(ordered, names, strict=True) if name == names[0]]
    scores = {node: label_facts(graph, node).get("f1") for node in same}
    scored = [node for node in same if scores[node] is not None]
    total = influence[scored].sum()
    f1 = float(sum(influence[node] * scores[node] for node in scored) / total) if total > 0 else None
    more = len(ordered) - len(same)
    return names[0] + (f" and {more} more" if more else ""), f1


def feature_name(graph: GraphData, node: int) -> str:
    """A feature's name from its label: `Texas` of `Texas: El Paso | Houston`, `say Austin` of one that promotes Austin, else
    the label; `2/345` where it has none."""
    nodes = graph.nodes
    label = printable(nodes.label[node]).strip()
    if not label:
        return f"{nodes.layer[node]}/{nodes.index[node]}"
    heading, _ = split_heading(label)
    if heading:
        return heading
    fires, arrow, promoted = label.rpartition(" → ")
    if arrow and not label.startswith(HINT):
        return f"say {promoted}"
    return shorten(fires or promoted, LONGEST_NAME)
