"""Circuits as large as a picture has to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from circuits import CircuitGraph, NodeKind
from circuits.graph.edge_heads import EdgeHeads

T, P, E, F, L = NodeKind
NASTY = 'a "quoted" <b>bold</b> back\\slash \\n end\\\n\t\x00 \ud83d {x|y}'
WORDS = ("the", "quick", "capital", "of", "##las", "##ville", "Donaudampfschiff", ",", ".", "is", "Houston", "中文")


def _label(draw: np.random.Generator) -> str:
    reads, promotes = (draw.choice(WORDS, size=draw.integers(1, 4)).tolist() for _ in range(2))
    forms = (
        " | ".join(reads),
        f"{' | '.join(reads)} → {', '.join(promotes)}",
        f"in {' '.join(reads)} sentences",
        "unclear",
        "",
    )
    return str(draw.choice(forms, p=(0.3, 0.4, 0.15, 0.1, 0.05)))


@pytest.fixture(scope="session")
def crowd(build_graph: Callable[..., CircuitGraph]) -> Callable[..., CircuitGraph]:
    """A random circuit of a size, with labels, errors, heads and three outputs, most features at a few positions."""

    def make(*, tokens: int, nodes: int, edges: int, layers: Sequence[int], n_layers: int, seed: int) -> CircuitGraph:
        draw = np.random.default_rng(seed)
        rows: list[dict[str, Any]] = [
            {"kind": T, "index": i, "position": i, "label": str(draw.choice(WORDS))} for i in range(tokens)
        ]
        rows += [{"kind": P, "position": i} for i in range(0, tokens, 3)]
        places = {(int(draw.choice(layers)), int(draw.integers(tokens))) for _ in range(4)}
        rows += [{"kind": E, "layer": layer, "position": position} for layer, position in sorted(places)]
        busy = [*draw.choice(tokens, size=max(tokens // 3, 1), replace=False).tolist(), *[tokens - 1] * 3]
        names: set[tuple[int, ...]] = set()
        while len(names) < nodes - len(rows) - 3:
            names.add((int(draw.choice(layers)), int(draw.choice(busy)), int(draw.integers(4096))))
        for layer, position, index in sorted(names):
            feature = {"kind": F, "layer": layer, "position": position, "index": index, "label": _label(draw)}
            rows.append(feature | {"activation": float(draw.random()), "expanded": bool(draw.random() < 0.95)})
        for index, chance in enumerate((0.6, 0.3, 0.1)):
            logit = {"kind": L, "layer": n_layers, "position": tokens - 1, "index": index, "label": WORDS[index]}
            rows.append(logit | {"probability": chance, "output_weight": chance, "expanded": True})
        pairs = [
            (t, s)
            for t, target in enumerate(rows)
            for s, source in enumerate(rows)
            if target.get("expanded")
            and source.get("layer", -1) < target["layer"]
            and source["position"] <= target["position"]
        ]
        chosen = sorted(draw.choice(len(pairs), size=min(edges, len(pairs)), replace=False).tolist())
        graph = build_graph(
            rows, [(*pairs[n], float(draw.normal() * 2 ** draw.normal())) for n in chosen], n_layers=n_layers
        )
        heads = np.zeros((len(graph.edges), n_layers, 2))
        heads[np.arange(len(heads)), draw.integers(n_layers, size=len(heads)), 1] = graph.edges.weight
        direct = np.zeros(len(graph.edges))
        return dataclasses.replace(graph, heads=EdgeHeads.from_dense(direct, heads))

    return make


@pytest.fixture
def nasty(build_graph: Callable[..., CircuitGraph]) -> CircuitGraph:
    rows = [
        {"kind": T, "index": 1, "label": NASTY},
        {"kind": F, "layer": 0, "index": 2, "label": "<b>", "expanded": True},
        {"kind": L, "layer": 1, "index": 3, "label": NASTY, "expanded": True, "output_weight": 1.0},
    ]
    return build_graph(rows, [(1, 0, 1.0), (2, 1, -2.0)])
