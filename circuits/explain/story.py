"""The story of a graph, tested: groups, claims about what raises or lowers what, and what the model does. The conductor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import compress
from typing import Any

import numpy as np

from circuits.attribution.grounding import Grounding
from circuits.explain.claims import MOST_GROUPS, Claim, claims_of, story_groups, told_share
from circuits.explain.results import VERDICTS, Result, is_told, try_claims, verdict
from circuits.explain.sentences import display_names, sentences
from circuits.explain.story_page import page
from circuits.explain.trials import OtherPrompt, Trials, circuit_of
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.groups import GROUPS, Group, Grouping
from circuits.graph.influence import node_influence
from circuits.graph.nodes import NodeKind
from circuits.heads.edge_split import replaces_heads, with_heads
from circuits.validation.effects import Effects
from replacement import ReplacementModel
from replacement.console import finite
from replacement.language_model.prompts import Prompt
from replacement.notebook import Report
from replacement.number_checks import whole_number

CONTROLS = 99
"""Random groups, and random tokens, that an ablation is compared with."""


def explain_graph(
    model: ReplacementModel,
    graph: CircuitGraph,
    *,
    against: Iterable[Prompt] = (),
    most_groups: int = MOST_GROUPS,
    controls: int = CONTROLS,
    seed: int = 0,
) -> Report:
    """A graph as a story of a few groups and sentences, each tested in the original model.

    >>> circuits.explain_graph(model, graph, against=["the capital of the state containing Oakland is"])    # doctest: +SKIP

    The graph is pruned as `circuits trace` does, its features are grouped (`CircuitGraph.group`, unless the graph carries
    groups), and the claims are the strongest edges among the groups (`circuits.explain.claims`). Each group that is said to
    cause something is ablated, and set to its values in other prompts (`circuits.explain.trials`); whether the groups that it
    is said to raise or lower follow is decided in `circuits.explain.results`. A claim is refuted if any of its tests is.
    Claims that the replacement model itself does not bear out, once attention, norms and features may react, are withheld:
    tested and listed, but told in no sentence.

    Args:
        model: the model that the graph was traced in.
        graph: a full graph; of a pruned one, removed edges are predicted to do nothing.
        against: other prompts whose values groups are set to; without any, groups are ablated only.
        most_groups: groups of the story, 2 to 8.
        controls: random groups, and random tokens, that an ablation is compared with.
        seed: of these.

    Returns:
        What `circuits explain --json` prints; its keys are in the README of `circuits/explain`.

    Raises:
        ValueError: a graph of another model, without features or without any edge between groups; a number outside its range;
            or another prompt that the model cannot read, that is the graph's, or that cannot be aligned with it.
    """
    if not 2 <= whole_number("groups", most_groups, least=1) <= MOST_GROUPS:
        raise ValueError(f"groups: expected 2 to {MOST_GROUPS}, given {most_groups}")
    whole_number("controls", controls, least=1)
    if isinstance(against, str) or not isinstance(against, Iterable):
        raise ValueError(f"against: expected a list of prompts, given {against!r:.60}")
    effects = Effects(model, Grounding.of(model, graph))
    if not graph.nodes.mask(NodeKind.FEATURE).any():
        raise ValueError("expected a graph with features to tell of, given one without any")
    circuit = circuit_of(graph)
    grouping = Grouping.of(circuit) if GROUPS in circuit.metadata else circuit.group()
    if circuit.heads is None and not replaces_heads(model):
        grouping = replace(grouping, graph=with_heads(model, circuit))
    shown = story_groups(grouping, most_groups)
    claims = claims_of(grouping, shown)
    shown = sorted({edge for claim in claims for edge in (claim.edge.source, claim.edge.target)} & {*shown})
    if not claims:
        raise ValueError("expected a graph with edges between its groups, given one without any")
    others = [OtherPrompt(model, prompt, graph) for prompt in against]
    trials = Trials(effects, grouping, controls=controls, seed=seed)
    results = try_claims(trials, claims, others)
    facts = {
        "prompt": graph.metadata["prompt"],
        "is_pruned": "pruning" in graph.metadata,
        "against": [other.text for other in others],
        "controls": controls,
        "seed": seed,
        **_facts(grouping, shown, claims, results),
    }
    title = f"story of {facts['prompt']!r:.80}"
    return Report({name: finite(value) for name, value in facts.items()}, title=title, page=page)


def _facts(
    grouping: Grouping,
    shown: Sequence[int],
    claims: Sequence[Claim],
    results: Sequence[Sequence[Result]],
) -> dict[str, Any]:
    """Groups, claims, sentences and overall figures as plain values."""
    graph, names = grouping.graph, display_names(grouping)
    mass, ids = node_influence(graph) + graph.nodes.output_weight, graph.nodes.ids()
    groups = [
        {
            "name": names[number],
            "kind": grouping.groups[number].kind,
            "members": [ids[node] for node in grouping.groups[number].members],
            "layers": _range(graph.nodes.layer, grouping.groups[number]),
            "positions": _range(graph.nodes.position, grouping.groups[number]),
            "influence": float(mass[list(grouping.groups[number].members)].sum()),
            "f1": grouping.groups[number].f1,
        }
        for number in shown
    ]
    tried = [
        {
            "source": names[claim.edge.source],
            "target": names[claim.edge.target],
            "says": "raises" if claim.sign > 0 else "lowers",
            "unit": "logits" if grouping.groups[claim.edge.target].kind == "outputs" else "share of activation",
            "weight": claim.edge.weight,
            "influence": claim.edge.influence,
            "heads": claim.heads(),
            "verdict": verdict(of_claim),
            "tests": [asdict(result) for result in of_claim],
        }
        for claim, of_claim in zip(claims, results, strict=True)
    ]
    told = [is_told(of_claim) for of_claim in results]
    facts, telling = list(compress(tried, told)), list(compress(claims, told))
    verdicts = [claim["verdict"] for claim in facts]
    return {
        "groups": groups,
        "claims": facts,
        "withheld": [claim for claim, is_one in zip(tried, told, strict=True) if not is_one],
        "sentences": sentences(grouping, telling, facts),
        **{name: verdicts.count(name) for name in VERDICTS},
        "share_held": share_held(facts),
        "share_held_with_withheld": share_held(tried),
        "within_factor_two": {name: share_within(facts, name) for name in ("predicted", "replacement")},
        "told": told_share(grouping, shown, telling),
    }


def share_held(claims: Iterable[Mapping[str, Any]]) -> float | None:
    """Share of the tested ones of some claims that held; None where none was tested."""
    verdicts = Counter(claim["verdict"] for claim in claims)
    tested = verdicts["held"] + verdicts["refuted"]
    return verdicts["held"] / tested if tested else None


def share_within(claims: Iterable[Mapping[str, Any]], prediction: str, factor: float = 2.0) -> float | None:
    """Share of the live tests of some claims whose measured effect is the predicted one up to a factor; None without any.

    Args:
        claims: as in the facts.
        prediction: `predicted` by the graph, or `replacement`: what the replacement model does.
        factor: 2 for half of the prediction to twice of it.
    """
    live = [test for claim in claims for test in claim["tests"] if test["condition"] == "live"]
    ratios = [test["measured"] / test[prediction] if test[prediction] else math.inf for test in live]
    return float(np.mean([1 / factor <= ratio <= factor for ratio in ratios])) if ratios else None


def _range(column: np.ndarray, group: Group) -> list[int]:
    """The smallest and the largest entry of a group's members."""
    entries = column[list(group.members)]
    return [int(entries.min()), int(entries.max())]
