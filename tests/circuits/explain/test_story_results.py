"""Intervals and outcomes against brute force; what a story says, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from circuits.explain.claims import claims_of, readings, story_groups, told_share
from circuits.explain.results import Result, excess_interval, is_told, median_interval, outcome, verdict
from circuits.explain.sentences import display_names, sentences
from circuits.explain.story import share_within
from circuits.graph.groups import Grouping
from circuits.graph.nodes import NodeKind
from circuits.validation.prediction import predicted_changes


@pytest.mark.parametrize("n", [1, 4, 5, 8, 9, 99])
def test_order_statistics_hold_the_median_often_enough_and_are_no_wider_than_needed(n: int) -> None:
    """The interval from the k-th smallest to the k-th largest misses the median if fewer than k values lie on one side."""
    values = np.random.default_rng(n).normal(size=n)
    below = [sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n + 1)]
    fitting = [k for k in range(1, n + 1) if 2 * below[k] <= 0.1]
    expected = (np.sort(values)[fitting[-1] - 1], np.sort(values)[n - fitting[-1]]) if fitting else None
    assert median_interval(values) == expected
    assert (n < 5) == (expected is None)


def test_the_median_is_covered() -> None:
    draws = np.random.default_rng(0).exponential(size=(4000, 15))
    intervals = np.array([median_interval(row) for row in draws])
    covered = np.mean((intervals[:, 0] <= math.log(2)) & (math.log(2) <= intervals[:, 1]))
    assert 0.9 <= covered <= 0.98


def test_an_effect_like_those_of_the_controls_is_found_as_rarely_as_said() -> None:
    random = np.random.default_rng(0)
    found = [
        outcome(-1, effect, excess_interval(effect, controls)) == "held"
        for effect, controls in zip(random.normal(-1, 1, 2000), random.normal(-1, 1, (2000, 99)), strict=True)
    ]
    assert np.mean(found) == pytest.approx(0.05, abs=0.02)
    assert excess_interval(-5.0, np.linspace(-1, 1, 101)) == pytest.approx((-5.9, -4.1))


def test_outcomes() -> None:
    cases: dict[Any, str] = {
        (-1, -2.0, (-3.0, -1.0)): "held",
        (-1, -2.0, None): "held",
        (-1, -2.0, (-3.0, 0.5)): "within noise",
        (-1, 2.0, (1.0, 3.0)): "wrong sign",
        (1, -2.0, None): "wrong sign",
        (1, 0.0, None): "within noise",
        (1, 2.0, (-0.5, -0.1)): "within noise",
    }
    assert {case: outcome(*case) for case in cases} == cases
    results = [result(outcome=text) for text in ("held", "within noise")]
    assert [verdict(results), verdict(results[:1]), verdict([])] == ["refuted", "held", "untested"]


def result(*, outcome: str = "held", is_borne_out: bool = True) -> Result:
    return Result("ablated", "live", -1.0, -1.0, is_borne_out, -1.0, None, 1, outcome)


def test_a_claim_is_told_if_the_replacement_model_bears_out_every_trial_whatever_the_original_model_does() -> None:
    assert is_told([result(), result(outcome="wrong sign")])
    assert not is_told([result(), result(is_borne_out=False)])
    assert is_told([])


def test_sizes_are_right_up_to_a_factor_of_two_in_live_tests_alone() -> None:
    def claim(*live: tuple[float, float]) -> dict[str, Any]:
        held = {"condition": "constrained", "predicted": 1.0, "measured": 100.0}
        return {"tests": [held, *({"condition": "live", "predicted": p, "measured": m} for p, m in live)]}

    assert share_within([claim()], "predicted") is None
    assert share_within([claim((-1.0, -0.5), (-1.0, -2.0)), claim((2.0, 4.1), (2.0, -2.0))], "predicted") == 0.5
    assert share_within([claim((0.0, 1.0))], "predicted") == 0.0


def test_with_a_confidence_of_one_no_control_may_do_as_much() -> None:
    controls = np.linspace(-1, 1, 101)
    assert excess_interval(-5.0, controls, 1.0) == (-6.0, -4.0)
    assert outcome(-1, -0.999, excess_interval(-0.999, controls, 1.0)) == "within noise"
    assert outcome(-1, -1.001, excess_interval(-1.001, controls, 1.0)) == "held"


@pytest.fixture
def told(build_graph: Any) -> Grouping:
    """Token a feeds features x and y (one group) and z; these feed the answer, z against it; an error feeds z."""
    feature = {"kind": NodeKind.FEATURE, "position": 0, "activation": 2.0, "expanded": True}
    rows = [
        {"kind": NodeKind.TOKEN, "index": 5, "position": 0, "label": "a"},
        {"kind": NodeKind.ERROR, "layer": 0, "position": 0},
        {**feature, "layer": 0, "index": 1},
        {**feature, "layer": 0, "index": 2, "activation": 1.0},
        {**feature, "layer": 1, "index": 3},
        {"kind": NodeKind.LOGIT, "layer": 3, "index": 7, "label": "b", "output_weight": 1.0, "expanded": True},
    ]
    edges = [(2, 0, 2.0), (3, 0, 1.0), (4, 0, 1.0), (4, 1, 1.0), (5, 2, 3.0), (5, 3, 2.0), (5, 4, -3.0)]
    graph = build_graph(rows, edges, targets=[{"token": "b"}])
    return Grouping.build(graph, ["a", "errors", "xy", "z", "b"], [[0], [1], [2, 3], [4], [5]], [None] * 5)


def said(grouping: Grouping, claims: Any, heads: list[str]) -> list[dict[str, Any]]:
    names = display_names(grouping)
    return [
        {"source": names[c.edge.source], "target": names[c.edge.target], "heads": heads, "verdict": "held"}
        for c in claims
    ]


def test_what_a_story_says(told: Grouping) -> None:
    """Influence: xy -> b and a -> xy 5/8, z -> b 3/8, a -> z and the error -> z half of that."""
    shown = story_groups(told, 8)
    assert [told.groups[number].name for number in shown] == ["a", "xy", "z", "b"]
    assert [told.groups[number].name for number in story_groups(told, 2)] == ["a", "b"]
    claims = claims_of(told, shown)
    assert display_names(told) == ["a", "unexplained error", "xy", "z", "say b"]
    assert {(c.edge.source, c.sign, c.edge.target) for c in claims} == {(0, 1, 2), (2, 1, 4), (3, -1, 4)}
    assert told_share(told, shown, claims) == pytest.approx((5 + 5 + 3) / 16)
    texts = [sentence["text"] for sentence in sentences(told, claims, said(told, claims, []))]
    assert texts == ["a raises xy", "xy raises say b", "z lowers say b"]


def test_many_outputs_leave_room_for_their_causes(build_graph: Any) -> None:
    token = {"kind": NodeKind.TOKEN, "index": 5, "position": 0, "label": "a"}
    answer = {"kind": NodeKind.LOGIT, "layer": 3, "output_weight": 0.1, "expanded": True}
    graph = build_graph([token, *({**answer, "index": i} for i in range(10))], [(i, 0, 1.0) for i in range(1, 11)])
    grouping = Grouping.build(graph, [str(n) for n in range(11)], [[n] for n in range(11)], [None] * 11)
    assert story_groups(grouping, 8) == [0, 1, 2, 3, 4]
    assert story_groups(grouping, 2) == [0, 1]


def test_heads_are_named_and_errors_stand_apart(told: Grouping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuits.explain.claims.TOLD", 1.0)
    claims = claims_of(told, range(5))
    found = sentences(told, claims, said(told, claims, ["L1H3", "L2H0"]))
    assert [sentence["text"] for sentence in found] == [
        "a raises xy (through L1H3 and L2H0)",
        "a raises z (through L1H3 and L2H0)",
        "unexplained error raises z (through L1H3 and L2H0)",
        "xy raises say b (through L1H3 and L2H0)",
        "z lowers say b (through L1H3 and L2H0)",
    ]


def test_causes_of_one_group_make_one_sentence(told: Grouping) -> None:
    nodes = told.graph.nodes
    apart = Grouping.build(told.graph, ["a", "e", "x", "y", "z", "b"], [[n] for n in range(len(nodes))], [None] * 6)
    claims = claims_of(apart, story_groups(apart, 8))
    texts = [sentence["text"] for sentence in sentences(apart, claims, said(apart, claims, []))]
    assert "x and y raise say b" in texts


def test_ablating_a_group_changes_the_reading_of_another_by_minus_the_weight_of_their_edge(told: Grouping) -> None:
    """Up to the clean reading, by which it is divided: sums of influence x activation / inflow, for the answer without the
    activation."""
    graph = told.graph
    reading = readings(graph, told.groups)  # type: ignore[arg-type]
    clean = {2: 3 / 8 / 2 * 2.0 + 2 / 8 / 1 * 1.0, 3: 3 / 8 / 2 * 2.0, 4: 1 / 8}
    edges = told.edges()
    assert len(edges) == 5
    for edge in edges:
        members = dict.fromkeys(told.groups[edge.source].members, -1.0)
        change = predicted_changes(graph, [members], total=False) @ reading
        assert change[0, edge.target] * clean[edge.target] == pytest.approx(-edge.weight)
    own = predicted_changes(graph, [{2: -1.0, 3: -1.0}]) @ reading
    assert own[0, 2] == pytest.approx(-1), "an ablated group loses all of its activation"
