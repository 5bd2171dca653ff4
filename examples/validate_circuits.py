"""How far do the demo's graphs predict interventions, and are its circuits enough and needed?

    python examples/validate_circuits.py

Traces the first held-out probes of every behaviour (none is picked), runs `circuits validate` on every graph, and prints mean,
standard deviation and range over the prompts. Features are drawn uniformly from each graph with one seed.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import circuits
import replacement
from circuits.validation.validate import validate
from replacement import ReplacementModel
from replacement.demo.corpus import behaviours, held_out_rows

Facts = Mapping[str, Any]
OTHERS = 8


def facts_of(model: ReplacementModel, prompt: str, *, n_features: int, seed: int) -> Facts:
    """Trace and validate one prompt, with rows of the held-out corpus to resample from."""
    graph = circuits.trace(model, prompt)
    context = len(graph.metadata["tokens"])
    rows = held_out_rows(model.language_model.tokenizer, n_rows=OTHERS, context=context, seed=0)
    return validate(model, graph, others=[torch.from_numpy(row) for row in rows], n_features=n_features, seed=seed)


def keyed(rows: Sequence[Facts], names: Sequence[str], value: str) -> dict[tuple[str, ...], float | None]:
    """One figure of every row, by the names of its setting."""
    return {tuple(str(row[name]) for name in names): row[value] for row in rows}


def print_rows(
    title: str, found: Sequence[Facts], select: Callable[[Facts], Mapping[tuple[str, ...], float | None]]
) -> None:
    """One line per setting: mean, standard deviation, range, and the number of prompts that have the figure."""
    print(f"\n{title:52}{'mean':>9}{'sd':>9}{'min':>9}{'max':>9}{'prompts':>9}")
    columns = [select(facts) for facts in found]
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [value for column in columns if (value := column.get(key)) is not None]
        if values:
            spread = stdev(values) if len(values) > 1 else math.nan
            figures = (fmean(values), spread, min(values), max(values))
            print(
                f"{'  ' + ' '.join(f'{part:12}' for part in key):52}"
                + "".join(f"{x:9.3f}" for x in figures)
                + f"{len(values):9}"
            )


def print_report(found: Sequence[Facts]) -> None:
    """Every table."""
    worst = max(facts["self_check"]["relative_error"] for facts in found)
    print(f"{len(found)} prompts; direct edges with everything frozen (self-check): off by {worst:.1e} at most")
    print_rows(
        "Influence against KL when ablated, Spearman",
        found,
        lambda facts: keyed(facts["influence_against_ablation"], ("patching", "patterns"), "spearman"),
    )
    print_rows(
        "Influence among features, Spearman",
        found,
        lambda facts: keyed(facts["influence_among_features"], ("patterns",), "spearman"),
    )
    for value in ("cosine", "nmse", "cosine_added"):
        print_rows(
            f"Perturbed streams, {value}",
            found,
            lambda facts, value=value: keyed(facts["perturbations"], ("kind", "patterns", "distance"), value),  # type: ignore[misc]
        )
    titles = {
        "cosine": "One layer downstream, cosine: mean of features",
        "median": "One layer downstream, cosine: median feature",
        "larger_half": "One layer downstream, cosine: larger effects",
        "all_features": "One layer downstream, with all of its features",
    }
    for value, title in titles.items():
        print_rows(
            title,
            found,
            lambda facts, value=value: keyed(facts["one_layer_cosine"], ("change", "patterns", "norms"), value),  # type: ignore[misc]
        )
    for value in ("spearman", "pearson", "cosine", "nmse"):
        print_rows(
            f"Ablated, {value} by layer distance",
            found,
            lambda facts, value=value: keyed(  # type: ignore[misc]
                [row for row in facts["effects"] if row["change"] == "ablated"],
                ("patching", "patterns", "norms", "distance"),
                value,
            ),
        )
    for errors in ("keep", "resample"):
        print_rows(f"Circuits, errors: {errors}", found, lambda facts, errors=errors: circuit(facts, errors))  # type: ignore[misc]
    shape = ("average_path_length", "hop_fidelity")
    print_rows("Paths", found, lambda facts: {(name,): facts[name] for name in shape})


def circuit(facts: Facts, errors: str) -> dict[tuple[str, ...], float | None]:
    """Figures of resampled ablation."""
    own, figures = facts["circuit"][errors], {}
    for order, found in own["orders"].items():
        figures |= {(order, "CPR"): found["cpr"], (order, "CMD"): found["cmd"]}
    for name in ("faithfulness", "necessity", "kl"):
        figures[("pruned", name)] = own["pruned"][name]
        for share in (0.1, 0.5):
            sizes = own["orders"]["influence"]["sizes"]
            figures[(f"share {share:g}", name)] = next(row[name] for row in sizes if row["share"] >= share)
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=3, help="held-out probes of every behaviour")
    parser.add_argument("--features", type=int, default=64, help="features drawn from each graph")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--json", type=Path, help="file for the facts of every prompt")
    arguments = parser.parse_args()
    model = replacement.load("demo")
    prompts = [probe.prompt for skill in behaviours() for probe in skill.probes[: arguments.prompts]]
    found = [facts_of(model, prompt, n_features=arguments.features, seed=arguments.seed) for prompt in prompts]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found), encoding="utf-8")
    print_report(found)


if __name__ == "__main__":
    main()
