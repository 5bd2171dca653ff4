"""Do the stories of the demo's graphs hold in the model?

    python examples/explain_demo.py

Tells and tests the story of Dallas and of 20 more held-out cities, and of 20 held-out probes of each of three other behaviours:
the first ones of the corpus, in its order. Behaviours and prompts were written down here before any of their stories was
seen; the rules of `circuits.explain` were settled on cities of training sentences and on behaviours that are not here. Prints
the share of claims that held, with an interval over prompts, and lists every claim that did not.

    python examples/explain_demo.py --norms

Why some claims about the answer are not told: on five further probes of agreement, the same ablations with norms live and with
norms frozen, each beside what the graph predicts with the final norm following the change and with the norm held.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import circuits
import replacement
from circuits.attribution.grounding import Grounding
from circuits.explain.claims import MOST_GROUPS, claims_of, story_groups
from circuits.explain.counterfactuals import demo_counterfactuals
from circuits.explain.results import excess_interval, outcome
from circuits.explain.trials import Trials, circuit_of
from circuits.validation.effects import Effects
from replacement import ReplacementModel
from replacement.demo.corpus import HELD_OUT_CITIES, HELD_OUT_STATES, Probe, behaviours, state_of, two_hop_probe

OTHERS = ("agreement", "antonyms", "question mark")
PROMPTS = 20
Facts = Mapping[str, Any]


def reported_probes() -> dict[str, list[Probe]]:
    """What is reported on, by behaviour."""
    cities = [city for city in HELD_OUT_CITIES if city != "Dallas" and state_of(city) not in HELD_OUT_STATES]
    probes = {"two-hop geography": [two_hop_probe(city) for city in ["Dallas", *cities[:PROMPTS]]]}
    by_name = {behaviour.name: behaviour.probes for behaviour in behaviours()}
    return probes | {name: list(by_name[name][:PROMPTS]) for name in OTHERS}


def story_of(model: ReplacementModel, probe: Probe) -> dict[str, Any]:
    """The tested story of one probe, and whether the model answers it."""
    graph = circuits.trace(model, probe.prompt)
    facts = circuits.explain_graph(model, graph, against=demo_counterfactuals(model.language_model, graph))
    return {**facts, "is_right": graph.metadata["top_tokens"][0]["token"] in probe.answers}


def share_held(stories: Sequence[Facts], *, withheld: bool = False) -> float:
    """Share of the tested claims of all stories that held; with those that are tested, but not told."""
    told = [claim["verdict"] for story in stories for claim in story["claims"]]
    not_told = [claim["verdict"] for story in stories for claim in story["withheld"] if withheld]
    count = Counter(told + not_told)
    tested = count["held"] + count["refuted"]
    return count["held"] / tested if tested else float("nan")


def share_of_signs(stories: Sequence[Facts]) -> float:
    """Share of the tested claims whose effect has the claimed sign in every trial, whatever controls do."""
    signs = [
        all((test["measured"] < 0) == (claim["says"] == "raises") for test in claim["tests"])
        for story in stories
        for claim in story["claims"]
        if claim["tests"]
    ]
    return float(np.mean(signs))


def interval(stories: Sequence[Facts]) -> tuple[float, float]:
    """95 % interval of the share over prompts, whose claims stand or fall together: percentiles of 2,000 bootstrap samples."""
    random = np.random.default_rng(0)
    draws = random.integers(len(stories), size=(2000, len(stories)))
    shares = [share_held([stories[i] for i in draw]) for draw in draws.tolist()]
    low, high = np.nanquantile(shares, [0.025, 0.975])
    return float(low), float(high)


def print_summary(name: str, stories: Sequence[Facts]) -> None:
    """One behaviour: how many claims held, and under which trials."""
    low, high = interval(stories)
    count = {key: sum(story[key] for story in stories) for key in ("held", "refuted", "untested")}
    right, groups = sum(story["is_right"] for story in stories), max(len(story["groups"]) for story in stories)
    whole = sum(not story["refuted"] for story in stories)
    print(f"\n{name}: {len(stories)} prompts, {right} answered rightly, at most {groups} groups")
    print(
        f"  claims held: {share_held(stories):.0%} [{low:.0%}, {high:.0%}] of {count['held'] + count['refuted']} tested, "
        f"{count['untested']} not tested; stories without a refuted claim: {whole}"
    )
    print(f"  with the claimed sign in every trial, controls aside: {share_of_signs(stories):.0%}")
    not_told = Counter(claim["verdict"] for story in stories for claim in story["withheld"])
    print(
        f"  not told, as the final norm would undo them: {not_told.total()}, of which {not_told['held']} would have held; "
        f"held of all, these included: {share_held(stories, withheld=True):.0%}"
    )
    told = np.mean([story["told"] for story in stories])
    print(f"  influence into the groups that the claims tell: {told:.0%}")
    outcomes: Counter[tuple[str, ...]] = Counter()
    for story in stories:
        kinds = {group["name"]: group["kind"] for group in story["groups"]}
        for claim in story["claims"]:
            for test in claim["tests"]:
                outcomes[kinds[claim["source"]], test["trial"], test["condition"], test["outcome"]] += 1
    for key in dict.fromkeys(counted[:3] for counted in sorted(outcomes)):
        found = {name: outcomes[(*key, name)] for name in ("held", "within noise", "wrong sign")}
        print(f"    {' '.join(key):32}" + ", ".join(f"{count:3} {name}" for name, count in found.items()))


def print_failures(stories: Sequence[Facts]) -> None:
    """Every claim that was refuted, with what was predicted and measured where it failed."""
    for story in stories:
        for claim in story["claims"]:
            failed = [test for test in claim["tests"] if test["outcome"] != "held"]
            if not failed:
                continue
            scale, unit = (1, " logits") if claim["unit"] == "logits" else (100, " %")
            tests = "; ".join(
                f"{test['trial']} {test['condition']} {test['outcome']}, {scale * test['predicted']:.1f}{unit} predicted, "
                f"{scale * test['measured']:.1f} measured"
                for test in failed
            )
            said = f"{claim['source']} {claim['says']} {claim['target']}"
            print(f"  {story['prompt']}: {said} ({claim['influence']:.0%} of influence): {tests}")


def print_norms(model: ReplacementModel) -> None:
    """Groups of features that are said to raise the answer, ablated with all other outputs held: norms live and frozen."""
    probes = next(behaviour.probes for behaviour in behaviours() if behaviour.name == "agreement")
    found: dict[tuple[str, str], list[tuple[float, float, str]]] = {("live", "live"): [], ("held", "frozen"): []}
    for probe in probes[40:45]:
        graph = circuits.trace(model, probe.prompt)
        grouping = circuit_of(graph).group()
        trials = Trials(Effects(model, Grounding.of(model, graph)), grouping, controls=99, seed=0)
        kind = [group.kind for group in grouping.groups]
        for claim in claims_of(grouping, story_groups(grouping, MOST_GROUPS)):
            source, target = claim.edge.source, claim.edge.target
            trial = trials.ablated(source)
            if kind[target] != "outputs" or kind[source] != "features" or trial is None:
                continue
            edits = [*trial.edits, *trial.controls]
            for (norm, norms), results in found.items():
                predicted = float(trials.predicted(trial, total=False, norm=norm)[0, target])
                run = trials.effects.measure_edits(edits, "constrained", "live", norms=norms)
                measured, *controls = (run.change_BN @ trials.reading_NG[:, target]).tolist()
                interval = excess_interval(measured, np.array(controls))
                results.append((predicted, measured, outcome(-claim.sign, measured, interval)))
    for (_, norms), results in found.items():
        predicted, measured = (float(np.median([row[column] for row in results])) for column in (0, 1))
        held = sum(result[2] == "held" for result in results)
        print(
            f"norms {norms}: {held} of {len(results)} would hold; median {predicted:.1f} predicted, {measured:.1f} measured"
        )


def names_its_state(story: Facts) -> bool:
    """Whether a group of features is named after the state of the prompt's city."""
    city = next(city for city in HELD_OUT_CITIES if f" {city} " in f" {story['prompt']} ")
    return any(state_of(city) in group["name"] for group in story["groups"] if group["kind"] == "features")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the facts of every story")
    parser.add_argument("--norms", action="store_true", help="why some claims about the answer are not told")
    arguments = parser.parse_args()
    model = replacement.load("demo")
    if arguments.norms:
        print_norms(model)
        return
    found = {name: [story_of(model, probe) for probe in probes] for name, probes in reported_probes().items()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found), encoding="utf-8")
    cities = found["two-hop geography"]
    print(f"Dallas: {len(cities[0]['groups'])} groups ({', '.join(group['name'] for group in cities[0]['groups'])})")
    for sentence in cities[0]["sentences"]:
        print(f"  {sentence['text']}: {sentence['verdict']}")
    print(f"a group is named after the city's state: {sum(map(names_its_state, cities))} of {len(cities)} cities")
    for name, stories in {"Dallas alone": cities[:1], **found}.items():
        print_summary(name, stories)
    print("\nRefuted:")
    for stories in found.values():
        print_failures(stories)


if __name__ == "__main__":
    main()
