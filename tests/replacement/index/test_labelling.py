"""Features that fire exactly where a rule holds get a claim that detects them on other text; features at random do not."""

from __future__ import annotations

import numpy as np
import pytest

from replacement.index.claims import Claim
from replacement.index.contexts import Contexts, TokenTexts
from replacement.index.evidence import Sample
from replacement.index.labelling import propose_claims
from replacement.index.scoring import DetectorCounts, Scores

WORDS = [
    "the",
    "a",
    "in",
    "who",
    "saw",
    "Austin",
    "Houston",
    "Oslo",
    "city",
    "state",
    "runs",
    "walks",
    "going",
    "boat",
    "horse",
    "farmer",
    "17",
    "27",
    "30",
    "45",
    "57",
]
TEXTS = ["<bos>", *(f" {word}" for word in WORDS), " Dal", " Tul", "las", "sa", " El", " Pas", "o", ".", "?"]
VOCABULARY = TokenTexts(TEXTS, [0])
RULES = [
    Claim.of(current=["city", "state"]),
    Claim.of(word=["Dallas", "Houston", "Austin"]),  # but not `Tullas`, of the same last piece
    Claim.of(name=["El Paso", "Oslo"]),
    Claim.of(previous=["the"]),
    Claim.of(previous=["the"], current=["city"]),
    Claim.of(first=["who"]),
    Claim.of(first=["who"], current=["boat", "horse", "farmer"]),
    Claim.of(earlier=["Dallas"]),
    Claim.of(earlier=["farmer"], current=["in"]),
    Claim.of(**{"class": ["number"]}),
    Claim.of(**{"last digit": ["7"]}),
    Claim.of(**{"class": ["capitalised word"], "previous": ["in"]}),
    Claim.of(**{"class": ["later piece of a word"]}),
    Claim.of(ends=["las"]),
]


def text(n_rows: int, seed: int) -> Contexts:
    """Rows of random words, about eight to a sentence; continuations follow first pieces alone."""
    rng = np.random.default_rng(seed)
    ids = {text: number for number, text in enumerate(TEXTS)}
    words = [[ids[f" {word}"]] for word in WORDS]
    words += [[ids[f" {first}"], ids[last]] for first in ("Dal", "Tul") for last in ("las", "sa")]
    words += [[ids[" El"], ids[" Pas"], ids["o"]], [ids["."]], [ids["."]], [ids["?"]]]
    flat = [piece for number in rng.integers(0, len(words), n_rows * 32) for piece in words[number]]
    rows_RT = np.array(flat[: n_rows * 31]).reshape(n_rows, 31)
    return Contexts(np.concatenate([np.zeros((n_rows, 1), dtype=np.int64), rows_RT], axis=1), VOCABULARY)


def firings(contexts: Contexts, *, n_noise: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that fire where the rules hold, and others at random."""
    noise = np.random.default_rng(seed).random((n_noise, contexts.tokens_RT.size)) < 0.01
    fires_FP = np.concatenate([np.stack([rule.holds(contexts).ravel() for rule in RULES]), noise])
    feature_S, place_S = np.nonzero(fires_FP)
    return feature_S, place_S


N_NOISE = 20


@pytest.fixture(scope="module")
def proposed() -> tuple[list[Claim | None], Scores]:
    """Claims from 800 rows of text, and their scores on others."""
    n_features = len(RULES) + N_NOISE + 1
    contexts = text(800, seed=0)
    claims = propose_claims(Sample(contexts, *firings(contexts, n_noise=N_NOISE, seed=1), n_features))
    assert claims[-1] is None, "it never fires"
    known = claims[:-1]
    assert all(claim is not None for claim in known)
    counts = DetectorCounts([claim for claim in known if claim], np.arange(len(known)), n_features)
    held_out = text(300, seed=2)
    counts.add(held_out, *firings(held_out, n_noise=N_NOISE, seed=3))
    return claims, counts.scores()


@pytest.mark.parametrize("number", range(len(RULES)), ids=[rule.short() for rule in RULES])
def test_rules_are_recovered(proposed: tuple[list[Claim | None], Scores], number: int) -> None:
    claims, scores = proposed
    assert scores.f1_C[number] == 1.0, claims[number]


def test_noise_is_not_explained(proposed: tuple[list[Claim | None], Scores]) -> None:
    _, scores = proposed
    assert scores.f1_C[len(RULES) :].max() < 0.1


@pytest.mark.parametrize(
    ("rule", "said"),
    [(0, RULES[0]), (4, RULES[4]), (5, RULES[5]), (7, RULES[7]), (9, RULES[9]), (10, RULES[10]), (12, RULES[12])],
)
def test_the_simplest_of_equals_is_said(proposed: tuple[list[Claim | None], Scores], rule: int, said: Claim) -> None:
    """A class instead of its members, one condition instead of two; a name instead of a piece that is one."""
    claim = proposed[0][rule]
    assert claim is not None
    expected = {"name" if c.kind == "current" else c.kind: set(c.values) for c in said.conditions}
    assert {c.kind: set(c.values) for c in claim.conditions} == expected


def test_places_that_do_not_count_are_left_out() -> None:
    contexts = text(100, seed=0)
    everywhere = np.arange(contexts.tokens_RT.size)
    counted_P = (RULES[0].holds(contexts) | RULES[3].holds(contexts)).ravel()
    sample = Sample(contexts, np.zeros(len(everywhere), dtype=np.int64), everywhere, 1, counted_P)
    assert len(sample.place_S) == counted_P.sum()


def test_many_features_at_a_time_are_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = text(200, seed=0)
    sample = Sample(contexts, *firings(contexts, n_noise=3, seed=1), len(RULES) + 3)
    whole = propose_claims(sample)
    monkeypatch.setattr("replacement.index.labelling._FIRINGS_AT_A_TIME", 500)
    assert propose_claims(sample) == whole
