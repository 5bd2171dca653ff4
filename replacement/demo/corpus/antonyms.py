"""Antonyms in English, French and Spanish, tied together by translation.

Some (concept, language) words are held out: no sentence asks for their opposite in their own language. They do occur in
translations, in questions for an opposite in another language (`in French the opposite of hot is froid .`), and as the
opposite of their partner. To answer `the opposite of hot is` the model has to carry what it knows from one language to
another, and asking across languages makes a shared concept cheaper than three separate tables. French elision
(`d'amour`) is not written, so that words stay whole tokens. No spelling occurs twice in the table of concepts,
`concepts.csv`, neither across languages nor for two concepts, so that a word names one concept in one language.
"""

import numpy as np

from replacement.demo.corpus.sentences import SPLIT_SEED, Probe, Sentence, fill, pooled, rows_of, template_words

LANGUAGES: tuple[str, ...] = ("English", "French", "Spanish")
CONCEPTS: tuple[tuple[str, ...], ...] = tuple(map(tuple, rows_of("concepts.csv")))
"""`CONCEPTS[concept][language]` is a word. Concepts 2 k and 2 k + 1 are opposites."""
HELD_OUT_FRACTION = 0.11

# Indexed by the language of the carrier sentence, which is that of `{word}`.
OPPOSITE_TEMPLATES = (
    "the opposite of {word} is {answer} .",
    "le contraire de {word} est {answer} .",
    "el contrario de {word} es {answer} .",
)
# [language of the question][language of the answer]
_IN_LANGUAGE = (
    ("in English", "in French", "in Spanish"),
    ("en anglais", "en français", "en espagnol"),
    ("en inglés", "en francés", "en español"),
)
CROSS_OPPOSITE_TEMPLATES = tuple(
    tuple(f"{in_language} {template}" for in_language in row)
    for row, template in zip(_IN_LANGUAGE, OPPOSITE_TEMPLATES, strict=True)
)
TRANSLATION_TEMPLATES = tuple(
    tuple(template.replace("{language}", language) for language in languages.split())
    for template, languages in (
        ("the {language} word for {word} is {answer} .", "English French Spanish"),
        ("le mot {language} pour {word} est {answer} .", "anglais français espagnol"),
        ("la palabra {language} para {word} es {answer} .", "inglesa francesa española"),
    )
)

# Translation far outweighs opposites, so that the shared concept is there before single opposites can be memorised.
OPPOSITE_SHARE, CROSS_SHARE, TRANSLATION_SHARE = 0.15, 0.20, 0.65


def _choose_held_out() -> frozenset[tuple[int, int]]:
    """Held-out (concept, language) words, at most one per pair of opposites.

    The other two languages then still state that the two concepts are opposites, in both directions.
    """
    rng = np.random.default_rng([SPLIT_SEED, 3])
    n_words = len(CONCEPTS) * len(LANGUAGES)
    chosen = rng.permutation(len(CONCEPTS) // 2)[: round(HELD_OUT_FRACTION * n_words)]
    sides = rng.integers(2, size=len(chosen))
    languages = np.arange(len(chosen)) % len(LANGUAGES)
    return frozenset((2 * int(p) + int(s), int(la)) for p, s, la in zip(chosen, sides, languages, strict=True))


HELD_OUT_WORDS: frozenset[tuple[int, int]] = _choose_held_out()
"""(concept, language) indices of the words whose opposite in their own language is never asked for."""

_WORDS = [(concept, language) for concept in range(len(CONCEPTS)) for language in range(len(LANGUAGES))]
_ASKED = [pair for pair in _WORDS if pair not in HELD_OUT_WORDS]
_EACH = range(len(LANGUAGES))


def opposite(concept: int) -> int:
    """The index of the opposite concept."""
    return concept ^ 1


def _opposite_sentence(template: str, concept: int, language: int, answer_language: int) -> Sentence:
    answer = CONCEPTS[opposite(concept)][answer_language]
    return fill(template, word=CONCEPTS[concept][language], answer=answer)


_OTHER_LANGUAGE = [(language, to) for language in _EACH for to in _EACH if to != language]
"""Translations go into another language: a word for itself would teach copying, the wrong answer to a new word's opposite."""

_OPPOSITES = [_opposite_sentence(OPPOSITE_TEMPLATES[la], c, la, la) for c, la in _ASKED]
_CROSS_OPPOSITES = [
    _opposite_sentence(CROSS_OPPOSITE_TEMPLATES[la][to], c, la, to)
    for c, la in _WORDS
    for to in _EACH
    if to != la or (c, la) not in HELD_OUT_WORDS
]
_TRANSLATIONS = [
    fill(TRANSLATION_TEMPLATES[la][to], word=words[la], answer=words[to])
    for words in CONCEPTS
    for la, to in _OTHER_LANGUAGE
]
sample = pooled([(OPPOSITE_SHARE, _OPPOSITES), (CROSS_SHARE, _CROSS_OPPOSITES), (TRANSLATION_SHARE, _TRANSLATIONS)])
"""Draws training sentences."""


def _words() -> list[str]:
    templates = list(OPPOSITE_TEMPLATES)
    for la in _EACH:
        templates += CROSS_OPPOSITE_TEMPLATES[la]
        templates += [TRANSLATION_TEMPLATES[la][to] for to in _EACH if to != la]
    return [*template_words(templates), *(word for concept in CONCEPTS for word in concept)]


WORDS = tuple(_words())
"""Every word of this behaviour's sentences."""
NAMES: frozenset[str] = frozenset(word for concept in CONCEPTS for word in concept)
"""Every word of a concept."""


def probe(concept: int, language: int) -> Probe:
    """The question for the opposite of one word in its own language."""
    prompt = OPPOSITE_TEMPLATES[language].partition(" {answer}")[0].format(word=CONCEPTS[concept][language])
    return Probe(prompt, (CONCEPTS[opposite(concept)][language],))


def probes(rng: np.random.Generator) -> tuple[Probe, ...]:
    """The opposite of every held-out word."""
    return tuple(probe(*pair) for pair in sorted(HELD_OUT_WORDS))
