"""Do the stories of the demo's graphs hold in the model?

    python examples/explain_demo.py

Tells and tests the story of Dallas and of 20 more held-out cities, and of 20 held-out probes of each of three other behaviours:
the first ones of the corpus, in its order. Behaviours and prompts were written down here before any of their stories was
seen; the rules of `circuits.explain` were settled on cities of other states and on other probes. Prints the share of
claims that held, with an interval over prompts, and lists every claim that did not.

    python examples/explain_demo.py --further

The same for 20 probes of each of four more behaviours, which had not been reported on when the rules were last changed.

    python examples/explain_demo.py --contrasts

The same 20 probes of agreement, asked as a contrast: why `are` rather than `is`, and so on.
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
from circuits.explain.counterfactuals import demo_counterfactuals
from circuits.explain.story import share_within
from replacement import ReplacementModel
from replacement.demo.corpus import HELD_OUT_CITIES, HELD_OUT_STATES, Probe, behaviours, state_of, two_hop_probe

OTHERS = ("agreement", "antonyms", "question mark")
FURTHER = ("indirect object", "induction", "greater-than", "addition")
OTHER_NUMBER = {"are": "is", "were": "was", "have": "has", "is": "are", "was": "were", "has": "have"}
PROMPTS = 20
Facts = Mapping[str, Any]


def reported_probes(*, further: bool = False) -> dict[str, list[Probe]]:
    """What is reported on, by behaviour."""
    by_name = {behaviour.name: behaviour.probes for behaviour in behaviours()}
    if further:
        return {name: list(by_name[name][:PROMPTS]) for name in FURTHER}
    cities = [city for city in HELD_OUT_CITIES if city != "Dallas" and state_of(city) not in HELD_OUT_STATES]
    probes = {"two-hop geography": [two_hop_probe(city) for city in ["Dallas", *cities[:PROMPTS]]]}
    return probes | {name: list(by_name[name][:PROMPTS]) for name in OTHERS}


def story_of(model: ReplacementModel, probe: Probe, *, contrast: bool = False) -> dict[str, Any]:
    """The tested story of one probe and whether its answer is right; as a contrast, against the verb of the other number."""
    answer = probe.answers[0]
    graph = circuits.trace(model, probe.prompt, targets=f"{answer} - {OTHER_NUMBER[answer]}" if contrast else None)
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


def share_by_influence(stories: Sequence[Facts]) -> float:
    """Share of the tested claims that held, each counted with its influence."""
    claims = [claim for story in stories for claim in story["claims"] if claim["verdict"] != "untested"]
    held = sum(claim["influence"] for claim in claims if claim["verdict"] == "held")
    total = sum(claim["influence"] for claim in claims)
    return held / total if total else float("nan")


def verdicts_by_target(stories: Sequence[Facts]) -> Counter[tuple[str, str]]:
    """Numbers of claims by the kind of group that they are about, and verdict."""
    count: Counter[tuple[str, str]] = Counter()
    for story in stories:
        kinds = {group["name"]: group["kind"] for group in story["groups"]}
        count.update((kinds[claim["target"]], claim["verdict"]) for claim in story["claims"])
    return count


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
    about = verdicts_by_target(stories)
    of_kind = (
        f"about {kind} {about[kind, 'held']} of {about[kind, 'held'] + about[kind, 'refuted']}"
        for kind in ("features", "outputs")
    )
    print(f"  held, weighted with influence: {share_by_influence(stories):.0%}; {', '.join(of_kind)}")
    print(f"  with the claimed sign in every trial, controls aside: {share_of_signs(stories):.0%}")
    claims = [claim for story in stories for claim in story["claims"]]
    graph, model = (share_within(claims, name) or 0.0 for name in ("predicted", "replacement"))
    print(
        f"  live effects within a factor of two of what the graph predicts: {graph:.0%}, the replacement model: {model:.0%}"
    )
    not_told = Counter(claim["verdict"] for story in stories for claim in story["withheld"])
    print(
        f"  not told, as the replacement model does not bear them out: {not_told.total()}, of which {not_told['held']} would "
        f"have held; held of all, these included: {share_held(stories, withheld=True):.0%}"
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
                f"{test['trial']} {test['condition']} {test['outcome']}, {scale * test['predicted']:.1f}{unit} by the graph, "
                f"{scale * test['replacement']:.1f} by the replacement model, {scale * test['measured']:.1f} measured"
                for test in failed
            )
            said = f"{claim['source']} {claim['says']} {claim['target']}"
            print(f"  {story['prompt']}: {said} ({claim['influence']:.0%} of influence): {tests}")


def names_its_state(story: Facts) -> bool:
    """Whether a group of features is named after the state of the prompt's city."""
    city = next(city for city in HELD_OUT_CITIES if f" {city} " in f" {story['prompt']} ")
    return any(state_of(city) in group["name"] for group in story["groups"] if group["kind"] == "features")


def print_cities(cities: Sequence[Facts]) -> None:
    """The story of Dallas, and how many groups are named after their city's state."""
    print(f"Dallas: {len(cities[0]['groups'])} groups ({', '.join(group['name'] for group in cities[0]['groups'])})")
    for sentence in cities[0]["sentences"]:
        print(f"  {sentence['text']}: {sentence['verdict']}")
    print(f"a group is named after the city's state: {sum(map(names_its_state, cities))} of {len(cities)} cities")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the facts of every story")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--further", action="store_true", help="four more behaviours instead")
    instead.add_argument("--contrasts", action="store_true", help="agreement asked as a contrast instead")
    arguments = parser.parse_args()
    model, contrasts = replacement.load("demo"), arguments.contrasts
    probes = reported_probes(further=arguments.further)
    if contrasts:
        probes = {"agreement": probes["agreement"]}
    found = {name: [story_of(model, probe, contrast=contrasts) for probe in chosen] for name, chosen in probes.items()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found), encoding="utf-8")
    summed = found
    if "two-hop geography" in found:
        print_cities(found["two-hop geography"])
        summed = {"Dallas alone": found["two-hop geography"][:1], **found}
    for name, stories in summed.items():
        print_summary(name, stories)
    print("\nRefuted:")
    for stories in found.values():
        print_failures(stories)


if __name__ == "__main__":
    main()
