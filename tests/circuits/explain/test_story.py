"""Stories in models: exact where everything is frozen, true claims hold, planted false ones are refuted, mistakes are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from html_reader import HOSTILE
from rich.console import Console

import circuits
import replacement
from circuits.attribution.grounding import Grounding
from circuits.cli import main
from circuits.explain.claims import Claim, claims_of, story_groups
from circuits.explain.counterfactuals import demo_counterfactuals
from circuits.explain.results import is_told, try_claims
from circuits.explain.story_html import html_page
from circuits.explain.trials import OtherPrompt, Trials
from circuits.graph.groups import Grouping
from circuits.graph.nodes import NodeKind
from circuits.validation.effects import Effects
from circuits.validation.prediction import predicted_changes
from replacement import ReLU, ReplacementModel

PROMPT = "the capital of the state containing Houston is"
OTHER = "the capital of the state containing Oakland is"


@pytest.fixture(scope="module")
def demo() -> ReplacementModel:
    return replacement.load("demo")


@pytest.fixture(scope="module")
def graph(demo: ReplacementModel) -> circuits.CircuitGraph:
    return circuits.trace(demo, PROMPT)


@pytest.fixture(scope="module")
def facts(demo: ReplacementModel, graph: circuits.CircuitGraph) -> Any:
    return circuits.explain_graph(demo, graph, against=[OTHER], controls=19)


def trials_of(model: ReplacementModel, graph: Any, grouping: Any = None, *, controls: int = 9) -> Trials:
    effects = Effects(model, Grounding.of(model, graph))
    return Trials(effects, grouping or graph.group(), controls=controls, seed=0)


def tiny_graph(lm: Any, **options: Any) -> tuple[ReplacementModel, circuits.CircuitGraph]:
    model = ReplacementModel(lm, tiny.crosscoder_for(lm, **options))
    return model, circuits.trace(model, tiny.random_tokens(), coverage=1.0)


def test_effects_of_groups_are_predicted_exactly_where_everything_is_frozen(language_model: Any) -> None:
    """ReLU features, held outputs, frozen patterns and norms: the sum of the edges is what ablating a group does."""
    model, graph = tiny_graph(language_model("gpt2", torch.float64), activation=ReLU())
    nodes = graph.nodes
    place = np.where(nodes.mask(NodeKind.FEATURE), nodes.layer * 3 + nodes.position % 3, 9 + np.arange(len(nodes)))
    parts = [np.flatnonzero(place == number).tolist() for number in np.unique(place)]
    grouping = Grouping.build(graph, [str(number) for number in range(len(parts))], parts, [None] * len(parts))
    trials = trials_of(model, graph, grouping)
    outputs = [number for number, group in enumerate(grouping.groups) if group.kind == "outputs"]
    for number in range(6):
        trial = trials.ablated(number)
        assert trial is not None
        change_BN = predicted_changes(trials.effects.grounding.graph, trial.changes, total=False, clipped=True)
        predicted = (change_BN @ trials.reading_NG)[0]
        run = trials.effects.measure_edits(trial.edits, "constrained", "frozen", norms="frozen")
        measured = (run.change_BN @ trials.reading_NG)[0]
        later = [*range(3 * (number // 3 + 1), 9), *outputs]
        assert np.abs(predicted[later]).max() > 0.01
        np.testing.assert_allclose(measured[later], predicted[later], atol=2e-5)
        assert measured[number] == pytest.approx(-1)


def test_true_claims_hold_and_planted_false_ones_are_refuted(demo: ReplacementModel, graph: Any) -> None:
    circuit = graph.prune(most_nodes=60, most_edges=300)
    grouping = circuit.group()
    of_output = [c for c in claims_of(grouping, story_groups(grouping, 8)) if c.edge.target == len(grouping) - 1]
    strongest = max(of_output, key=lambda claim: claim.edge.influence)
    turned = dataclasses.replace(strongest.edge, weight=-strongest.edge.weight)
    of_first_token = next(n for n, g in enumerate(grouping.groups) if circuit.nodes.position[g.members[0]] == 1)
    unrelated = dataclasses.replace(turned, source=of_first_token, target=strongest.edge.source, weight=1.0)
    trials = trials_of(demo, graph, grouping, controls=39)
    planted = [strongest, Claim(turned), Claim(unrelated)]
    true, wrong, nothing = try_claims(trials, planted, [OtherPrompt(demo, OTHER, graph)])
    assert [(result.trial, result.condition, result.outcome) for result in true] == [
        (trial, condition, "held") for trial in ("ablated", "set") for condition in ("constrained", "live")
    ]
    assert len(wrong) == 4
    assert {result.outcome for result in wrong} == {"wrong sign"}
    assert "held" not in {result.outcome for result in nothing}
    assert [is_told(results) for results in (true, wrong, nothing)] == [True, False, False]


def test_a_group_set_to_another_prompt_has_its_values(demo: ReplacementModel, graph: Any) -> None:
    """Members get the other prompt's activations; the other state's features come in, and are not active here."""
    trials, other = trials_of(demo, graph, graph.prune().group()), OtherPrompt(demo, OTHER, graph)
    here, there = demo.localize(PROMPT).features, demo.localize(OTHER).features

    def activation(of: Any, i: Any) -> float:
        return float(of.activation[(of.group == i.layer) & (of.row == i.position) & (of.index == i.index)].sum())

    switched_on = 0
    for number, group in enumerate(trials.groups):
        trial = trials.set_to(number, [other])
        if group.kind in ("outputs", "errors"):
            assert trial is None
            continue
        assert trial is not None
        (edit,) = trial.edits
        if group.kind == "tokens":
            assert edit.tokens == ({7: other.tokens[7]} if graph.nodes.position[group.members[0]] == 7 else {})
        for intervention in edit.interventions:
            assert intervention.activation == pytest.approx(activation(there, intervention), rel=1e-5)
        for intervention in edit.interventions[len(group.members) :]:
            switched_on += 1
            assert activation(here, intervention) == 0
            assert activation(there, intervention) > 0
    assert switched_on


def test_controls_are_as_large_and_elsewhere(demo: ReplacementModel, graph: Any) -> None:
    trials, nodes = trials_of(demo, graph), graph.nodes
    number = next(n for n, group in enumerate(trials.groups) if group.kind == "features" and len(group.members) > 1)
    trial = trials.ablated(number)
    assert trial is not None
    assert len(trial.controls) == 9
    crosscoder, features = demo.crosscoder, demo.localize(PROMPT).features
    active = set(zip(features.group.tolist(), features.index.tolist(), features.row.tolist(), strict=True))

    def norm(layer: int, index: int) -> float:
        return float(
            torch.cat([crosscoder.decoder(layer, site)[index] for site in crosscoder.wiring.writes[layer]]).norm()
        )

    for control in trial.controls:
        assert len({(i.layer, i.index, i.position) for i in control.interventions}) == len(control.interventions)
        for drawn, row in zip(control.interventions, trials.groups[number].members, strict=True):
            assert (drawn.layer, drawn.position) == (nodes.layer[row], nodes.position[row])
            assert (drawn.layer, drawn.index, drawn.position) not in active
            assert drawn.add is not None
            expected = -float(nodes.activation[row]) * norm(int(nodes.layer[row]), int(nodes.index[row]))
            assert drawn.add * norm(drawn.layer, drawn.index) == pytest.approx(expected, rel=1e-4)


def test_attention_features_are_changed_like_others(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    attention = tiny.crosscoder_for(lm, wiring=replacement.Wiring.attention(lm))
    model = ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=attention)
    graph = circuits.trace(model, tiny.random_tokens(), coverage=1.0)
    rows = [[row] for row in range(len(graph.nodes))]
    grouping = Grouping.build(graph, graph.nodes.ids(), rows, [None] * len(rows))
    trials, other = trials_of(model, graph, grouping), OtherPrompt(model, tiny.random_tokens(seed=3), graph)
    row = int(np.flatnonzero(graph.nodes.of_attention & graph.nodes.mask(NodeKind.FEATURE))[0])
    for trial in (trials.ablated(row), trials.set_to(row, [other])):
        assert trial is not None
        assert {i.part for edit in (*trial.edits, *trial.controls) for i in edit.interventions} == {"attention"}
        assert np.abs(trials.measured(trial, "original")).max() > 0


def test_the_facts(facts: Any, graph: Any) -> None:
    assert facts["prompt"] == PROMPT
    assert facts["against"] == [OTHER]
    assert not facts["is_pruned"]
    assert len(facts["groups"]) <= 8
    assert [group["name"] for group in facts["groups"] if group["kind"] == "outputs"] == ["say Austin"]
    assert facts["held"] + facts["refuted"] + facts["untested"] == len(facts["claims"])
    assert facts["share_held"] == facts["held"] / (facts["held"] + facts["refuted"])
    assert 0.5 < facts["told"] <= 1
    ids = set(graph.nodes.ids())
    assert all(set(group["members"]) <= ids for group in facts["groups"])
    assert sorted(n for sentence in facts["sentences"] for n in sentence["claims"]) == list(range(len(facts["claims"])))
    assert any(claim["heads"] for claim in facts["claims"])
    json.dumps(facts, allow_nan=False)
    assert "Several answers compete" not in html_page(facts), "there is one answer"


def test_claims_that_the_replacement_model_does_not_bear_out_are_tested_but_not_told(
    demo: ReplacementModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Agreement: several groups write the answer, and each could be missed."""
    graph = circuits.trace(demo, "the tables beside the wagon")
    facts = circuits.explain_graph(demo, graph, controls=9)
    assert facts["claims"]
    assert facts["withheld"]
    every = [claim["verdict"] for claim in (*facts["claims"], *facts["withheld"])]
    expected = every.count("held") / (every.count("held") + every.count("refuted"))
    assert facts["share_held_with_withheld"] == pytest.approx(expected)
    said = {number for sentence in facts["sentences"] for number in sentence["claims"]}
    assert said == set(range(len(facts["claims"])))
    told = [test for claim in facts["claims"] for test in claim["tests"]]
    assert all(test["is_borne_out"] for test in told)
    assert {test["outcome"] for test in told if test["condition"] == "constrained"} == {"held"}, (
        "the same in both models"
    )
    assert not any(all(test["is_borne_out"] for test in claim["tests"]) for claim in facts["withheld"])
    Console(width=100).print(facts._page(facts))
    text = capsys.readouterr().out
    assert "Not told: the replacement model does not bear them out" in text
    assert "Several answers compete here" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "Not told: the replacement model does not bear them out" in html_page(facts)


def test_effects_in_the_replacement_model_are_those_of_interventions_in_it(demo: ReplacementModel, graph: Any) -> None:
    grouping = graph.prune(most_nodes=60, most_edges=300).group()
    answer, austin = len(grouping) - 1, int(demo.language_model.tokens(" Austin")[-1])
    kinds = [group.kind for group in grouping.groups]
    claims = [
        claim
        for claim in claims_of(grouping, story_groups(grouping, 8))
        if claim.edge.target == answer and kinds[claim.edge.source] == "features"
    ]
    trials = trials_of(demo, graph, grouping, controls=3)

    def logit(interventions: Any) -> float:
        logits_V = demo.intervene(PROMPT, interventions).logits[-1]
        return float(logits_V[austin] - logits_V.mean())

    assert claims
    for claim, results in zip(claims, try_claims(trials, claims, []), strict=True):
        (edit,) = trials.ablated(claim.edge.source).edits  # type: ignore[union-attr]
        live = next(result for result in results if result.condition == "live")
        assert live.replacement == pytest.approx(logit(edit.interventions) - logit(()), abs=1e-3)


def test_the_same_seed_gives_the_same_facts(demo: ReplacementModel, graph: Any, facts: Any) -> None:
    again = circuits.explain_graph(demo, graph, against=[OTHER], controls=19)
    assert json.dumps(again) == json.dumps(facts)
    other = circuits.explain_graph(demo, graph, against=[OTHER], controls=19, seed=1)
    assert json.dumps(other) != json.dumps(facts)
    assert [sentence["text"] for sentence in other["sentences"]] == [
        sentence["text"] for sentence in facts["sentences"]
    ]


def test_the_page_fits_a_narrow_terminal_and_marks_what_is_refuted(
    facts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    refuted = [{**sentence, "verdict": "refuted"} for sentence in facts["sentences"]]
    absent = [
        {**claim, "tests": [{**test, "outcome": "within noise"} for test in claim["tests"]]}
        for claim in facts["claims"]
    ]
    for shown in (facts, {**facts, "sentences": refuted, "claims": absent}):
        Console(width=100).print(facts._page(shown))
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 100
        for word in ("tested claims held", "say Austin", "constrained", "live", "ablated", "set", "90 %"):
            assert word in text
    assert text.count("REFUTED") == len(refuted)
    n_trials = sum(len(claim["tests"]) // 2 for claim in absent)
    assert " ".join(text.split()).count("effect within noise (constrained), within noise (live)") == n_trials


def test_hostile_labels_break_no_page(demo: ReplacementModel, graph: Any) -> None:
    labels = tuple(f"{HOSTILE}{row}" for row in range(len(graph.nodes)))
    nodes = dataclasses.replace(graph.nodes, label=labels)
    hostile = dataclasses.replace(graph, nodes=nodes, metadata={**graph.metadata, "prompt": HOSTILE})
    facts = circuits.explain_graph(demo, hostile, controls=3)
    page = html_page(facts)
    assert "<img" not in page
    assert "\u202e" not in page
    assert page.count("</table>") == page.count("<table>")
    assert "&lt;img src=x" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<img" not in facts._repr_html_()


def test_groups_that_a_graph_carries_are_told(demo: ReplacementModel, graph: Any) -> None:
    grouping = graph.prune().group()
    groups = tuple(dataclasses.replace(group, name=f"my {n}") for n, group in enumerate(grouping.groups))
    carrying = graph.prune().with_groups(dataclasses.replace(grouping, groups=groups))
    facts = circuits.explain_graph(demo, carrying, controls=3)
    assert facts["is_pruned"]
    assert all("my " in group["name"] for group in facts["groups"])
    assert facts["against"] == []
    assert {result["trial"] for claim in facts["claims"] for result in claim["tests"]} == {"ablated"}


def test_counterfactuals_of_the_demo(demo: ReplacementModel, graph: Any) -> None:
    found = demo_counterfactuals(demo.language_model, graph)
    assert len(set(found)) == 8
    assert all(prompt.startswith("the capital of the state containing ") and prompt != PROMPT for prompt in found)
    assert not {"Dallas", "Amarillo"} & {prompt.split()[-2] for prompt in found}, "of the same answer"


def test_counterfactuals_where_no_target_is_a_token_are_those_of_the_likeliest_answer(
    demo: ReplacementModel, graph: Any
) -> None:
    row = graph.features()[0]
    for target in ("Austin - Boston", f"feature:{row.layer}/{row.index}@{row.position}"):
        asked = circuits.trace(demo, PROMPT, targets=target)
        assert demo_counterfactuals(demo.language_model, asked) == demo_counterfactuals(demo.language_model, graph)


def test_mistakes(demo: ReplacementModel, graph: Any, language_model: Any) -> None:
    lm = language_model("gpt2")
    with pytest.raises(ValueError, match="the graph was traced in demo, whose weights are not those of"):
        circuits.explain_graph(ReplacementModel(lm, tiny.crosscoder_for(lm)), graph)
    for groups in (1, 9):
        with pytest.raises(ValueError, match=f"groups: expected 2 to 8, given {groups}"):
            circuits.explain_graph(demo, graph, most_groups=groups)
    with pytest.raises(ValueError, match="controls"):
        circuits.explain_graph(demo, graph, controls=0)
    with pytest.raises(ValueError, match="against: expected a list of prompts, given 'the capital'"):
        circuits.explain_graph(demo, graph, against="the capital")
    with pytest.raises(ValueError, match="against: expected another prompt than the graph's, given 'the capital of"):
        circuits.explain_graph(demo, graph, against=[PROMPT])
    every_edge, no_edge = np.ones(len(graph.edges), dtype=bool), np.zeros(len(graph.edges), dtype=bool)
    with pytest.raises(ValueError, match="expected a graph with features to tell of, given one without any"):
        circuits.explain_graph(demo, graph.select(~graph.nodes.mask(NodeKind.FEATURE), every_edge))
    with pytest.raises(ValueError, match="expected a graph with edges between its groups, given one without any"):
        circuits.explain_graph(demo, graph.select(np.ones(len(graph.nodes), dtype=bool), no_edge))


def test_a_graph_of_a_feature_is_told_up_to_that_feature(demo: ReplacementModel, graph: Any) -> None:
    row = graph.features()[0]
    of_feature = circuits.trace(demo, PROMPT, targets=f"feature:{row.layer}/{row.index}@{row.position}")
    facts = circuits.explain_graph(demo, of_feature, controls=19)
    assert {group["kind"] for group in facts["groups"]} == {"tokens", "features"}
    assert {claim["unit"] for claim in facts["claims"]} == {"share of activation"}
    assert facts["held"] > 0


def test_activations_that_a_graph_does_not_explain_are_refused(language_model: Any) -> None:
    model, graph = tiny_graph(language_model("gpt2"), activation=ReLU(affine=True))
    with pytest.raises(ValueError, match="cannot predict activations that are scaled and shifted"):
        circuits.explain_graph(model, graph)


def test_a_prompt_that_cannot_be_aligned(language_model: Any) -> None:
    model, graph = tiny_graph(language_model("gpt2", torch.float64))
    with pytest.raises(ValueError, match=r"against '.*': expected prompts that can be aligned"):
        circuits.explain_graph(model, graph, against=[torch.tensor([90, 91, 92])], controls=3)


def test_the_command(graph: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, html = graph.save(tmp_path / "graph.safetensors"), tmp_path / "page.html"
    options = ["--against", OTHER, "--controls", "3"]
    assert main(["explain", str(file), *options, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["against"] == [OTHER]
    readme = Path(circuits.__file__).with_name("explain").joinpath("README.md").read_text(encoding="utf-8")
    claim = facts["claims"][0]
    for key in (*facts, *facts["groups"][0], *claim, *claim["tests"][0], *facts["sentences"][0]):
        assert f"`{key}`" in readme or f"`{key}[]`" in readme, f"{key} is not documented"
    assert main(["explain", str(file), *options, "--html", str(html)]) == 0
    assert capsys.readouterr().out.strip() == str(html)
    assert "say Austin" in html.read_text(encoding="utf-8")
    for wrong, message in (
        (["--groups", "9"], "groups: expected 2 to 8, given 9"),
        (["--against", PROMPT], "against: expected another prompt than the graph's"),
        (["--html", "x.html", "--json"], "html: expected --html or --json, given both"),
        (["--controls", "0"], "controls"),
    ):
        assert main(["explain", str(file), *wrong]) == 2
        assert message in capsys.readouterr().err
