"""Build, score and prune a synthetic graph of many edges: `python benchmarks/large_graph.py --edges 200e6`.

The graph has the shape of a traced prompt: a few thousand expanded features, each with an edge from everything below its
layer, and log-normal weights. It is handed over in blocks of rows, as attribution does.

What to expect, with E edges: columns of 8 E bytes. Scores read them four times (twice to find the order of the sweep, once
for the sweep, once for the error shares), pruning reads them five times and the edges among the kept nodes eight times. With
kernels of 1 to 2 ns per edge and pass (`np.add.at` into an array that fits the cache) this is about 20 ns per edge, 4 s for
200 million; memory beside the columns is 1 or 2 bytes per edge for masks, and the edges among the kept nodes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from machine import machine, peak_bytes

from circuits import CircuitGraph, NodeKind, NodeTable
from circuits.graph.edges import Edges, RowBlock

LAYERS, TOKENS, LOGITS = 26, 200, 10
ROWS_PER_BLOCK = 32

Result = TypeVar("Result")


def node_columns(n_edges: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Columns of the node table for about that many edges: 4,000 rows at 200 million."""
    n_rows = int(4000 * np.sqrt(n_edges / 200e6))
    n_features = 2 * n_edges // n_rows  # a row holds half of them on average
    layer = np.concatenate([
        np.full(TOKENS, -1), np.repeat(np.arange(LAYERS), TOKENS),
        np.sort(random.integers(LAYERS, size=n_features)), np.full(LOGITS, LAYERS),
    ])  # fmt: skip
    kind = np.repeat(
        [NodeKind.TOKEN, NodeKind.ERROR, NodeKind.FEATURE, NodeKind.LOGIT],
        [TOKENS, LAYERS * TOKENS, n_features, LOGITS],
    )
    position = np.where(kind < NodeKind.FEATURE, np.arange(len(kind)) % TOKENS, TOKENS - 1)
    index = np.where(kind == NodeKind.ERROR, -1, np.arange(len(kind)))
    expanded = kind == NodeKind.LOGIT
    expanded[random.choice(np.flatnonzero(kind == NodeKind.FEATURE), n_rows, replace=False)] = True
    weight = np.where(kind == NodeKind.LOGIT, 1 / LOGITS, 0.0)
    return {
        "kind": kind, "layer": layer, "position": position, "index": index, "expanded": expanded, "output_weight": weight
    }  # fmt: skip


def row_blocks(columns: dict[str, np.ndarray], random: np.random.Generator) -> list[RowBlock]:
    """A row for every expanded node."""
    below_layer = [np.flatnonzero(columns["layer"] < layer).astype(np.int32) for layer in range(LAYERS + 1)]
    nodes = random.permutation(np.flatnonzero(columns["expanded"]))
    blocks = []
    for node in np.split(nodes, np.arange(ROWS_PER_BLOCK, len(nodes), ROWS_PER_BLOCK)):
        sources = [below_layer[layer] for layer in columns["layer"][node]]
        source = np.concatenate(sources)
        weight = random.standard_normal(len(source), dtype=np.float32)
        np.exp(2 * weight, out=weight)
        weight *= random.integers(0, 2, size=len(weight), dtype=np.int8) * 2 - 1
        blocks.append(RowBlock(node, np.array([len(row) for row in sources]), source, weight))
    return blocks


def timed(name: str, work: Callable[[], Result]) -> Result:
    """The result of some work; its time and the process's peak memory are printed."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    peak = peak_bytes() / 2**30
    print(
        f"  {name:22} {time.perf_counter() - wall:6.2f} s   {time.process_time() - cpu:6.2f} s of CPU   {peak:5.2f} GiB peak"
    )
    return result


def measure(n_edges: int) -> None:
    """Print the figures of one size."""
    random = np.random.default_rng(0)
    columns = node_columns(n_edges, random)
    blocks = row_blocks(columns, random)
    print(f"{sum(len(block.source) for block in blocks):,} edges into {columns['expanded'].sum():,} nodes")

    def build() -> CircuitGraph:
        edges = Edges.from_blocks(blocks, n_nodes=len(columns["kind"]))
        nodes = NodeTable.build(**columns, inflow=edges.magnitudes)
        facts = {"prompt": "", "tokens": [""] * TOKENS, "n_layers": LAYERS, "identity_error": 0.0}
        return CircuitGraph(nodes, edges, facts)

    graph = timed("build from blocks", build)
    scores = timed("score", graph.scores)
    circuit = timed("prune", graph.prune)
    timed("score the pruned", circuit.scores)
    print(f"  {scores}\n  {circuit!r}")


def main() -> None:
    """Measure the sizes asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--edges", type=float, nargs="+", default=[11e6, 200e6], help="numbers of edges")
    arguments = parser.parse_args()
    print(f"{machine()}, numpy {np.__version__}")
    for n_edges in arguments.edges:
        measure(int(n_edges))


if __name__ == "__main__":
    main()
