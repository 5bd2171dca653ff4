"""The cases of the demo's feature families: prompts of which it is known what a feature should say, and the right answers.

The choosing cases decide which feature stands for a concept; the judging cases say how well it does. No beginning of a judging
prompt up to the place occurs among the choosing ones. Nothing here depends on a model or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from replacement.demo.corpus import (
    HELD_OUT_CITIES,
    HELD_OUT_STATES,
    Probe,
    Sentence,
    addition,
    agreement,
    antonyms,
    cities_of,
    indirect_object,
    induction,
    questions,
    states,
    years,
)

CHOOSE, JUDGE = "choose", "judge"
"""The two sets of cases."""
NO_CONCEPT = ""
"""The concept of a case that is a negative for every feature of its family."""
_STREAM = {CHOOSE: 3, JUDGE: 4}  # random streams 0 to 2 are those of training rows, held-out rows and probes


class Case(NamedTuple):
    """A prompt of which it is known what the features of a family should say at one place."""

    prompt: str
    """What the model reads, without `<bos>`, up to where an answer is due."""
    beginning: str
    """Beginning of the prompt: features are read at its last token, the place of the family."""
    concept: str
    """The concept whose feature should fire there."""
    detail: str = ""
    """What the right answer depends on beside the concept, such as its language."""
    asks: bool = True
    """Whether the prompt asks for an answer that depends on the concept, and so serves for swaps and ablations."""


def check_probes(probes: str) -> None:
    """Check the name of a set of cases.

    Raises:
        ValueError: neither `choose` nor `judge`.
    """
    if probes not in _STREAM:
        raise ValueError(f"probes: expected {CHOOSE!r} or {JUDGE!r}, given {probes!r:.50}")


def _generator(probes: str, behaviour: int) -> np.random.Generator:
    return np.random.default_rng([_STREAM[probes], behaviour])


def _at_end(prompt: str, concept: str, detail: str = "") -> Case:
    """A case whose place is the last token of the prompt."""
    return Case(prompt, prompt, concept, detail)


_STATE_PROMPTS: dict[str, tuple[tuple[str, str], ...]] = {
    CHOOSE: (
        ("the government of the state containing {city}", " meets in"),
        ("the state containing {city}", ""),
        ("the code of the state containing {city}", ""),
        ("{city}", ""),
    ),
    JUDGE: (
        ("the capital of the state containing {city}", " is"),
        ("the region of the state containing {city}", ""),
        ("people from {city}", ""),
    ),
}
"""Beginnings that end with the city, and how they go on; the first of each set asks for the capital."""


def state_cases(probes: str) -> Iterable[Case]:
    """Chosen on cities that occur in all sentences of the corpus; judged on all cities, capitals apart."""
    for number, (beginning, rest) in enumerate(_STATE_PROMPTS[probes]):
        for state in states():
            for city in cities_of(state, capital=False):
                held_out = city in HELD_OUT_CITIES
                if probes == CHOOSE and held_out:
                    continue
                asks = number == 0 and state not in HELD_OUT_STATES and held_out == (probes == JUDGE)
                text = beginning.format(city=city)
                yield Case(text + rest, text, state, city, asks)


_CONCEPT = {words[0]: number for number, words in enumerate(antonyms.CONCEPTS)}


def antonym_cases(probes: str) -> Iterable[Case]:
    """Chosen on questions for an opposite in another language; judged on those in the word's own language."""
    for name, concept in _CONCEPT.items():
        for language, word in enumerate(antonyms.CONCEPTS[concept]):
            for to in range(len(antonyms.LANGUAGES)):
                if (to == language) != (probes == JUDGE):
                    continue
                own, other = antonyms.OPPOSITE_TEMPLATES[language], antonyms.CROSS_OPPOSITE_TEMPLATES[language][to]
                beginning, _, rest = (own if probes == JUDGE else other).partition("{word}")
                prompt = beginning + word + rest.partition(" {answer}")[0]
                yield Case(prompt, beginning + word, name, antonyms.LANGUAGES[to])


def opposite(case: Case, concept: str) -> tuple[str, ...]:
    """The opposite of a word, in the language of the case."""
    return (antonyms.CONCEPTS[antonyms.opposite(_CONCEPT[concept])][antonyms.LANGUAGES.index(case.detail)],)


@cache
def _sums(probes: str) -> tuple[tuple[int, int], ...]:
    """Chosen on 3,000 of the sums that may occur in training; judged on all held-out sums in both orders."""
    numbers = range(10, 100)
    of_set = [(a, b) for a in numbers for b in numbers if addition.is_held_out(a, b) == (probes == JUDGE)]
    order = _generator(probes, 3).permutation(len(of_set))
    return tuple(of_set[i] for i in order[: 3000 if probes == CHOOSE else None].tolist())


def sum_cases(probes: str) -> Iterable[Case]:
    """Additions up to their `=`; the concept is the sum."""
    return (_at_end(addition.probe(a, b).prompt, str(a + b)) for a, b in _sums(probes))


def digit_cases(probes: str) -> Iterable[Case]:
    """The same; the concept is the last digit of the sum."""
    return (_at_end(addition.probe(a, b).prompt, str((a + b) % 10)) for a, b in _sums(probes))


def ending_in(case: Case, digit: str) -> tuple[str, ...]:
    """All sums that end in a digit."""
    return tuple(str(n) for n in range(int(digit), addition.LARGEST + 1, 10))


def _probes(module_sample: Callable[..., list[Sentence]], rng: np.random.Generator, n: int, tail: int) -> list[Probe]:
    """Training sentences as probes: all but the last `tail` words, and the first word left out as the answer."""
    return [Probe(" ".join(s[:-tail]), (s[-tail],)) for s in module_sample(rng, n)]


def receiver_cases(probes: str) -> Iterable[Case]:
    """Chosen on pairs of names that meet in training; judged on held-out pairs."""
    rng = _generator(probes, 4)
    drawn = indirect_object.probes(rng, 1000) if probes == JUDGE else _probes(indirect_object.sample, rng, 1000, 2)
    return (_at_end(probe.prompt, probe.answers[0]) for probe in drawn)


def next_word_cases(probes: str) -> Iterable[Case]:
    """Fresh random sequences, different ones for choosing and for judging."""
    return (_at_end(probe.prompt, probe.answers[0]) for probe in induction.probes(_generator(probes, 5), 1500))


def repeated_cases(probes: str) -> Iterable[Case]:
    """Positives: random sequences in the middle of their second copy. Negatives: others in the middle of their first."""
    for number, probe in enumerate(induction.probes(_generator(probes, 6), 600)):
        words = probe.prompt.split()
        first_copy = len(words) // 2 + 1
        if number % 2:
            yield _at_end(probe.prompt, "repeated", probe.answers[0])
        else:
            yield _at_end(" ".join(words[: first_copy - 1]), NO_CONCEPT)._replace(asks=False)


GRAMMATICAL_NUMBERS = ("singular", "plural")
"""Concepts of the number of a subject."""


def number_cases(probes: str) -> Iterable[Case]:
    """Pairs of subject and attractor that meet in training, or held-out ones; attractors of both numbers."""
    rng, nouns = _generator(probes, 7), range(len(agreement.NOUNS))
    held_out = probes == JUDGE
    pairs = [(i, j) for i in nouns for j in nouns if i != j and ((i, j) in agreement.HELD_OUT_PAIRS) == held_out]
    for i in rng.permutation(len(pairs))[:300].tolist():
        subject, attractor = (agreement.NOUNS[noun] for noun in pairs[i])
        preposition = agreement.PREPOSITIONS[int(rng.integers(len(agreement.PREPOSITIONS)))]
        for number, name in enumerate(GRAMMATICAL_NUMBERS):
            for attracting in range(2):
                prompt = f"the {subject[number]} {preposition} the {attractor[attracting]}"
                yield _at_end(prompt, name)


def question_cases(probes: str) -> Iterable[Case]:
    """Chosen on (subject, object) pairs that meet in training; judged on held-out ones. Statements are negatives."""
    rng = _generator(probes, 8)
    drawn = questions.probes(rng, 400) if probes == JUDGE else _probes(questions.sample, rng, 400, 1)
    return (_at_end(probe.prompt, "question" if probe.answers == ("?",) else NO_CONCEPT) for probe in drawn)


def year_cases(probes: str) -> Iterable[Case]:
    """Chosen on (century, start) pairs that occur in training; judged on held-out ones."""
    rng, held_out = _generator(probes, 9), probes == JUDGE
    pairs = [(c, s) for c in years.CENTURIES for s in years.STARTS if ((c, s) in years.HELD_OUT_PAIRS) == held_out]
    for century, start in pairs * (8 if held_out else 1):
        event, template = years.EVENTS[int(rng.integers(len(years.EVENTS)))], int(rng.integers(len(years.TEMPLATES)))
        prompt, digits = years.probe(event, century, start, template).prompt, years.two_digits(start)
        beginning = prompt[: prompt.index(f"{century}{digits}")] + f"{century}{digits}"
        yield Case(prompt, beginning, digits)


def decade_cases(probes: str) -> Iterable[Case]:
    """Where the end of a span of years is due; the concept is the first digit of its start, the detail the second."""
    return (_at_end(case.prompt, case.concept[0], case.concept[1]) for case in year_cases(probes))


def later_years(case: Case, start: str) -> tuple[str, ...]:
    """Later years than a start; of a start of which the concept is the decade, the detail is the last digit."""
    return tuple(years.two_digits(end) for end in range(int(start + case.detail) + 1, 100))
