"""How many features does the demo need to be left with, chosen in which order, to do what it does?

    python examples/faithfulness.py                     # tables
    python examples/faithfulness.py --figure curve      # curve.svg and curve.png as well

The first held-out probes of every behaviour (none is picked), in one random order. Features that are left out are resampled
from held-out rows of the corpus, of seed 0; the faithful order is searched with 16 rows of seed 1. Intervals are confidence
sequences over the prompts (95 %): they hold at every number of prompts at once.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from plot_style import STYLE, save

import circuits
import replacement
from circuits.attribution.grounding import Grounding
from circuits.graph.nodes import NodeKind
from circuits.validation.confidence import confidence_sequence
from circuits.validation.faithful import prune_faithfully, rounds
from circuits.validation.resampling import Resampler
from circuits.validation.sufficiency import COUNTS, clean_output, first_of, over_features, scores
from replacement import ReplacementModel
from replacement.demo.corpus import behaviours, held_out_rows
from replacement.splicing.clean_run import Conditions

BUDGETS = (20, 40, 60, 100)
"""Nodes of whole circuits."""
TARGET = 0.7
SEARCHED, REPORTED = (16, 1), (8, 0)
"""Rows and seed of the other prompts."""
HELD: dict[str, dict[str, Any]] = {
    "all live": {},
    "attention patterns frozen": {"conditions": Conditions(patterns="frozen")},
    "norms frozen": {"conditions": Conditions(norms="frozen")},
    "both frozen": {"conditions": Conditions(patterns="frozen", norms="frozen")},
    "errors resampled too": {"errors": "resample"},
    "zero in place of resampled features": {"ablation": "zero"},
    "zero, patterns frozen": {"ablation": "zero", "conditions": Conditions(patterns="frozen")},
}


def other_rows(model: ReplacementModel, context: int, n_rows: int, seed: int) -> list[torch.Tensor]:
    """Held-out rows of the corpus as other prompts."""
    rows = held_out_rows(model.language_model.tokenizer, n_rows=n_rows, context=context, seed=seed)
    return [torch.from_numpy(row) for row in rows]


def faithfulness_of(resampler: Resampler, kept_PS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Faithfulness and KL of circuits."""
    nothing = np.zeros((1, resampler.n_features), dtype=bool)
    output_P, kl_P = resampler.measure(np.concatenate([nothing, kept_PS]))
    return (output_P[1:] - output_P[0]) / (clean_output(resampler) - output_P[0]), kl_P[1:]


def facts_of(model: ReplacementModel, prompt: str) -> dict[str, Any]:
    """Everything about one prompt."""
    graph = circuits.trace(model, prompt)
    grounding, context = Grounding.of(model, graph), len(graph.metadata["tokens"])
    reported = other_rows(model, context, *REPORTED)
    searched = other_rows(model, context, *SEARCHED)
    resampler, search = Resampler(model, grounding, reported), Resampler(model, grounding, searched)
    pruned = graph.prune()
    pruned_S = over_features(grounding, np.isin(graph.nodes.ids(), pruned.nodes.ids())) > 0
    stay = len(pruned.nodes) - int(pruned.nodes.mask(NodeKind.FEATURE).sum())
    n_features, begun = resampler.n_features, time.process_time()
    budgets = [min(max(budget - stay, 0), n_features) for budget in BUDGETS]
    ranked = {name: first_of(score_S, [*COUNTS, *budgets]) for name, score_S in scores(resampler).items()}
    faithful = _by_size(search, [*COUNTS, *budgets])
    seconds = time.process_time() - begun
    orders = {}
    for name, kept_PS in {**ranked, "faithful": faithful}.items():
        faithfulness_P, kl_P = faithfulness_of(resampler, kept_PS)
        orders[name] = {"faithfulness": faithfulness_P.tolist(), "kl": kl_P.tolist()}
    begun = time.process_time()
    circuit = prune_faithfully(model, graph, searched, faithfulness=TARGET)
    circuit_S = over_features(grounding, np.isin(graph.nodes.ids(), circuit.nodes.ids())) > 0
    found = faithfulness_of(resampler, circuit_S[None])
    pruned_found = faithfulness_of(resampler, pruned_S[None])
    held = {name: Resampler(model, grounding, reported, **options) for name, options in HELD.items()}
    return {
        "prompt": prompt,
        "features": n_features,
        "orders": orders,
        "why": {name: float(faithfulness_of(other, pruned_S[None])[0][0]) for name, other in held.items()},
        "pruned": {
            "nodes": len(pruned.nodes),
            "faithfulness": float(pruned_found[0][0]),
            "kl": float(pruned_found[1][0]),
        },
        "target": {"nodes": len(circuit.nodes), "faithfulness": float(found[0][0]), "kl": float(found[1][0])},
        "reached": circuit.metadata["pruning"]["faithful"]["reached"],
        "seconds": {"orders": seconds, "target": time.process_time() - begun},
    }


def _by_size(search: Resampler, counts: list[int]) -> np.ndarray:
    """bool[P, S], circuits of the faithful search, one search for every size, as its rounds depend on the budget."""
    found = {}
    for count in sorted(set(counts)):
        kept_S = np.zeros(search.n_features, dtype=bool)
        for kept_PS in rounds(search, count) if count else ():
            kept_S = kept_PS[-1]
        found[count] = kept_S
    return np.stack([found[count] for count in counts])


def interval(values: list[float], low: float, high: float) -> str:
    """Mean, standard deviation, and the confidence sequence at its end, of values cut to its bounds."""
    x = np.array(values)
    lower, upper = confidence_sequence(x.clip(low, high), low=low, high=high)[-1]
    return f"{x.mean():7.3f} ({x.std(ddof=1):.3f}) [{lower:.2f}, {upper:.2f}]"


def tables(found: list[dict[str, Any]], most_kl: float) -> Iterator[str]:
    """Lines to print."""
    yield f"{len(found)} prompts; faithfulness: mean (sd) [95 % confidence sequence of the mean, cut to 0..1]"
    yield "\npruned by influence (thresholds 0.8 and 0.98), mean nodes "
    yield f"  {np.mean([row['pruned']['nodes'] for row in found]):.1f}"
    for name in HELD:
        yield f"  {name:38}{interval([row['why'][name] for row in found], 0, 1)}"
    for offset, kind in ((len(COUNTS), "nodes"), (0, "features")):
        for number, size in enumerate(BUDGETS if kind == "nodes" else COUNTS):
            yield f"\n{size} {kind}{'':20}faithfulness{'':24}KL, nats (cut to {most_kl:.2f} in brackets)"
            for name in found[0]["orders"]:
                rows = [row["orders"][name] for row in found]
                figures = [[row[key][offset + number] for row in rows] for key in ("faithfulness", "kl")]
                yield f"  {name:24}{interval(figures[0], 0, 1)}    {interval(figures[1], 0, most_kl)}"
    for key in ("pruned", "target"):
        rows = [row[key] for row in found]
        name = "by influence" if key == "pruned" else f"searched until {TARGET} on other rows, at most 60 nodes"
        yield f"\n{name}: {np.mean([row['nodes'] for row in rows]):.1f} nodes, at most {max(row['nodes'] for row in rows)}"
        yield f"  faithfulness {interval([row['faithfulness'] for row in rows], 0, 1)}"
        yield f"  KL {interval([row['kl'] for row in rows], 0, most_kl)}"
    yield f"  target reached on {sum(row['reached'] for row in found)} prompts"
    seconds = [row["seconds"]["target"] for row in found]
    yield f"  CPU seconds per prompt, trace excluded: mean {np.mean(seconds):.2f}, largest {max(seconds):.2f}"


def draw(found: list[dict[str, Any]], most_kl: float, target: Path) -> None:
    """KL and faithfulness over the number of features kept, with confidence sequences."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for name in found[0]["orders"]:
            for axis, key, high in zip(axes, ("kl", "faithfulness"), (most_kl, 1.0), strict=True):
                values = np.array([row["orders"][name][key][: len(COUNTS)] for row in found]).clip(0, high)
                bounds = np.array([confidence_sequence(column, low=0, high=high)[-1] for column in values.T])
                (line,) = axis.plot(COUNTS, values.mean(0), marker="o", label=name)
                axis.fill_between(COUNTS, *bounds.T, alpha=0.12, color=line.get_color(), linewidth=0)
        for axis, label in zip(axes, ("KL, nats, cut at ln V", "faithfulness, cut to 0..1"), strict=True):
            axis.set(xscale="log", xlabel="features kept", ylabel=label)
        axes[1].legend()
        save(figure, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="first of the held-out probes of every behaviour")
    parser.add_argument("--prompts", type=int, default=3, help="held-out probes of every behaviour")
    parser.add_argument("--json", type=Path, help="file for the facts of every prompt")
    parser.add_argument("--figure", type=Path, help="file without suffix")
    arguments = parser.parse_args()
    model = replacement.load("demo")
    chosen = slice(arguments.first, arguments.first + arguments.prompts)
    prompts = [probe.prompt for skill in behaviours() for probe in skill.probes[chosen]]
    order = np.random.default_rng(0).permutation(len(prompts))
    found = [facts_of(model, prompts[number]) for number in order]
    most_kl = math.log(model.language_model.vocabulary_size)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found), encoding="utf-8")
    if arguments.figure is not None:
        draw(found, most_kl, arguments.figure)
    print("\n".join(tables(found, most_kl)))


if __name__ == "__main__":
    main()
