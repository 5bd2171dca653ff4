"""Random circuits of any size, without a model: what pages and pictures of large graphs are tried and timed on."""

from __future__ import annotations

import numpy as np

from circuits import CircuitGraph, NodeKind, NodeTable
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import Edges

WORDS = (
    "capital",
    "city",
    "names",
    "of",
    "states",
    "before",
    "verbs",
    "Texas",
    "plural",
    "quoted",
    "digits",
    "the",
    "month",
)
LOGITS = 5


def random_circuit(
    n_nodes: int, n_edges: int, *, n_tokens: int = 40, n_layers: int = 12, n_heads: int = 0, seed: int = 0
) -> CircuitGraph:
    """A circuit of exactly so many nodes and edges, the last three tokens crowded, every feature labelled.

    Args:
        n_nodes, n_edges: its size.
        n_tokens, n_layers: the prompt's and the model's.
        n_heads: in each layer; they carry half of every edge, and without any the graph has no heads.
        seed: of the random numbers.
    """
    random = np.random.default_rng(seed)
    columns = _columns(n_nodes, n_tokens, n_layers, random)
    target, source = _pairs(columns, n_edges, random)
    weight = (random.normal(size=n_edges) * np.exp(random.normal(size=n_edges))).astype(np.float32)
    edges = Edges.from_coo(target, source, weight, n_nodes=n_nodes)
    inflow = 1.1 * edges.magnitudes
    signed = np.bincount(edges.target, edges.weight, minlength=n_nodes)
    is_feature = columns["kind"] == NodeKind.FEATURE
    tokens = [f" {random.choice(WORDS)}" for _ in range(n_tokens)]
    names = [" ".join(random.choice(WORDS, size=3)) if feature else "" for feature in is_feature.tolist()]
    labels = [*tokens, *names[n_tokens:-LOGITS], *(f" {word}" for word in WORDS[:LOGITS])]
    value = np.where(columns["expanded"], signed, 0.0)
    nodes = NodeTable.build(**columns, inflow=inflow, value=value, label=labels)
    facts = {"prompt": "".join(tokens), "tokens": tokens, "n_layers": n_layers, "identity_error": 1e-6}
    return CircuitGraph(nodes, edges, facts, _heads(edges, n_layers, n_heads, random) if n_heads else None)


def _columns(n_nodes: int, n_tokens: int, n_layers: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens, one error for each token in layer 0, features and logits at the last token, in the order of the table."""
    n_features = n_nodes - 2 * n_tokens - LOGITS
    crowd = np.where(np.arange(n_tokens) < n_tokens - 3, 1.0, n_tokens / 6)
    places = np.stack([
        random.integers(n_layers, size=n_features),
        random.choice(n_tokens, p=crowd / crowd.sum(), size=n_features),
        random.choice(100_000, replace=False, size=n_features),
    ])  # fmt: skip
    layer, position, index = places[:, np.lexsort(places[::-1])]
    kind = np.repeat(
        [NodeKind.TOKEN, NodeKind.ERROR, NodeKind.FEATURE, NodeKind.LOGIT], [n_tokens, n_tokens, n_features, LOGITS]
    )
    chances = 0.5 ** np.arange(1, LOGITS + 1)
    of_logits = np.concatenate([np.zeros(n_nodes - LOGITS), chances])
    last = np.full(LOGITS, n_tokens - 1)
    none = np.full(n_tokens, -1)
    return {
        "kind": kind,
        "layer": np.concatenate([none, 0 * none, layer, np.full(LOGITS, n_layers)]),
        "position": np.concatenate([np.arange(n_tokens), np.arange(n_tokens), position, last]),
        "index": np.concatenate([np.arange(n_tokens), none, index, np.arange(LOGITS)]),
        "activation": np.where(kind == NodeKind.FEATURE, random.exponential(size=n_nodes), 0.0),
        "probability": of_logits,
        "output_weight": of_logits / of_logits.sum(),
        "expanded": (kind == NodeKind.LOGIT) | ((kind == NodeKind.FEATURE) & (random.random(n_nodes) < 0.95)),
    }


def _pairs(columns: dict[str, np.ndarray], n_edges: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of an expanded target and a source below its layer and not behind its position."""
    layer, position = columns["layer"], columns["position"]
    targets = np.flatnonzero(columns["expanded"])
    pairs = np.zeros((2, 0), dtype=np.int64)
    while pairs.shape[1] < n_edges:
        target = random.choice(targets, size=4 * n_edges)
        source = random.integers(len(layer) - LOGITS, size=4 * n_edges)
        possible = (layer[source] < layer[target]) & (position[source] <= position[target])
        pairs = np.unique(np.concatenate([pairs, np.stack([target, source])[:, possible]], axis=1), axis=1)
    target, source = pairs[:, random.permutation(pairs.shape[1])[:n_edges]]
    return target, source


def _heads(edges: Edges, n_layers: int, n_heads: int, random: np.random.Generator) -> EdgeHeads:
    """Half of every edge direct, the rest through all heads, of sizes that differ by orders."""
    heads = random.lognormal(sigma=1.5, size=(len(edges), n_layers, n_heads)).astype(np.float32)
    heads *= (edges.weight / 2 / heads.sum((1, 2)))[:, None, None]
    return EdgeHeads.from_dense(edges.weight / 2, heads)
