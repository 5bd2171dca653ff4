"""Outputs that a reader takes for one answer: tokens of one class and of similar weight, such as ten two-digit numbers.

A group is a way to show a graph. Its numbers are sums over its members: probability, output weight, and of each source the
edges into them. The graph itself keeps one node for every output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.text import short_name
from replacement.token_texts import CLASSES, SPACE

LEAST = 4
"""Outputs that make a group."""
SIMILAR = 3.0
"""How many times the weight of a group's last output its first may have."""
CONTINUES = "##"
"""Mark of WordPiece pieces that continue a word."""
_PLURALS = {"punctuation": "signs"}


def output_groups(nodes: NodeTable) -> list[tuple[int, ...]]:
    """Groups of output nodes, each from the largest weight to the smallest; single outputs are in none."""
    of_class: dict[tuple[int, str], list[int]] = defaultdict(list)
    is_token = nodes.is_target & nodes.mask(NodeKind.LOGIT) & (nodes.index >= 0)
    for node in sorted(is_token.nonzero()[0].tolist(), key=lambda node: -nodes.output_weight[node]):
        if name := _class_of(nodes.label[node]):
            of_class[int(nodes.position[node]), name].append(node)
    groups: list[list[int]] = []
    for members in of_class.values():
        first = 0.0
        for node in members:
            if nodes.output_weight[node] * SIMILAR < first or not first:
                groups.append([])
                first = float(nodes.output_weight[node])
            groups[-1].append(node)
    return [tuple(group) for group in groups if len(group) >= LEAST]


def group_name(nodes: NodeTable, members: Sequence[int]) -> str:
    """`10 numbers: 42 … 87`, the smallest and the largest; of other classes the two likeliest, `5 lower-case words: a, b …`."""
    name = _class_of(nodes.label[members[0]])
    texts = [short_name(nodes, node).strip(SPACE).removeprefix(CONTINUES) for node in members]
    if name == "number":
        shown = " … ".join(sorted(texts, key=lambda text: (len(text), text))[:: len(texts) - 1])
    else:
        shown = f"{', '.join(texts[:2])} …"
    return f"{len(members)} {_PLURALS.get(name, f'{name}s')}: {shown}"


def _class_of(label: str) -> str:
    """The class of a token's text without its spaces; empty where it has none."""
    word = label.strip(f" {SPACE}").removeprefix(CONTINUES)
    return next((name for name, holds in CLASSES.items() if word and holds(word)), "")
