"""Feature families: what is chosen and judged on what, and F1 of features against hand-built firings."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replacement.demo.accuracy import token_rows
from replacement.demo.corpus import HELD_OUT_CITIES, HELD_OUT_STATES, behaviours
from replacement.demo.families import FAMILIES, Family
from replacement.demo.family_cases import CHOOSE, JUDGE, NO_CONCEPT, Case
from replacement.demo.feature_families import Firings, choose_features, judge_features, score_features
from replacement.demo.tokenizer import build_tokenizer

NAMES = [family.name for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_no_beginning_is_used_for_choosing_and_for_judging(family: Family) -> None:
    choosing, judging = ({case.beginning for case in family.of(probes)} for probes in (CHOOSE, JUDGE))
    assert choosing
    assert judging
    assert not choosing & judging


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_cases_are_beginnings_with_answers_of_the_vocabulary(family: Family) -> None:
    for probes in (CHOOSE, JUDGE):
        cases = family.of(probes)
        assert len(set(cases)) == len(cases)
        for case in cases:
            assert case.prompt.startswith(case.beginning)
            assert family.answers(case, case.concept)
        assert {case.concept for case in cases if case.asks} - {NO_CONCEPT}


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_place_is_the_end_of_a_token(family: Family) -> None:
    tokenizer = build_tokenizer()
    cases = family.of(JUDGE)
    prompts, beginnings = (token_rows(tokenizer, texts) for texts in zip(*(case[:2] for case in cases), strict=True))
    for prompt, beginning in zip(prompts, beginnings, strict=True):
        assert prompt[: len(beginning)] == beginning


def test_every_behaviour_has_a_family() -> None:
    assert {family.behaviour for family in FAMILIES} == {
        behaviour.name for behaviour in behaviours() if behaviour.name != "two-hop, held-out states"
    }


def test_cases_of_a_seed_are_always_the_same() -> None:
    for family in FAMILIES:
        assert family.of(JUDGE) == family.of(JUDGE)


def test_answers_agree_with_the_probes_of_the_corpus() -> None:
    """Where a judging prompt is also a probe of the behaviour, both say what is right."""
    answers = {probe.prompt: set(probe.answers) for behaviour in behaviours() for probe in behaviour.probes}
    shared = 0
    for family in FAMILIES:
        if family.name == "last digit of the sum":  # any number that ends in it will do
            continue
        for case in family.of(JUDGE):
            if case.asks and case.prompt in answers:
                shared += 1
                assert set(family.answers(case, case.concept)) == answers[case.prompt]
    assert shared > 500


def test_swaps_of_states_ask_about_held_out_cities_of_known_states() -> None:
    cases = [case for case in FAMILIES[0].of(JUDGE) if case.asks]
    assert len(cases) == 2 * 45
    assert not {case.concept for case in cases} & set(HELD_OUT_STATES)
    assert all(case.beginning.endswith(HELD_OUT_CITIES) for case in cases)


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match="probes: expected 'choose' or 'judge', given 'train'"):
        FAMILIES[0].of("train")


class Detectors(NamedTuple):
    """Cases of three concepts and none, and what four features do on them."""

    cases: list[Case]
    acts_BF: torch.Tensor

    def firings(self) -> Firings:
        case_S, feature_S = self.acts_BF.nonzero(as_tuple=True)
        return Firings(case_S, feature_S, self.acts_BF[case_S, feature_S], *self.acts_BF.shape, 1)


def cases_of(concepts: str) -> list[Case]:
    """One case per letter; a space is a case of no concept."""
    return [Case(f"{number}", f"{number}", letter.strip()) for number, letter in enumerate(concepts)]


def test_f1_and_activation_of_hand_built_firings() -> None:
    acts_BF = torch.tensor(
        [
            [2.0, 1.0, 0.0],  # a
            [4.0, 1.0, 0.0],  # a
            [0.0, 1.0, 0.0],  # b
            [1.0, 1.0, 3.0],  # none
        ]
    )
    built = Detectors(cases_of("aab "), acts_BF)
    scores = score_features(built.firings(), built.cases)
    assert scores.concepts == ("a", "b")
    torch.testing.assert_close(scores.f1_CF, torch.tensor([[4 / 5, 4 / 6, 0.0], [0.0, 2 / 5, 0.0]]))
    torch.testing.assert_close(scores.activation_CF, torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))


@given(concepts=st.text("abc ", min_size=2, max_size=12).filter(str.strip), seed=st.integers(0, 2**32 - 1))
def test_f1_equals_its_definition(concepts: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    acts_BF = torch.rand(len(concepts), 5, generator=generator)
    built = Detectors(cases_of(concepts), acts_BF * (acts_BF > 0.6))
    scores = score_features(built.firings(), built.cases)
    for concept, f1_F in zip(scores.concepts, scores.f1_CF.tolist(), strict=True):
        is_concept = torch.tensor([letter == concept for letter in concepts])
        for feature, f1 in enumerate(f1_F):
            fires = built.acts_BF[:, feature] > 0
            both = int((fires & is_concept).sum())
            assert f1 == pytest.approx(2 * both / int(fires.sum() + is_concept.sum()))


def test_features_are_chosen_on_some_cases_and_judged_on_others() -> None:
    choosing = Detectors(
        cases_of("aabb"), torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    )
    chosen = choose_features(choosing.firings(), choosing.cases)
    assert chosen.best == {"a": 0, "b": 1}
    assert chosen.good == {"a": (0, 2), "b": (1,)}  # all of F1 >= 0.9, and the best one whatever its F1
    assert chosen.activation == {("a", 0): 2.0, ("a", 2): 1.0, ("b", 1): 5.0}

    judging = Detectors(cases_of("abc"), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    f1 = judge_features(chosen, judging.firings(), judging.cases)
    assert f1 == pytest.approx({"a": 1.0, "b": 2 / 3})  # no feature was chosen for c


def test_of_equally_good_features_the_one_of_the_earliest_layer_is_chosen() -> None:
    """Layers of two features: 0 and 1, 2 and 3. Twenty cases of a, ten of b."""
    acts_BF = torch.zeros(30, 4)
    acts_BF[:19, 1] = 1.0  # misses a case of a: F1 38 / 39
    acts_BF[:20, 2] = 1.0  # none
    acts_BF[20:27, 0] = 1.0  # misses three cases of b: F1 14 / 17, too far from the echo's
    acts_BF[20:30, 3] = 1.0
    cases = cases_of("a" * 20 + "b" * 10)
    case_S, feature_S = acts_BF.nonzero(as_tuple=True)
    firings = Firings(case_S, feature_S, acts_BF[case_S, feature_S], 30, 2, 2)
    assert choose_features(firings, cases).best == {"a": 1, "b": 3}
