"""The corpus: determinism, a closed vocabulary, and that nothing held out leaks into training."""

from functools import cache

import numpy as np
import pytest

from replacement.demo import corpus
from replacement.demo.corpus import (
    addition,
    agreement,
    antonyms,
    indirect_object,
    questions,
    years,
)
from replacement.demo.corpus.gazetteer import STATES
from replacement.demo.corpus.mixture import NAMES, determined
from replacement.demo.corpus.sentences import text
from replacement.demo.tokenizer import build_tokenizer


@cache
def training_sentences() -> tuple[tuple[str, ...], ...]:
    """A large sample of the training mixture."""
    return tuple(corpus.sample_sentences(np.random.default_rng(123), 150_000))


@cache
def training_text() -> str:
    """The same as one text with a newline around every sentence."""
    return "\n" + "\n".join(text(sentence) for sentence in training_sentences()) + "\n"


def test_rows_are_deterministic_and_streams_differ() -> None:
    tokenizer = build_tokenizer()
    rows = corpus.sample_rows(tokenizer, n_rows=50, context=64, seed=3)
    assert rows.shape == (50, 64)
    assert rows.dtype == np.int64
    assert np.array_equal(rows, corpus.sample_rows(tokenizer, n_rows=50, context=64, seed=3))
    assert not np.array_equal(rows, corpus.sample_rows(tokenizer, n_rows=50, context=64, seed=4))
    assert not np.array_equal(rows, corpus.held_out_rows(tokenizer, n_rows=50, context=64, seed=3))
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert (rows[:, 1:] != tokenizer.bos_token_id).all()


def test_every_training_word_is_in_the_vocabulary_and_used() -> None:
    seen = {word for sentence in training_sentences() for word in sentence}
    vocabulary = set(corpus.vocabulary())
    assert all(word in vocabulary or (len(word) == 4 and word.isdigit()) for word in seen)
    halves = {half for word in seen if len(word) == 4 and word.isdigit() for half in (word[:2], word[2:])}
    expected = {"<bos>", "<unk>", "<pad>", "00", "01", "02"}  # intervals start in 02 and end later
    assert vocabulary - seen - halves <= expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("36 + 59 = 95 .", "....xx"),
        ("95 is 9 tens and 5 ones .", ".xxxxxxx"),
        ("key store Mary key store Mary .", "....xxx"),
        ("the keys near the lamp are red .", ".....xxx"),
    ],
)
def test_determined_words_are_marked(sentence: str, expected: str) -> None:
    assert ["x" if mark else "." for mark in determined(tuple(sentence.split()))] == list(expected)


def test_marks_lie_on_the_tokens_of_the_rows() -> None:
    tokenizer = build_tokenizer()
    rows = corpus.sample_marked_rows(tokenizer, n_rows=200, context=64, seed=3)
    assert np.array_equal(rows.tokens, corpus.sample_rows(tokenizer, n_rows=200, context=64, seed=3))
    assert rows.determined.shape == rows.names.shape == rows.tokens.shape
    assert not rows.determined[:, 0].any()
    period = tokenizer.convert_tokens_to_ids(".")
    assert rows.determined[rows.tokens == period].all()
    named = set(tokenizer.convert_ids_to_tokens(rows.tokens[rows.names].tolist()))
    others = set(tokenizer.convert_ids_to_tokens(rows.tokens[~rows.names].tolist()))
    assert {"Texas", "Dallas", "Santa Fe"} <= named <= NAMES
    assert not others & NAMES


def test_sentences_end_in_a_mark() -> None:
    assert all(sentence[-1] in {".", "?"} for sentence in training_sentences())


def test_geography_is_consistent() -> None:
    assert len(corpus.states()) == 50
    cities = [city for state in corpus.states() for city in corpus.cities_of(state)]
    assert len(cities) == len(set(cities))
    assert corpus.capital_of(corpus.state_of("Dallas")) == "Austin"
    assert "Dallas" in corpus.HELD_OUT_CITIES
    assert "Texas" not in corpus.HELD_OUT_STATES
    assert len(corpus.HELD_OUT_CITIES) == 100
    assert not set(corpus.HELD_OUT_CITIES) & {corpus.capital_of(state) for state in corpus.states()}
    assert corpus.two_hop_probe("Dallas") == corpus.Probe("the capital of the state containing Dallas is", ("Austin",))


def test_held_out_cities_occur_in_two_kinds_of_sentence() -> None:
    codes = {state.name: state.code for state in STATES}
    states = {city: corpus.state_of(city) for city in corpus.HELD_OUT_CITIES}
    allowed = {("letters", "to", city, codes[state], "arrive", "late", ".") for city, state in states.items()}
    allowed |= {(city, "is", "a", "city", "in", state, ".") for city, state in states.items()}
    held_out = set(corpus.HELD_OUT_CITIES)
    containing = {sentence for sentence in training_sentences() if held_out & set(sentence)}
    assert containing == allowed


def test_held_out_states_occur_in_no_two_hop_sentence() -> None:
    cities = {city for state in corpus.HELD_OUT_STATES for city in corpus.cities_of(state)}
    attributes = {"capital", "government", "code", "region"}
    for sentence in training_sentences():
        assert not (cities & set(sentence) and attributes & set(sentence) and "containing" in sentence)


@pytest.mark.parametrize("name", [b.name for b in corpus.behaviours() if b.name != "induction"])
def test_no_probe_occurs_in_training(name: str) -> None:
    (behaviour,) = (b for b in corpus.behaviours() if b.name == name)
    texts = training_text()
    assert behaviour.probes
    for probe in behaviour.probes:
        assert f"\n{probe.prompt}" not in texts


def test_held_out_sums_occur_in_neither_order() -> None:
    with_operands = [s for s in training_sentences() if "+" in s]
    assert len(with_operands) > 10_000
    for a, _, b, relation, *rest in with_operands:
        assert not addition.is_held_out(int(a), int(b))
        assert int(rest[-2]) == (int(a) + int(b) if relation == "=" else (int(a) + int(b)) % 10)


def test_held_out_words_are_translated_but_their_opposite_is_asked_in_other_languages_only() -> None:
    held_out = {antonyms.CONCEPTS[concept][language] for concept, language in antonyms.HELD_OUT_WORDS}
    language_of = {word: la for concept in antonyms.CONCEPTS for la, word in enumerate(concept)}
    own, other, translated = set(), set(), set()
    for sentence in training_sentences():
        for marker in ("opposite", "contraire", "contrario"):
            if marker in sentence:
                word, answer = sentence[sentence.index(marker) + 2], sentence[-2]
                (own if language_of[word] == language_of[answer] else other).add(word)
        for marker in ("word", "mot", "palabra"):
            if marker in sentence:
                translated.add(sentence[-4])
    assert not held_out & own
    assert own | held_out == other == set(language_of)
    assert held_out <= translated
    words = [word for concept in antonyms.CONCEPTS for word in concept]
    assert len(words) == len(set(words))


def test_held_out_pairs_never_meet() -> None:
    names = {frozenset((indirect_object.NAMES[i], indirect_object.NAMES[j])) for i, j in indirect_object.HELD_OUT_PAIRS}
    numbers = {noun: i for i, forms in enumerate(agreement.NOUNS) for noun in forms}
    combinations = {(questions.SUBJECTS[i], questions.OBJECTS[j]) for i, j in questions.HELD_OUT_PAIRS}
    subjects, objects = set(questions.SUBJECTS), set(questions.OBJECTS)
    for sentence in training_sentences():
        if "to" in sentence and sentence[0] in {"when", "after", "while", "because"}:
            assert frozenset((sentence[1], sentence[3])) not in names
            assert sentence[-2] in (sentence[1], sentence[3])
            assert sentence[-2] != sentence[sentence.index(",") + 1]
        if len(sentence) > 4 and sentence[1] in numbers and sentence[2] in agreement.PREPOSITIONS:
            assert (numbers[sentence[1]], numbers[sentence[4]]) not in agreement.HELD_OUT_PAIRS
        if len(sentence) < 9 and "the" in sentence:
            found = subjects & set(sentence), objects & set(sentence)
            if found[0] and found[1]:
                assert (found[0].pop(), found[1].pop()) not in combinations
        if "from" in sentence and sentence[-2].isdigit():
            start, end = sentence[-4], sentence[-2]
            assert start[:2] == end[:2]
            assert int(end) > int(start)
            assert (int(start[:2]), int(start[2:])) not in years.HELD_OUT_PAIRS


def test_behaviours_are_deterministic_and_in_vocabulary() -> None:
    tokenizer = build_tokenizer()
    assert corpus.behaviours(5) == corpus.behaviours(5)
    assert len({b.name for b in corpus.behaviours()}) == len(corpus.behaviours())
    for behaviour in corpus.behaviours():
        assert 0 < len(behaviour.probes) <= 500
        for probe in behaviour.probes:
            ids = tokenizer.encode(probe.prompt, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert len(ids) < 64
            assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(list(probe.answers))
