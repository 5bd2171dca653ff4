"""Which positions of several prompts are the same place, and which nodes of their graphs are therefore the same node.

Positions: the tokens that all prompts share at their beginning are counted from the start, all others from the end.

    <bos> the capital of New York is        <bos> the capital of Texas is
      0    1     2    3   4   5    6          0    1     2    3    5    6

So prompts of one length are aligned place by place, ends meet ends, and of two names of different length the last tokens meet.
Aligned positions are those of the longest prompt. They do not depend on the order of the prompts.

Nodes: features are the same where part, layer, index and aligned position agree, errors where part, layer and position do,
tokens and learned positions where the position does (whatever the token is), and outputs where token and position do.
Differences of tokens are numbered at their position, in the order of the graph's targets, and the same where their numbers are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.nodes import NodeKind, NodeTable

_FIELDS = {"kind": 3, "part": 1, "layer": 11, "position": 20, "index": 28}
"""Bits of the parts of a node's key, the highest first: keys rise in the order of a node table."""
_OFFSETS = {"layer": 1, "index": 2**10}
"""Added to columns that may be negative: tokens have layer -1, differences of tokens the indices -1, -2, ..."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Positions of several prompts as positions of the longest of them."""

    prefix: int
    """Positions below it are counted from the start, all others from the end."""
    length: int
    """Tokens of the longest prompt."""

    @classmethod
    def of(cls, prompts: Iterable[Sequence[Hashable]]) -> Alignment:
        """The alignment of prompts, given as their tokens; they are read one after the other.

        Where the prefix and the suffix that all prompts share overlap in the shortest prompt (`a a a` and `a a`), the suffix
        counts: outputs are at the end.

        Raises:
            ValueError: no prompt, an empty one, or prompts of different lengths with neither the first nor the last token in
                common.
        """
        first: Sequence[Hashable] | None = None
        prefix = suffix = shortest = longest = 0
        for tokens in prompts:
            if first is None:
                first, prefix, suffix, shortest, longest = tokens, *4 * (len(tokens),)
            prefix = min(prefix, _shared(first, tokens))
            suffix = min(suffix, _shared(first[::-1], tokens[::-1]))
            shortest, longest = min(shortest, len(tokens)), max(longest, len(tokens))
        if not shortest:
            raise ValueError(
                f"expected prompts of at least one token, given {'none' if first is None else 'an empty one'}"
            )
        if shortest < longest and not prefix and not suffix:
            raise ValueError(
                f"expected prompts that can be aligned, of one length or with the same first or last token; given prompts of "
                f"{shortest} to {longest} tokens that share neither"
            )
        return cls(min(prefix, shortest - max(suffix, 1)), longest)

    def positions(self, n_tokens: int) -> np.ndarray:
        """int64[n_tokens], the aligned position of each position of a prompt of that length; they rise.

        Raises:
            ValueError: a length that none of the prompts has.
        """
        if not self.prefix < n_tokens <= self.length:
            raise ValueError(f"expected a prompt of {self.prefix + 1} to {self.length} tokens, given {n_tokens}")
        place = np.arange(n_tokens)
        return np.where(place < self.prefix, place, place + self.length - n_tokens)


def aligned_positions(tokens: Sequence[Hashable], other: Sequence[Hashable]) -> np.ndarray:
    """int64[len(tokens)], the position in another prompt that each position is aligned with; -1 where there is none.

    >>> aligned_positions("the capital of New York is".split(), "the capital of Texas is".split()).tolist()
    [0, 1, 2, -1, 3, 4]

    Raises:
        ValueError: prompts that cannot be aligned, see `Alignment.of`.
    """
    alignment = Alignment.of([tokens, other])
    place_of = np.full(alignment.length, -1)
    place_of[alignment.positions(len(other))] = np.arange(len(other))
    return place_of[alignment.positions(len(tokens))]


def prompt_tokens(metadata: Mapping[str, Any]) -> Sequence[Hashable]:
    """What the tokens of a graph's prompt are compared by: their ids, or texts where it has no ids."""
    tokens: Sequence[Hashable] = metadata.get("token_ids") or metadata["tokens"]
    return tokens


def node_keys(nodes: NodeTable, positions: np.ndarray) -> np.ndarray:
    """int64[N], a number for each node that is the same for the same node of another graph, and rises in table order (but for
    outputs, which are in the order of the targets).

    Args:
        positions: int[T], aligned position of each position of the prompt.

    Raises:
        ValueError: a layer, position or index too large for the key (2,046 layers, 1,048,575 positions, 2.6e8 features).
    """
    index = nodes.index.copy()
    index[nodes.mask(NodeKind.TOKEN)] = -1
    differences = np.flatnonzero(nodes.mask(NodeKind.LOGIT) & (index < 0))
    for number, row in enumerate(differences.tolist()):
        earlier = differences[:number]
        index[row] = -1 - np.count_nonzero(nodes.position[earlier] == nodes.position[row])
    columns = {"kind": nodes.kind, "part": nodes.part, "layer": nodes.layer, "index": index}
    columns["position"] = positions[nodes.position]
    keys = np.zeros(len(nodes), dtype=np.int64)
    for name, bits in _FIELDS.items():
        column = columns[name].astype(np.int64) + _OFFSETS.get(name, 0)
        for value in columns[name][(column < 0) | (column >= 2**bits)][:1].tolist():
            raise ValueError(f"{name}: expected numbers below {2**bits - _OFFSETS.get(name, 0):,}, given {value:,}")
        keys = (keys << bits) | column
    return keys


def same_nodes(graph: GraphData, other: GraphData) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the nodes that two graphs share: int64[M] in the one, and int64[M] in the other, in the order of their keys.

    Raises:
        ValueError: prompts that cannot be aligned, see `Alignment.of`.
    """
    alignment = Alignment.of([prompt_tokens(graph.metadata), prompt_tokens(other.metadata)])
    keys, other_keys = (node_keys(g.nodes, alignment.positions(len(g.metadata["tokens"]))) for g in (graph, other))
    _, rows, other_rows = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    return rows, other_rows


def _shared(tokens: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Number of tokens that two prompts share at their beginning."""
    pairs = enumerate(zip(tokens, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(tokens), len(other)))
