"""How well are groups found that are known, and how many groups do the demo's circuits have?

    python benchmarks/grouping.py

Prints the adjusted Rand index against groups planted in random graphs, and the number of groups in pruned circuits of the demo:
the first 20 held-out probes of every behaviour.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import circuits
import replacement
from replacement.demo.corpus import behaviours

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from planted_groups import adjusted_rand, planted

SIZES = ((5, 6), (12, 6), (25, 6), (40, 10))
"""Groups, and members of each."""
SEEDS = range(100, 108)
ROWS = ((0.3, 0.0), (1.0, 0.0), (0.3, 0.1), (0.3, 0.3))
"""Noise in the logarithm of a weight, and share of edges missing."""
PROBES = 20


def planted_indices(noise: float, dropped: float) -> np.ndarray:
    """Adjusted Rand index of every planted graph."""
    found = []
    for n_groups, size in SIZES:
        for seed in SEEDS:
            graph, truth = planted(n_groups, size, seed=seed, noise=noise, dropped=dropped)
            inside = truth >= 0
            found.append(adjusted_rand(truth[inside].tolist(), graph.group().group_of[inside].tolist()))
    return np.array(found)


def main() -> None:
    """Print both tables."""
    print(f"{'noise':>6}{'missing':>9}{'mean':>8}{'least':>8}{'below 0.9':>11}   ({len(SIZES) * len(SEEDS)} graphs)")
    for noise, dropped in ROWS:
        index = planted_indices(noise, dropped)
        print(f"{noise:6g}{dropped:9.0%}{index.mean():8.3f}{index.min():8.3f}{(index < 0.9).sum():11d}")
    model = replacement.load("demo")
    print(f"\n{'behaviour':34}{'features':>9}{'groups':>8}{'most':>6}{'at most 8':>11}")
    for behaviour in behaviours():
        features, groups = [], []
        for probe in behaviour.probes[:PROBES]:
            circuit = circuits.with_labels(model, circuits.trace(model, probe.prompt).prune())
            features.append(circuit.counts()["features"])
            groups.append(sum(group.kind in ("features", "outputs") for group in circuit.group().groups))
        at_most = sum(count <= 8 for count in groups)
        print(f"{behaviour.name:34}{np.mean(features):9.1f}{np.mean(groups):8.1f}{max(groups):6d}{at_most:11d}")


if __name__ == "__main__":
    main()
