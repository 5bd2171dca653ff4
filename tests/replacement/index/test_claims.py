"""Claims: what they say and refuse, and many matched at once as each alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replacement.index.claims import CONDITIONS, SHORT, Claim, Condition, printable
from replacement.index.contexts import Contexts, TokenTexts
from replacement.index.scoring import DetectorCounts, Matcher, Scores
from replacement.token_texts import CLASSES

TEXTS = ["<bos>", " Dal", "las", " Houston", " El", " Paso", " the", " is", ".", " 17", "7", " running", " x"]
VOCABULARY = TokenTexts(TEXTS, [0])
VALUES = {
    "name": ["Dallas", "El Paso", "Houston El Paso", "the"],
    "word": ["Dallas", "Dal", "Paso", "177", "is"],
    "current": ["##las", "Dal", "is", ".", "##7"],
    "last digit": ["7", "1"],
    "ends": ["ing", "las"],
    "begins": ["run", "Hou"],
    "class": list(CLASSES),
    "previous": ["the", "Dal", "<bos>", "##7"],
    "first": ["the", "Houston", "17"],
    "earlier": ["Dallas", "the", "running", "Dal"],
}


def _values(kind: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(VALUES[kind]), min_size=1, max_size=1 if kind == "class" else 3, unique=True)


# Claims as JSON: beartype, which checks what dataclasses are made of, draws random numbers, and hypothesis wants none drawn.
claims = st.lists(st.sampled_from(CONDITIONS), min_size=1, max_size=2, unique=True).flatmap(
    lambda kinds: st.fixed_dictionaries({kind: _values(kind) for kind in kinds})
)
Given = dict[str, list[str]]


token_rows = st.integers(1, 14).flatmap(
    lambda T: st.lists(st.lists(st.integers(0, len(TEXTS) - 1), min_size=T, max_size=T), min_size=1, max_size=4)
)


@given(token_rows, st.lists(claims, max_size=12))
def test_many_claims_are_matched_as_each_alone(tokens: list[list[int]], given: list[Given]) -> None:
    chosen = [Claim.from_json(conditions) for conditions in given]
    contexts = Contexts(np.array(tokens), VOCABULARY)
    claim_E, place_E = Matcher(chosen).find(contexts)
    found = sorted(zip(claim_E.tolist(), place_E.tolist(), strict=True))
    expected = [
        (number, int(place)) for number, claim in enumerate(chosen) for place in np.flatnonzero(claim.holds(contexts))
    ]
    assert found == expected


@settings(max_examples=30)
@given(st.lists(token_rows, min_size=1, max_size=3), st.lists(claims, min_size=1, max_size=6), st.integers(0, 99))
def test_counts_equal_a_dense_reference(batches: list[list[list[int]]], given: list[Given], seed: int) -> None:
    chosen = [Claim.from_json(conditions) for conditions in given]
    rng = np.random.default_rng(seed)
    n_features = 4
    feature_C = rng.integers(0, n_features, len(chosen))
    counts = DetectorCounts(chosen, feature_C, n_features)
    fires, holds = [], []
    for tokens in batches:
        contexts = Contexts(np.array(tokens), VOCABULARY)
        fires_FP = rng.random((n_features, contexts.tokens_RT.size)) < 0.3
        counted_P = rng.random(contexts.tokens_RT.size) < 0.8
        feature_S, place_S = np.nonzero(fires_FP)
        shuffled = rng.permutation(len(feature_S))
        counts.add(contexts, feature_S[shuffled], place_S[shuffled], counted_P)
        fires.append(fires_FP[:, counted_P])
        holds.append(np.stack([claim.holds(contexts).ravel() for claim in chosen])[:, counted_P])
    fires_CP, holds_CP = np.concatenate(fires, 1)[feature_C], np.concatenate(holds, 1)
    both_C = (fires_CP & holds_CP).sum(1)
    assert counts.both_C.tolist() == both_C.tolist()
    assert counts.holds_C.tolist() == holds_CP.sum(1).tolist()
    assert counts.fires_F[feature_C].tolist() == fires_CP.sum(1).tolist()
    scores = counts.scores()
    for number in range(len(chosen)):
        n_fires, n_holds, n_both = fires_CP[number].sum(), holds_CP[number].sum(), both_C[number]
        if n_fires == 0:
            assert np.isnan([scores.precision_C[number], scores.recall_C[number], scores.f1_C[number]]).all()
            continue
        assert scores.recall_C[number] == n_both / n_fires
        assert scores.f1_C[number] == 2 * n_both / (n_fires + n_holds)
        assert (scores.precision_C[number] == n_both / n_holds) if n_holds else np.isnan(scores.precision_C[number])


def test_scores_of_counts() -> None:
    scores = Scores.of(np.array([10, 0, 5]), np.array([20, 3, 0]), np.array([10, 0, 0]))
    np.testing.assert_array_equal(scores.precision_C, [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(scores.recall_C, [1.0, np.nan, 0.0])
    np.testing.assert_allclose(scores.f1_C, [2 / 3, np.nan, 0.0])


@given(claims)
def test_a_claim_is_read_back_from_json_and_is_short(given: Given) -> None:
    claim = Claim.from_json(given)
    assert claim.to_json() == given
    forms = {claim.text(n, m) for n in (1, 2, 3) for m in (1, 2, 3)}
    assert claim.short() in forms, "both conditions, and whole words"
    assert len(claim.short()) <= max(SHORT, len(claim.text(1, 1)))
    assert all(value in claim.text() for kind, values in given.items() if kind != "class" for value in values)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"word": ["Houston", "Dallas"]}, "Houston | Dallas"),
        ({"previous": ["of"]}, 'after "of"'),
        ({"current": ["."], "first": ["which", "who"]}, '"." in "which | who" sentences'),
        ({"last digit": ["7"]}, "numbers ending in 7"),
        ({"class": ["number"], "previous": ["+"]}, 'numbers after "+"'),
        ({"class": ["punctuation"]}, "punctuation"),
        ({"class": ["first piece of a word"]}, "first pieces of a word"),
        ({"current": ["is"], "earlier": ["Dallas"]}, 'is with "Dallas" earlier'),
        ({"begins": ["un"], "ends": ["ed"]}, 'words ending in "ed" and words beginning with "un"'),
        ({"current": ["\x1b[31m", "\n"]}, "\\x1b[31m | \\n"),
        ({"current": ["?", "a"], "previous": ["."]}, '"?" | a after "."'),
    ],
)
def test_what_claims_say(given: dict[str, list[str]], text: str) -> None:
    assert Claim.from_json(given).text() == text


def test_the_short_form_shows_what_fits() -> None:
    cities = [f"City{number}" for number in range(100)]
    assert Claim.of(word=cities).short() == "City0 | City1 | City2 …"
    assert Claim.of(word=cities).short(20) == "City0 | City1 …"
    assert Claim.of(word=cities).short(6) == "City0 …", "too long, but whole"
    both = Claim.of(word=cities, previous=["containing", "from", "near"])
    assert both.short(50) == 'City0 | City1 … after "containing | from …"'
    assert both.short(30) == 'City0 … after "containing …"', "what stands before is told in any case"
    assert printable("a\u202eb") == "a\\u202eb"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "expected an object of conditions, got list"),
        ({}, "expected one condition or two of different kinds, got none"),
        ({"current": ["a"], "word": ["a"], "first": ["b"]}, "got current, word, first"),
        ({"next": ["a"]}, "expected a condition among name, word, .*, got 'next'"),
        ({"current": "a"}, "'current': expected a list of texts, got 'a'"),
        ({"current": [1]}, r"'current': expected a list of texts, got \[1\]"),
        ({"current": []}, "current: expected 1 to 256 values, got 0"),
        ({"current": [str(i) for i in range(257)]}, "current: expected 1 to 256 values, got 257"),
        ({"current": [""]}, "current: expected values of 1 to 100 characters"),
        ({"class": ["verbs"]}, "class: expected one of number, .*, got 'verbs'"),
        ({"ends": ["ing", "ed"]}, "ends: expected values of one length, 1 to 3 letters"),
    ],
)
def test_what_is_no_claim(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Claim.from_json(given)


def test_a_value_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="word: a value is given twice"):
        Condition("word", ("a", "a"))
