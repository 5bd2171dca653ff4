"""A feature index for the features of a graph, made up: every feature has examples, a histogram, token effects and a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from circuits import CircuitGraph, NodeKind
from replacement.index import packing
from replacement.index.records import Label, TokenEffects
from replacement.index.writing import IndexWriter

BEFORE, AFTER, N_TOP, N_QUANTILES = 24, 8, 10, 5  # as an index has them by default
ROWS, WIDTH = 512, 64


def write_index(path: Path, graph: CircuitGraph, vocabulary: Sequence[str], *, seed: int = 0) -> Path:
    """An index of the MLP features of a graph alone, each with as many examples as the command would find.

    A feature's largest activation is 4 times its index plus 1; of every fourth word the first six are promoted.

    Args:
        vocabulary: distinct texts of the tokens that examples are drawn from.
        seed: of the random numbers.
    """
    nodes, random = graph.nodes, np.random.default_rng(seed)
    chosen = nodes.mask(NodeKind.FEATURE) & ~nodes.of_attention
    features = sorted(set(zip(nodes.layer[chosen].tolist(), nodes.index[chosen].tolist(), strict=True)))
    facts = {
        "crosscoder_fingerprint": graph.metadata["crosscoder_fingerprint"],
        "model": "toy",
        "layers": list(range(graph.metadata["n_layers"])),
        "n_features": 1 + max(index for _, index in features),
        "n_tokens": ROWS * WIDTH,
        "vocabulary_size": len(vocabulary),
        "settings": {"before": BEFORE, "after": AFTER, "n_quantiles": N_QUANTILES},
    }
    writer = IndexWriter(path, facts, list(vocabulary))
    writer.rows(np.arange(ROWS), random.integers(len(vocabulary), size=(ROWS, WIDTH)))
    effects = TokenEffects(
        promoted=tuple((text, 2.0 - 0.1 * place) for place, text in enumerate(vocabulary[::4][:6])),
        suppressed=((vocabulary[1], -1.5),),
        read=((vocabulary[2], 0.75),),
    )
    counts = packing.pack_counts(np.array([30, 20, 10, 5, 1]))
    writer.features([
        (writer.number(layer, index), 66, 4.0 * (index + 1), 0.8 * (index + 1), counts, _examples(random))
        for layer, index in features
    ])  # fmt: skip
    writer.effects((layer, index, effects) for layer, index in features)
    words = [" ".join(" ".join(random.choice(vocabulary, size=2)).split()) for _ in features]
    labels = (Label(text, "rule", f"fires on {text}", 0.9, 0.8, 0.8471) for text in words)
    writer.labels((layer, index, label) for (layer, index), label in zip(features, labels, strict=True))
    writer.close()
    return path


def _examples(random: np.random.Generator) -> bytes:
    """The top examples, then one of each quantile; three tokens of each are active, the peak most."""
    n_examples = N_TOP + N_QUANTILES
    heads = np.zeros(n_examples, packing.EXAMPLE)
    heads["row"], heads["position"] = (
        random.integers(ROWS, size=n_examples),
        random.integers(BEFORE, WIDTH - AFTER, n_examples),
    )
    heads["quantile"] = [packing.TOP] * N_TOP + list(range(N_QUANTILES))[::-1]
    heads["n_active"] = 3
    neighbours = np.zeros((n_examples, 3), packing.NEIGHBOUR)
    peak = np.linspace(1.0, 0.2, n_examples)
    neighbours["offset"] = [BEFORE - 3, BEFORE, BEFORE + 2]
    neighbours["activation"] = peak[:, None] * [0.25, 1.0, 0.5]
    return bytes([n_examples]) + heads.tobytes() + neighbours.tobytes()
