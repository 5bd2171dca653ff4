"""Swaps and ablations against a crosscoder built by hand: two features write the two answers' own directions."""

from __future__ import annotations

import pytest
import torch

import replacement
from replacement import Crosscoder, ReplacementModel, Wiring
from replacement.crosscoder.activation import ReLU
from replacement.demo.corpus import capital_of
from replacement.demo.families import Family
from replacement.demo.family_cases import JUDGE, NO_CONCEPT, Case
from replacement.demo.family_use import Change, FamilyUse, next_token_probabilities
from replacement.demo.feature_families import ChosenFeatures, read_firings

PROMPT = "the capital of the state containing {city} is"
CITIES = {"Dallas": "Texas", "Houston": "Texas", "Cleveland": "Ohio", "Toledo": "Ohio"}
STATES = ("Texas", "Ohio")
N_FEATURES = 3
LOUD = 300.0


@pytest.fixture(scope="module")
def model() -> ReplacementModel:
    """The demo's language model. In its last layer features 0 and 1 write a capital each, feature 2 nothing; 0 and 2 fire."""
    lm = replacement.load("demo").language_model
    crosscoder = Crosscoder(Wiring.per_layer(lm.shape), n_features=N_FEATURES, activation=ReLU())
    with torch.no_grad():
        for weight in crosscoder.state_dict().values():
            weight.zero_()
        crosscoder.b_enc[-1][::2] = 1.0
        for feature, state in enumerate(STATES):
            capital = lm.token_id(capital_of(state))
            crosscoder.W_dec[-1][feature, 0] = LOUD * torch.nn.functional.normalize(direction(lm, capital), dim=0)
    return ReplacementModel(lm, crosscoder)


def direction(lm: replacement.LanguageModel, token: int) -> torch.Tensor:
    """What writes a token's logit above the mean logit, `[D]`."""
    W_U_DV = lm.parts.unembedding().stored_DV
    return W_U_DV[:, token] - W_U_DV.mean(1)


def cases(place: str) -> list[Case]:
    """The four questions; features are read and changed at the end, or at the city."""
    prompts = {PROMPT.format(city=city): state for city, state in CITIES.items()}
    return [
        Case(prompt, prompt.removesuffix(" is") if place == "city" else prompt, state)
        for prompt, state in prompts.items()
    ]


def use(model: ReplacementModel, place: str) -> FamilyUse:
    """Both states' features as if they had been chosen, at twice the activation that they have."""
    first = (model.crosscoder.n_groups - 1) * N_FEATURES
    best = {state: first + number for number, state in enumerate(STATES)}
    chosen = ChosenFeatures(best, {s: (f,) for s, f in best.items()}, {(s, f): 2.0 for s, f in best.items()})
    asked = cases(place)
    family = Family(
        name="", behaviour="", about="", cases=lambda probes: asked, answers=lambda case, state: (capital_of(state),)
    )
    return FamilyUse(model, family, chosen, family.of(JUDGE), read_firings(model, asked))


def test_swapped_features_at_the_last_word_give_the_other_answer(model: ReplacementModel) -> None:
    swaps = use(model, "end").swaps()
    assert 1 <= swaps["pairs"] <= len(CITIES)
    assert swaps["best_feature"] == swaps["good_features"] == 1.0


def test_in_the_last_layer_nothing_at_the_city_can_reach_the_answer(model: ReplacementModel) -> None:
    swaps, ablations = use(model, "city").swaps(), use(model, "city").ablations()
    assert swaps["best_feature"] == 0.0
    assert ablations["probability_family"] == pytest.approx(ablations["probability_none"], abs=1e-6)


def test_ablations_remove_the_answer_and_the_control_does_not(model: ReplacementModel) -> None:
    """Texas' feature is active and can be ablated; Ohio's is not. The control is the silent feature 2."""
    facts = use(model, "end").ablations()
    assert facts["probes"] == len(CITIES)
    assert facts["features"] == facts["right_family"] == 0.5
    assert facts["right_none"] == facts["right_control"] == 1.0
    assert facts["probability_family"] < 0.51
    assert facts["log_odds_family"] < facts["log_odds_none"] - 5
    assert facts["log_odds_control"] == pytest.approx(facts["log_odds_none"], abs=1e-2)
    assert facts["probability_control"] == pytest.approx(facts["probability_none"], abs=1e-6)


def test_without_changes_the_model_answers_as_it_is(model: ReplacementModel) -> None:
    asked = cases("end")
    p_BV = next_token_probabilities(model, [Change(case, {}) for case in asked])
    for case, p_V in zip(asked, p_BV, strict=True):
        expected = model.language_model(model.language_model.tokenize(case.prompt))[-1].softmax(-1)
        torch.testing.assert_close(p_V, expected.double(), rtol=0, atol=1e-5)


def test_a_case_without_concept_is_swapped_but_not_ablated(model: ReplacementModel) -> None:
    asked = [case if case.concept == "Texas" else case._replace(concept=NO_CONCEPT) for case in cases("end")]
    family = Family(
        name="",
        behaviour="",
        about="",
        cases=lambda probes: asked,
        answers=lambda case, concept: (capital_of(concept or "Ohio"),),
    )
    texas = (model.crosscoder.n_groups - 1) * N_FEATURES
    chosen = ChosenFeatures({"Texas": texas}, {"Texas": (texas,)}, {("Texas", texas): 2.0})
    measured = FamilyUse(model, family, chosen, family.of(JUDGE), read_firings(model, asked))
    assert measured.ablations()["probes"] == 2
    assert measured.swaps()["pairs"] >= 1
