"""What does the head split cost? `split_heads` of a pruned graph against tracing the same pruned graph.

    python benchmarks/heads.py                 both models, five interleaved repeats
    python benchmarks/heads.py --model demo

Both start from the prompt: `trace` runs the model, freezes it and makes the rows of exactly the nodes that the pruned graph
expands; `heads` runs and freezes it too, and splits every kept edge over all heads, by last and by first hop.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from attribution import demo_model, random_model, seconds_of

from circuits import CircuitGraph, split_heads, trace
from circuits.attribution.expansion import Attributor
from circuits.attribution.grounding import Grounding
from replacement import ReplacementModel


def trace_nodes(model: ReplacementModel, graph: CircuitGraph) -> Attributor:
    """Rows of the nodes that edges of a graph flow into, and of no other."""
    grounding = Grounding.of(model, graph)
    attributor = Attributor(grounding.local, grounding.logits)
    columns = grounding.column_N[grounding.target_nodes]
    attributor.expand_logits()
    attributor.expand_features(np.sort(columns[columns >= 0]) - grounding.columns.features.start)
    return attributor


def measure(name: str, model: ReplacementModel, tokens: torch.Tensor, *, repeats: int) -> None:
    """Print one model's table."""
    graph = trace(model, tokens, coverage=0.99).prune()
    runs = {
        "trace": lambda: trace_nodes(model, graph),
        "heads, last hop": lambda: split_heads(model, graph),
        "heads, first hop": lambda: split_heads(model, graph, hop="first"),
    }
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            times[label].append(seconds_of(run))
    shape, heads = model.language_model.shape, split_heads(model, graph).heads_ELH
    print(f"\n{name}: {shape.n_layers} layers of {shape.n_heads} heads, d_model {shape.d_model}, {len(tokens)} tokens")
    print(f"  pruned graph                   {len(graph.nodes)} nodes, {len(graph.edges):,} edges")
    print(f"  (edge, head) values            {heads.size:,}")
    for hop in ("last", "first"):
        print(f"  sum error, {hop + ' hop':<20} {split_heads(model, graph, hop=hop).sum_error:.1e}")
    for label, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["trace"], strict=True))
        print(f"  {label:<30} {statistics.median(seconds):.3f} s = {ratio:.2f}x")


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(description="Time the head split against tracing the same pruned graph.")
    parser.add_argument("--model", choices=("demo", "random", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; medians are printed")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    with torch.no_grad():
        if options.model in ("demo", "both"):
            measure("demo", *demo_model(), repeats=options.repeats)
        if options.model in ("random", "both"):
            measure("random", *random_model(), repeats=options.repeats)


if __name__ == "__main__":
    main()
