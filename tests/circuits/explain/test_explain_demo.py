"""The example that tells and tests stories: what it reports on is fixed, and its figures are what they say."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from replacement.demo.corpus import HELD_OUT_STATES, state_of


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    return importlib.import_module("explain_demo")


def test_what_is_reported_on(example: Any) -> None:
    probes = example.reported_probes()
    assert {name: len(found) for name, found in probes.items()} == {
        "two-hop geography": 21,
        "agreement": 20,
        "antonyms": 20,
        "question mark": 20,
    }
    prompts = [probe.prompt for probe in probes["two-hop geography"]]
    assert prompts[0] == "the capital of the state containing Dallas is"
    assert len(set(prompts)) == 21
    cities = [prompt.removeprefix("the capital of the state containing ").removesuffix(" is") for prompt in prompts]
    assert not {state_of(city) for city in cities} & set(HELD_OUT_STATES)
    further = example.reported_probes(further=True)
    assert {name: len(found) for name, found in further.items()} == dict.fromkeys(example.FURTHER, 20)
    assert not set(further) & set(probes)


def story(*verdicts: str) -> dict[str, Any]:
    claims = [
        {"says": "raises", "verdict": verdict, "tests": [{"measured": -1.0}, {"measured": value}] if value else []}
        for verdict, value in (
            (verdict, {"held": -2.0, "refuted": 0.5, "untested": 0.0}[verdict]) for verdict in verdicts
        )
    ]
    return {
        "claims": claims,
        "withheld": [],
        **{name: verdicts.count(name) for name in ("held", "refuted", "untested")},
    }


def test_claims_are_counted_by_what_they_are_about_and_by_influence(example: Any) -> None:
    groups = [{"name": "Texas", "kind": "features"}, {"name": "say Austin", "kind": "outputs"}]
    told = (("Texas", "held", 0.3), ("Texas", "refuted", 0.1), ("say Austin", "untested", 0.6))
    claims = [{"target": target, "verdict": verdict, "influence": size} for target, verdict, size in told]
    stories = [{"groups": groups, "claims": claims}]
    assert example.share_by_influence(stories) == pytest.approx(0.75)
    assert dict(example.verdicts_by_target(stories)) == {
        (target["kind"], verdict): 1
        for target, verdict in ((groups[0], "held"), (groups[0], "refuted"), (groups[1], "untested"))
    }


def test_figures(example: Any) -> None:
    stories = [story("held", "held", "refuted"), story("held", "untested")]
    assert example.share_held(stories) == 0.75
    assert example.share_of_signs(stories) == 0.75
    low, high = example.interval(stories)
    assert (low, high) == pytest.approx((2 / 3, 1)), "samples of two stories: twice the one, twice the other, or both"
    assert example.interval(stories[:1]) == pytest.approx((2 / 3, 2 / 3))
