"""Names of groups, from the labels of their members. A name claims no more than what all members have in common: where they
disagree it says of whom it is and how many others there are, `Texas and 2 more`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.feature_labels import HINT, label_facts, split_heading
from circuits.graph.groups import Grouping
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.outputs import group_name
from circuits.graph.text import printable, short_name, shorten
from replacement.token_texts import SPACE

LONGEST_NAME = 40


def named_groups(graph: GraphData, parts: Sequence[Sequence[int]], influence: np.ndarray) -> Grouping:
    """The grouping of some parts of a graph's nodes, ordered by kind and position, with names that are distinct.

    Args:
        influence: float64[N], ranks the members of a part: the most influential one gives its name.
    """
    nodes = graph.nodes
    parts = sorted(map(sorted, parts), key=lambda part: (nodes.kind[part[0]], nodes.position[part[0]], part[0]))
    outputs = _raised_outputs(graph)
    names, further, scores = [], [], []
    for members in parts:
        first, *rest = sorted(members, key=lambda node: (-influence[node], node))
        is_feature = nodes.kind[first] == NodeKind.FEATURE
        name, f1 = (
            _features_name(graph, [first, *rest], outputs, influence) if is_feature else (_name(nodes, members), None)
        )
        names.append(name)
        scores.append(f1)
        place = f"@{nodes.position[first]}"
        further.append([place, f"({nodes.layer[first]}/{nodes.index[first]})"] if is_feature else [place])
    return Grouping.build(graph, distinct_names(names, further), parts, scores)


def _name(nodes: NodeTable, members: Sequence[int]) -> str:
    """Name of a group of tokens, errors or outputs."""
    first = members[0]
    if nodes.kind[first] == NodeKind.ERROR:
        return "errors"
    if len(members) > 1 and nodes.kind[first] == NodeKind.LOGIT:
        return group_name(nodes, sorted(members, key=lambda node: (-nodes.output_weight[node], node)))
    text = short_name(nodes, first)
    return text.strip(SPACE) or text


def _features_name(
    graph: GraphData, ordered: Sequence[int], outputs: dict[int, set[str]], influence: np.ndarray
) -> tuple[str, float | None]:
    """Name of the most influential member, and how many members have another name; the mean F1 of the labels of that name.

    Args:
        ordered: the members, the most influential first.
        outputs: see `_raised_outputs`.
    """
    names = [feature_name(graph, node, outputs.get(node, set())) for node in ordered]
    same = [node for node, name in zip(ordered, names, strict=True) if name == names[0]]
    scores = {node: facts["f1"] for node in same if "f1" in (facts := label_facts(graph, node))}
    total = sum(influence[node] for node in scores)
    f1 = float(sum(influence[node] * score for node, score in scores.items()) / total) if total > 0 else None
    more = len(ordered) - len(same)
    return names[0] + (f" and {more} more" if more else ""), f1


def _raised_outputs(graph: GraphData) -> dict[int, set[str]]:
    """Node -> texts of the outputs that it raises directly."""
    raised: dict[int, set[str]] = defaultdict(set)
    logits = np.flatnonzero(graph.nodes.mask(NodeKind.LOGIT))
    for block in graph.edges.row_blocks(logits):
        target = np.repeat(block.node, block.counts)
        for node, output in zip(
            block.source[block.weight > 0].tolist(), target[block.weight > 0].tolist(), strict=True
        ):
            raised[node].add(short_name(graph.nodes, output).strip(SPACE))
    return raised


def feature_name(graph: GraphData, node: int, outputs: Collection[str] = ()) -> str:
    """A feature's name from its label.

    `Texas` of `Texas: El Paso | Houston`; `say Austin` of one that promotes Austin, if that is one of `outputs`, the texts of
    outputs that it raises; else what it fires on, shortened; `2/345` where it has no label. A guess keeps its mark, `~`.
    """
    nodes, label = graph.nodes, printable(graph.nodes.label[node]).strip()
    if not label:
        return f"{nodes.layer[node]}/{nodes.index[node]}"
    if heading := split_heading(label)[0]:
        return heading
    fires, _, promoted = label.rpartition(" → ")
    token = promoted.split(", ")[0] if label.startswith(HINT) else promoted
    return f"say {token}" if fires and token in outputs else shorten(fires or promoted, LONGEST_NAME)


def distinct_names(names: Sequence[str], further: Sequence[Sequence[str]]) -> list[str]:
    """Names made distinct: those that clash get the first addition of their own, then the next, until none clash.

    Args:
        further: of each name, what tells it from others of the same text, such as `@7`.
    """
    result = list(names)
    for place in range(max(map(len, further), default=0)):
        times = Counter(result)
        result = [
            f"{name} {additions[place]}" if times[name] > 1 and place < len(additions) else name
            for name, additions in zip(result, further, strict=True)
        ]
    return result
