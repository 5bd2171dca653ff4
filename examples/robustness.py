"""How much of the demo's circuits survives other thresholds, other names, other templates and another crosscoder?

    python examples/robustness.py
    replacement train examples/recipes/demo.toml --out runs/seed1 --set training.seed=1 --set training.n_tokens=1_024_000
    python examples/robustness.py --other-crosscoder runs/seed1

Traces the first held-out probes of every behaviour (none is picked; those of `examples/validate_circuits.py`) and prints mean
and standard deviation over the prompts of what `circuits validate` says about robustness. The thresholds, the cut-offs of core
and noise, the kinds of variants and the least likeness of matching features were fixed before these prompts were traced.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import circuits
import replacement
from circuits.validation.command import prompts_to_compare
from circuits.validation.robustness import robustness
from circuits.validation.survival import summed_places
from replacement import checkpoint
from replacement.console import finite
from replacement.demo.corpus import behaviours
from replacement.loading import crosscoder_folder

Facts = Mapping[str, Any]
SHARES = ("equal_tokens", "active", "kept", "influence_active", "influence_kept", "edges_kept", "edge_influence_kept")
SHARES += ("jaccard", "overlap")
MATCHED = ("likeness", "matched", "influence_matched", *SHARES[1:])


def print_means(title: str, rows: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> None:
    """Mean and standard deviation of some figures, with the number of prompts that have them."""
    print(f"\n{title}")
    for name in names:
        values = [value for row in rows if (value := row.get(name)) is not None]
        if values:
            spread = stdev(values) if len(values) > 1 else math.nan
            print(f"  {name:24}{fmean(values):8.3f} ({spread:.3f})  {len(values)} prompts")


def class_shares(facts: Facts) -> dict[str, float]:
    """Of each class: its share of the circuit's nodes and edges, and of all influence."""
    rows, figures = facts["thresholds"]["classes"], {}
    for row in rows:
        for things in ("nodes", "edges"):
            total = sum(other[f"circuit_{things}"] for other in rows)
            figures[f"{row['class']}, {things}"] = row[f"circuit_{things}"] / total if total else math.nan
            figures[f"{row['class']}, {things}, infl."] = row[f"{things}_influence"]
    return figures


def print_places(kind: str, found: Sequence[Facts]) -> None:
    """What survives by place and layer; influence is summed over the prompts."""
    every = [row for facts in found for row in facts["places"]]
    heads = f"{'features':>10}{'kept':>8}{'infl. active':>14}{'infl. kept':>12}"
    print(f"\n{kind}: by place and layer\n  {'place':8}{'layer':>6}{heads}")
    for row in summed_places([*every, *({**row, "layer": -1} for row in every)]):
        active, kept = (row[f"influence_{name}"] / row["influence"] for name in ("active", "kept"))
        layer = "all" if row["layer"] < 0 else row["layer"]
        print(
            f"  {row['place']:8}{layer:>6}{row['features']:10}{row['kept'] / row['features']:8.3f}{active:14.3f}{kept:12.3f}"
        )


def print_report(found: Mapping[str, Sequence[Facts]]) -> None:
    """Every table, from the facts of the prompts of each behaviour."""
    every = [facts for group in found.values() for facts in group]
    print(f"{len(every)} prompts")
    print_means(
        "Thresholds: shares of the circuit, and of all influence",
        [class_shares(f) for f in every],
        list(class_shares(every[0])),
    )
    for kind in dict.fromkeys(row["kind"] for facts in every for row in facts["prompts"]):
        rows = [row for facts in every for row in facts["prompts"] if row["kind"] == kind]
        same, n_prompts = (sum(row[name] for row in rows) for name in ("same_answers", "prompts"))
        print_means(f"{kind}: {n_prompts} prompts, {same} with the same answer", rows, SHARES)
        print_places(kind, rows)
    crosscoders = [facts["crosscoder"] for facts in every if facts["crosscoder"]]
    print_means("Another crosscoder", crosscoders, MATCHED)
    print(
        f"\n{'influence':26}{'core':>8}"
        + "".join(f"{kind:>14}" for kind in ("same answer", "other answer", "paraphrase", "crosscoder"))
    )
    for name, group in found.items():
        columns = [fmean(facts["thresholds"]["classes"][0]["nodes_influence"] for facts in group)]
        for kind in ("same answer", "other answer", "paraphrase"):
            kept = [row["influence_kept"] for facts in group for row in facts["prompts"] if row["kind"] == kind]
            columns.append(fmean(kept) if kept else math.nan)
        columns.append(fmean(f["crosscoder"]["influence_kept"] for f in group) if group[0]["crosscoder"] else math.nan)
        print(f"{name:26}{columns[0]:8.3f}" + "".join(f"{x:14.3f}" for x in columns[1:]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=3, help="held-out probes of every behaviour")
    parser.add_argument("--other-crosscoder", help="another crosscoder of the demo, or the folder of its run")
    parser.add_argument("--json", type=Path, help="file for the facts of every prompt")
    arguments = parser.parse_args()
    model = replacement.load("demo")
    other = arguments.other_crosscoder
    crosscoder = None if other is None else checkpoint.load(crosscoder_folder(other))
    found: dict[str, list[Facts]] = {}
    for skill in behaviours():
        for probe in skill.probes[: arguments.prompts]:
            graph = circuits.trace(model, probe.prompt)
            prompts = prompts_to_compare(graph, None, is_demo=True)
            facts = finite(robustness(model, graph, prompts=prompts, other_crosscoder=crosscoder))
            found.setdefault(skill.name, []).append(facts)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found), encoding="utf-8")
    print_report(found)


if __name__ == "__main__":
    main()
