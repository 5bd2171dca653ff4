"""What is written on the boxes and links of a picture, and in their tooltips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from circuits.export.style import HEADS_PER_EDGE, LEAST_SHARE
from circuits.graph.edge_heads import EdgeRow
from circuits.graph.edges import GraphData
from circuits.graph.feature_labels import label_facts, label_note, split_heading
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.outputs import group_name
from circuits.graph.pruning import always_kept
from circuits.graph.text import full_name, short_name

LISTED = 10
"""Nodes or edges of a box or link that its tooltip lists."""


def item_text(nodes: NodeTable, numbers: Sequence[int]) -> tuple[str, str]:
    """What is written on a box: a name, often empty, and its token or tokens, or a feature's label or else its id."""
    first = numbers[0]
    if nodes.kind[first] == NodeKind.LOGIT and len(numbers) > 1:
        return "", group_name(nodes, numbers)
    if nodes.kind[first] != NodeKind.FEATURE:
        return "", short_name(nodes, first)
    stack = f" ×{len(numbers)}" if len(numbers) > 1 else ""
    if not nodes.label[first].strip():
        return "", f"{nodes.layer[first]}/{nodes.index[first]}{stack}"
    name, text = split_heading(short_name(nodes, first))
    return name, text + stack


def item_facts(nodes: NodeTable, numbers: Sequence[int]) -> str:
    """What is written below it: id and activation of a feature, `1/345 · 2.3`, of a stack the ids; probability of an output."""
    first = numbers[0]
    chance = 100 * float(nodes.probability[list(numbers)].sum())
    if nodes.kind[first] == NodeKind.LOGIT and chance > 0:
        return f"{chance:.3g} %{' together' if len(numbers) > 1 else ''}"
    if nodes.kind[first] != NodeKind.FEATURE:
        return ""
    ids = [f"{nodes.layer[node]}/{nodes.index[node]}" for node in numbers]
    if len(numbers) > 1:
        same_layer = nodes.layer[first] == nodes.layer[numbers[1]]
        second = str(nodes.index[numbers[1]]) if same_layer else ids[1]
        return f"{ids[0]}, {second}{', …' if len(numbers) > 2 else ''}"
    facts = [ids[0]] if nodes.label[first].strip() else []
    activation = float(nodes.activation[first])  # 0 where a graph of another tool does not say it
    return " · ".join([*facts, f"{activation:.2g}"] if activation else facts)


def node_facts(graph: GraphData, node: int, influence: np.ndarray, inclusion: np.ndarray | None) -> str:
    """A node in a tooltip: its full name, label and score, activation, influence, and how often pruning keeps it."""
    nodes = graph.nodes
    facts = [full_name(nodes, node), label_facts(graph, node).get("text", ""), label_note(graph, node)]
    if nodes.kind[node] == NodeKind.FEATURE and nodes.activation[node]:
        facts.append(f"activation {nodes.activation[node]:.3g}")
    if nodes.kind[node] != NodeKind.LOGIT:
        facts.append(f"influence {100 * influence[node]:.3g} %")
    if inclusion is not None and not always_kept(nodes)[node]:
        facts.append(f"kept at {100 * inclusion[node]:.0f} % of the pruning thresholds")
    return "; ".join(filter(None, facts))


def listed(lines: Iterable[str]) -> str:
    """The first lines of a tooltip, and how many more there are."""
    every = list(lines)
    rest = [f"and {len(every) - LISTED} more"] if len(every) > LISTED else []
    return "\n".join(every[:LISTED] + rest)


def edge_facts(graph: GraphData, edge: int, row: EdgeRow | None) -> str:
    """An edge in a tooltip: its ends, its weight, and the heads that carry it where they are known."""
    source, target = int(graph.edges.source[edge]), int(graph.edges.target[edge])
    names = f"{full_name(graph.nodes, source)} → {full_name(graph.nodes, target)}: {graph.edges.weight[edge]:+.4g}"
    return names if row is None else f"{names} ({row.text()})"


def joined_parts(rows: Iterable[EdgeRow]) -> EdgeRow:
    """The parts of several edges together."""
    direct, rest = 0.0, 0.0
    heads: dict[tuple[int, int], float] = defaultdict(float)
    for row in rows:
        direct, rest = direct + row.direct, rest + row.rest
        for layer, head, weight in row.heads:
            heads[layer, head] += weight
    return EdgeRow(
        direct, rest, sorted(((*name, weight) for name, weight in heads.items()), key=lambda part: -abs(part[2]))
    )


def head_tag(row: EdgeRow) -> str:
    """`L1H3 L0H2`: at most two heads, the strongest first, each with at least a quarter of the edge's magnitudes."""
    total = sum(abs(weight) for *_, weight in row.heads) + abs(row.direct) + abs(row.rest)
    strong = [
        (layer, head) for layer, head, weight in row.heads[:HEADS_PER_EDGE] if abs(weight) >= LEAST_SHARE * total > 0
    ]
    return " ".join(f"L{layer}H{head}" for layer, head in strong)
