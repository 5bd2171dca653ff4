"""Random graphs in which groups of features are planted, and the adjusted Rand index of a grouping against them."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from circuits import CircuitGraph, NodeKind, NodeTable
from circuits.graph.edges import Edges


def planted(
    n_groups: int,
    size: int,
    *,
    seed: int,
    noise: float = 0.3,
    dropped: float = 0.1,
    spurious: float = 0.02,
    n_layers: int = 6,
    n_tokens: int = 4,
) -> tuple[CircuitGraph, np.ndarray]:
    """A graph, and int64[N], the planted group of each feature (-1 elsewhere).

    Each group is at a layer and a position, reads a few groups or tokens below it, and is read by groups above it or the
    output; its `size` / 2 to 3 `size` / 2 members do the same, but for noise. No two groups share more than half of what they
    read and more than half of what they act on: they would be one.

    Args:
        noise: standard deviation of the logarithm of a weight around what the groups say.
        dropped: share of these edges that are missing.
        spurious: share of all other possible edges that are there, with weights of random sign and a tenth of the usual size.
    """
    random = np.random.default_rng(seed)
    layer, position = random.integers(n_layers, size=n_groups), random.integers(n_tokens, size=n_groups)
    wiring = _wiring(layer, position, n_tokens, n_layers, random)
    while not _are_different(wiring[:-2], wiring[:, n_tokens:-2]):
        wiring = _wiring(layer, position, n_tokens, n_layers, random)
    sizes = np.maximum(1, random.integers(size // 2, size + size // 2 + 1, size=n_groups))
    group = np.repeat(np.arange(n_groups), sizes)
    index = random.permutation(len(group))
    kind = np.repeat([NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.LOGIT], [n_tokens, len(group), 2])
    unit = np.concatenate([np.arange(n_tokens), n_tokens + group, n_tokens + n_groups + np.arange(2)])
    strength = np.exp(random.normal(scale=1.0, size=len(unit)))  # of a member in all it does
    matrix = wiring[unit][:, unit] * np.exp(random.normal(scale=noise, size=(len(unit),) * 2))
    matrix *= (random.random(matrix.shape) >= dropped) * strength[:, None] * strength
    depth = np.concatenate([np.full(n_tokens, -1), layer[group], np.full(2, n_layers)])
    place = np.concatenate([np.arange(n_tokens), position[group], np.full(2, n_tokens - 1)])
    possible = (depth[:, None] > depth) & (place[:, None] >= place)
    extra = possible & (matrix == 0) & (random.random(matrix.shape) < spurious)
    matrix += extra * 0.1 * random.normal(size=matrix.shape) * strength[:, None] * strength
    columns = {
        "kind": kind,
        "layer": depth,
        "position": place,
        "index": np.concatenate([np.arange(n_tokens), index, np.arange(2)]),
        "activation": np.where(kind == NodeKind.FEATURE, strength, 0.0),
        "output_weight": np.concatenate([np.zeros(len(unit) - 2), [0.75, 0.25]]),
        "expanded": kind >= NodeKind.FEATURE,
    }
    order = np.lexsort([columns["index"], place, depth, kind])
    matrix = matrix[order][:, order].astype(np.float32)
    target, source = np.nonzero(matrix)
    edges = Edges.from_coo(target, source, matrix[target, source], n_nodes=len(order))
    nodes = NodeTable.build(**{name: column[order] for name, column in columns.items()}, inflow=edges.magnitudes)
    facts = {"prompt": "p", "tokens": ["t"] * n_tokens, "n_layers": n_layers, "identity_error": 0.0}
    truth = np.concatenate([np.full(n_tokens, -1), group, np.full(2, -1)])[order]
    return CircuitGraph(nodes, edges, facts), truth


def _wiring(
    layer: np.ndarray, position: np.ndarray, n_tokens: int, n_layers: int, random: np.random.Generator
) -> np.ndarray:
    """Weights among tokens, groups and two outputs: each group reads up to three units below it, and has a reader above it."""
    n_groups = len(layer)
    depth = np.concatenate([np.full(n_tokens, -1), layer, np.full(2, n_layers)])
    place = np.concatenate([np.arange(n_tokens), position, np.full(2, n_tokens - 1)])
    wiring = np.zeros((len(depth), len(depth)))
    units = np.arange(n_tokens, n_tokens + n_groups)
    for unit in units.tolist():
        below = np.flatnonzero((depth < depth[unit]) & (place <= place[unit]))
        above = np.flatnonzero((depth > depth[unit]) & (place >= place[unit]))
        for source in random.choice(below, size=min(3, len(below)), replace=False).tolist():
            wiring[unit, source] = random.choice([-1.0, 1.0])
        for target in random.choice(above, size=min(2, len(above)), replace=False).tolist():
            wiring[target, unit] = random.choice([-1.0, 1.0])
    return wiring


def _are_different(into: np.ndarray, out_of: np.ndarray) -> bool:
    """Whether any two groups share at most half of their inputs or half of their outputs, signs included.

    Args:
        into: the rows of tokens and groups.
        out_of: the columns of groups.
    """
    n_groups = out_of.shape[1]
    shared = []
    for profile in (into[-n_groups:], out_of.T):
        common = (profile[:, None] == profile) & (profile != 0)
        shared.append(common.sum(2) / np.maximum((profile != 0).sum(1), 1)[:, None])
    both = np.minimum(np.maximum(shared[0], shared[0].T), np.maximum(shared[1], shared[1].T))
    return bool((both[~np.eye(n_groups, dtype=bool)] <= 0.5).all())


def adjusted_rand(first: Sequence[int], second: Sequence[int]) -> float:
    """Adjusted Rand index of two partitions of the same things: pairs that both join, beyond what chance joins, over the most
    that could be. 1 for equal partitions, about 0 for unrelated ones (Hubert and Arabie, 1985)."""
    pairs: dict[tuple[int, int], int] = {}
    for pair in zip(first, second, strict=True):
        pairs[pair] = pairs.get(pair, 0) + 1
    together = sum(comb(count, 2) for count in pairs.values())
    alone = [sum(comb(list(labels).count(label), 2) for label in set(labels)) for labels in (first, second)]
    expected = alone[0] * alone[1] / max(comb(len(first), 2), 1)
    most = sum(alone) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)
