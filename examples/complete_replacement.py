"""What does it cost to replace attention outputs too, and what does it change in the graphs?

    python examples/complete_replacement.py

Measures the demo's crosscoders on rows of its corpus that no training drew, errors propagating: variance unexplained and
active features per token on clean activations, then the output with everything named in the row replaced at once. Then traces
the first held-out prompts of every behaviour with linear attention, where edges run through heads, and with features of
attention, where every step through attention is a node: means of the graphs' scores and path lengths.
"""

import argparse
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

import circuits
import replacement
from circuits.graph.paths import average_path_length
from replacement import ReplacementModel
from replacement.demo.corpus import behaviours, held_out_rows
from replacement.validation.fidelity import measure_fidelity

NAMES = {"mlp": "MLPs", "attention": "attention", "both": "both"}
COLUMNS = {
    "unexplained": "11.4f",
    "L0": "6.1f",
    "KL (nats)": "9.4f",
    "agreement, p >= 0.5": "19.4f",
    "agreement": "9.4f",
}
"""Columns of the table, and how their values are written."""


def measure(model: ReplacementModel, n_rows: int) -> dict[str, dict[str, float]]:
    """One row of the table for each choice of what is replaced."""
    lm = model.language_model
    rows = torch.from_numpy(held_out_rows(lm.tokenizer, n_rows=n_rows, context=lm.context_length, seed=0))
    choices = {part: [crosscoder] for part, crosscoder in model.crosscoders.items()}
    choices["both"] = list(model.crosscoders.values())
    table = {}
    for name, crosscoders in choices.items():
        fidelity = measure_fidelity(lm, crosscoders, rows)
        values = (fidelity.mean_unexplained, fidelity.total_l0, fidelity.kl, fidelity.agreement, fidelity.agreement_all)
        table[NAMES[name]] = {
            column: float("nan") if value is None else value for column, value in zip(COLUMNS, values, strict=True)
        }
    return table


def print_table(table: Mapping[str, Mapping[str, float]]) -> None:
    """One line per choice."""
    widths = {column: max(len(column), len(f"{0:{form}}")) for column, form in COLUMNS.items()}
    print("replaced   " + "".join(f"  {column:>{widths[column]}}" for column in COLUMNS))
    for name, row in table.items():
        cells = (f"{row[column]:{form}}".strip() for column, form in COLUMNS.items())
        aligned = (f"  {cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
        print(f"{name:11}" + "".join(aligned))


def graph_facts(model: ReplacementModel, prompts: Sequence[str]) -> dict[str, float]:
    """Means over the prompts' graphs."""
    graphs = [circuits.trace(model, prompt) for prompt in prompts]
    pruned = [graph.prune() for graph in graphs]
    return {
        "replacement": fmean(graph.scores().replacement for graph in graphs),
        "completeness": fmean(graph.scores().completeness for graph in graphs),
        "average path length": fmean(average_path_length(graph) for graph in graphs),
        "nodes": fmean(len(graph.nodes) for graph in graphs),
        "edges": fmean(len(graph.edges) for graph in graphs),
        "pruned: replacement": fmean(graph.scores().replacement for graph in pruned),
        "pruned: completeness": fmean(graph.scores().completeness for graph in pruned),
        "pruned: path length": fmean(average_path_length(graph) for graph in pruned),
        "pruned: nodes": fmean(len(graph.nodes) for graph in pruned),
        "identity error, largest": max(graph.identity_error for graph in graphs),
        "seconds": fmean(graph.metadata["seconds"] for graph in graphs),
    }


def print_graphs(prompts: Sequence[str]) -> None:
    """Both kinds of graph side by side."""
    facts = {
        "linear": graph_facts(replacement.load("demo"), prompts),
        "features": graph_facts(replacement.load("demo", attention_crosscoder="demo"), prompts),
    }
    print(f"\n{f'attention ({len(prompts)} prompts)':26}" + "".join(f"{name:>12}" for name in facts))
    for key in facts["linear"]:
        cells = (f"{fact[key]:12.1e}" if "error" in key else f"{fact[key]:12,.3f}" for fact in facts.values())
        print(f"{key:26}" + "".join(cells))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="held-out rows of 64 tokens")
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts of every behaviour that are traced")
    arguments = parser.parse_args()
    print_table(measure(replacement.load("demo", attention_crosscoder="demo"), arguments.rows))
    print_graphs([probe.prompt for skill in behaviours() for probe in skill.probes[: arguments.prompts]])


if __name__ == "__main__":
    main()
