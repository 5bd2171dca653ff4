"""Which features are read as one: those that do the same, found by complete linkage and a loss that sets the number of groups.

What a feature does is told by its profiles: what flows into it from every node, what flows out of it into every node (edge
influences with the signs of their weights), and where it fires (activations on probe prompts) if that is given. Two features
are as alike as the kind of profile in which they are least alike, by cosine. Labels are evidence besides: features whose labels
begin with the same name are half as far apart, and features whose labels name different things are not joined.

Loss. A reader is told the features one by one, a group in order of influence I. The first member must be told in full. Of every
further one it is expected to do what those before it do, on average; only the difference must be told:

    L = sum_i I_i e_i / sum_i I_i
    e_i = 1                                                               for the first member of a group
    e_i = max over kinds of |profile_i - mean of those before|^2          for others; profiles have length 1

So L is the share of the features' influence that is still to be told by a reader of the groups, who pays for every group (its
strongest member in full) and for every difference inside one. A feature joins a group if that says more of it than nothing: for
two of them, if their cosine is above 1/2. Of all partitions that cut the tree of complete linkage the one of the least L is
found exactly, from the leaves upwards.

Then profiles are taken over groups instead of nodes and the features are grouped again, until their number stays: features that
act on different members of one group do the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.feature_labels import HINT, label_facts, split_heading
from circuits.graph.group_names import named_groups
from circuits.graph.groups import Grouping
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.outputs import output_groups
from replacement.number_checks import whole_number

ROUNDS = 10
"""Rounds of grouping at most; each has fewer groups than the one before."""
DIGITS = 5
"""Decimals of cosines that count, so that the order of a sum decides nothing."""


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
        evidence = _evidence(graph, features, coordinate, neighbours, signatures)
        chosen = _least_loss(evidence, _alike(evidence), np.maximum(influence[features], 1e-12))
        found = [features[numbers].tolist() for numbers in chosen]
        settled = len(found) == len(parts)
        parts = found
        for members in parts:
            coordinate[members] = min(members)
        if settled:
            break
    return named_groups(graph, [*others, *_capped(parts, influence, max_groups)], influence)


def _check_signatures(signatures: np.ndarray, n_nodes: int) -> None:
    if signatures.ndim != 2 or len(signatures) != n_nodes or not signatures.shape[1]:
        raise ValueError(
            f"signatures: expected a row of probes for each of {n_nodes} nodes, given an array of {signatures.shape}"
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
    exact = np.array([_rounded(value) for value in influence[features]])
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
    """What F features, ordered by position, have in common."""

    cosines: list[np.ndarray]
    """float32[F, F] for each kind of profile; 0 between features too far apart."""
    known: list[np.ndarray]
    """bool[F] for each, the features with a profile."""
    same_name: np.ndarray
    """bool[F, F], whether labels begin with the same name."""
    against: np.ndarray
    """bool[F, F], whether features are too far apart, or their labels speak of different things."""


def _evidence(
    graph: GraphData,
    features: np.ndarray,
    coordinate: np.ndarray,
    neighbours: int | None,
    signatures: np.ndarray | None,
) -> _Evidence:
    edges, position = graph.edges, graph.nodes.position[features]
    row = np.full(len(graph.nodes), -1)
    row[features] = np.arange(len(features))
    signed, target = edge_influence(graph) * np.sign(edges.weight), edges.target
    profiles = [
        _profiles(row[target], coordinate[edges.source], edges.weight, len(features)),
        _profiles(row[edges.source], coordinate[target], signed, len(features)),
    ]
    if signatures is not None:
        fires = signatures[features].astype(np.float64)
        varies = np.ptp(fires, axis=1, keepdims=True) > 0  # the mean of equal numbers may differ from them by rounding
        profiles.append(((fires - fires.mean(1, keepdims=True)) * varies).astype(np.float32))
    last = len(position) if neighbours is None else neighbours
    cosines = [_cosines(profile, position, last) for profile in profiles]
    if signatures is not None:
        # What fires together on the same inputs is one variable, also if a part of it takes back what another part writes.
        np.abs(cosines[1], out=cosines[1])
    same_name, against = _label_evidence(graph, features)
    if neighbours is not None:
        against |= np.abs(position[:, None] - position) > neighbours
    return _Evidence(cosines, [np.any(profile, axis=1) for profile in profiles], same_name, against)


def _profiles(row: np.ndarray, column: np.ndarray, weight: np.ndarray, n_rows: int) -> np.ndarray:
    """float32[F, columns in use], signed square roots of sums of weights by row and column; a row of -1 is left out.

    The cosine of square roots is the overlap of two distributions (Bhattacharyya's), which one strong edge does not decide.
    """
    chosen = row >= 0
    row, column = row[chosen], column[chosen]
    used = np.bincount(column) > 0
    cells = np.bincount(row * used.sum() + (np.cumsum(used) - 1)[column], weight[chosen], minlength=n_rows * used.sum())
    roots = cells.astype(np.float32)
    np.sqrt(np.abs(roots, out=roots), out=roots)
    return np.copysign(roots, cells, out=roots).reshape(n_rows, used.sum())


def _cosines(profile: np.ndarray, position: np.ndarray, last: int) -> np.ndarray:
    """float32[F, F], cosines of profiles at positions at most `last` apart; positions rise."""
    length = np.linalg.norm(profile, axis=1, keepdims=True)
    unit = np.divide(profile, length, out=np.zeros_like(profile), where=length > 0)
    cosine = np.zeros((len(unit), len(unit)), dtype=np.float32)
    for place in np.unique(position).tolist():
        begin, end, reached = np.searchsorted(position, [place, place + 1, place + last + 1]).tolist()
        block = np.round(unit[begin:end] @ unit[begin:reached].T, DIGITS)
        cosine[begin:end, begin:reached], cosine[begin:reached, begin:end] = block, block.T
    return cosine


def _label_evidence(graph: GraphData, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether two features have labels that begin with the same name, and whether one of them has a label that begins with a
    name which the other's label does not hold; guesses are no labels. bool[F, F] each."""
    labels = [_whole_label(graph, node) for node in features.tolist()]
    names = np.array([split_heading(label)[0] for label in labels])
    heading, number = np.unique(names, return_inverse=True)
    is_label = np.array([bool(label) and not label.startswith(HINT) for label in labels])
    lacks = is_label & ~np.array([[name in label for label in labels] for name in heading.tolist()])
    against = is_label[:, None] & lacks[number]
    return (number[:, None] == number) & (names != ""), against | against.T


def _whole_label(graph: GraphData, node: int) -> str:
    return str(label_facts(graph, node).get("text", graph.nodes.label[node])).strip()


def _alike(evidence: _Evidence) -> np.ndarray:
    """float32[F, F], how alike features are: -1 where they may not be joined."""
    alike = np.full(evidence.against.shape, np.inf, dtype=np.float32)
    for cosine, known in zip(evidence.cosines, evidence.known, strict=True):
        np.minimum(alike, cosine, out=alike, where=known[:, None] & known)
    alike[np.isinf(alike)] = 0.0
    alike[evidence.same_name] = (alike[evidence.same_name] + 1) / 2
    alike[evidence.against] = -1.0
    return alike


def _merges(alike: np.ndarray) -> Iterator[tuple[int, int]]:
    """Complete linkage: pairs of clusters to join, named by their first member, as a chain of nearest neighbours finds them.

    No clusters are joined that hold features with nothing in common.
    """
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
    members = members[np.lexsort((members, -weight[members]))]
    w = weight[members]
    worst = np.full(len(members), -np.inf)
    for cosine, known in zip(evidence.cosines, evidence.known, strict=True):
        np.maximum(worst, _untold(cosine[np.ix_(members, members)], np.where(known[members], w, 0.0)), out=worst)
    worst[np.isinf(worst)] = 1.0
    named_before = np.tril(evidence.same_name[np.ix_(members, members)], -1).any(1)
    return float(w @ np.where(named_before, worst / 2, worst))


def _untold(cosine: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64[m], |profile - mean of those before|^2 of every member; -inf where it or all before are unknown (weight 0)."""
    product = np.tril(cosine * weight, -1).sum(1)  # profile . sum of those before
    total = np.cumsum(weight) - weight
    steps = 2 * weight * product + weight**2
    square = np.cumsum(steps) - steps
    with np.errstate(divide="ignore", invalid="ignore"):
        error = 1.0 - 2 * product / total + square / total**2
    return np.where((weight > 0) & (total > 0), error, -np.inf)


def _capped(parts: list[list[int]], influence: np.ndarray, max_groups: int | None) -> list[list[int]]:
    """The groups; of more than `max_groups` the least influential are put together, and those that are as influential."""
    if max_groups is None or len(parts) <= max_groups:
        return parts
    strength = [_rounded(influence[members].sum()) for members in parts]
    most = sorted(strength)[-max_groups]
    kept = [members for members, size in zip(parts, strength, strict=True) if size > most]
    return [*kept, [node for members, size in zip(parts, strength, strict=True) if size <= most for node in members]]


def _rounded(value: float) -> float:
    """To the digits that do not depend on the order of a sum."""
    return float(f"{value:.9e}")
