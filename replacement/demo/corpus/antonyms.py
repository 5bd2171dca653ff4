"""Antonyms in English, French and Spanish, tied together by translation.

Some (concept, language) words are held out: no sentence asks for their opposite in their own language. They do occur in
translations, in questions for an opposite in another language (`in French the opposite of hot is froid .`), and as the
opposite of their partner. To answer `the opposite of hot is` the model has to carry what it knows from one language to
another, and asking across languages makes a shared concept cheaper than three separate tables. French elision
(`d'amour`) is not written, so that words stay whole tokens.
"""

import numpy as np

from replacement.demo.corpus.concepts import CONCEPTS, LANGUAGES, opposite
from replacement.demo.corpus.sentences import SPLIT_SEED, Probe, Sentence, draw, fill, template_words

HELD_OUT_FRACTION = 0.11

# Indexed by the language of the carrier sentence, which is that of `{word}`.
OPPOSITE_TEMPLATES = (
    "the opposite of {word} is {answer} .",
    "le contraire de {word} est {answer} .",
    "el contrario de {word} es {answer} .",
)
# [language of the question][language of the answer]
CROSS_OPPOSITE_TEMPLATES = (
    ("in English the opposite of {word} is {answer} .",
     "in French the opposite of {word} is {answer} .",
     "in Spanish the opposite of {word} is {answer} ."),
    ("en anglais le contraire de {word} est {answer} .",
     "en français le contraire de {word} est {answer} .",
     "en espagnol le contraire de {word} est {answer} ."),
    ("en inglés el contrario de {word} es {answer} .",
     "en francés el contrario de {word} es {answer} .",
     "en español el contrario de {word} es {answer} ."),
)  # fmt: skip
TRANSLATION_TEMPLATES = (
    ("the English word for {word} is {answer} .",
     "the French word for {word} is {answer} .",
     "the Spanish word for {word} is {answer} ."),
    ("le mot anglais pour {word} est {answer} .",
     "le mot français pour {word} est {answer} .",
     "le mot espagnol pour {word} est {answer} ."),
    ("la palabra inglesa para {word} es {answer} .",
     "la palabra francesa para {word} es {answer} .",
     "la palabra española para {word} es {answer} ."),
)  # fmt: skip

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


def _opposite_sentence(template: str, concept: int, language: int, answer_language: int) -> Sentence:
    answer = CONCEPTS[opposite(concept)][answer_language]
    return fill(template, word=CONCEPTS[concept][language], answer=answer)


_POOLS: list[tuple[float, list[Sentence]]] = [
    (OPPOSITE_SHARE, [_opposite_sentence(OPPOSITE_TEMPLATES[la], c, la, la) for c, la in _ASKED]),
    (
        CROSS_SHARE,
        [
            _opposite_sentence(CROSS_OPPOSITE_TEMPLATES[la][to], c, la, to)
            for c, la in _WORDS
            for to in _EACH
            if to != la or (c, la) not in HELD_OUT_WORDS
        ],
    ),
    (
        TRANSLATION_SHARE,
        [
            fill(TRANSLATION_TEMPLATES[la][to], word=CONCEPTS[c][la], answer=CONCEPTS[c][to])
            for c, la in _WORDS
            for to in _EACH
            if to != la  # a word for itself would teach copying, which is the wrong answer to a new word's opposite
        ],
    ),
]


def words() -> list[str]:
    """Every word of this behaviour's sentences."""
    templates = list(OPPOSITE_TEMPLATES)
    for la in _EACH:
        templates += CROSS_OPPOSITE_TEMPLATES[la]
        templates += [TRANSLATION_TEMPLATES[la][to] for to in _EACH if to != la]
    return [*template_words(templates), *(word for concept in CONCEPTS for word in concept)]


def sample(rng: np.random.Generator, n: int) -> list[Sentence]:
    """`n` training sentences."""
    counts = rng.multinomial(n, [share for share, _ in _POOLS]).tolist()
    return [s for count, (_, pool) in zip(counts, _POOLS, strict=True) for s in draw(rng, pool, count)]


def probe(concept: int, language: int) -> Probe:
    """The question for the opposite of one word in its own language."""
    prompt = OPPOSITE_TEMPLATES[language].partition(" {answer}")[0].format(word=CONCEPTS[concept][language])
    return Probe(prompt, (CONCEPTS[opposite(concept)][language],))


def probes(rng: np.random.Generator) -> tuple[Probe, ...]:
    """The opposite of every held-out word."""
    return tuple(probe(*pair) for pair in sorted(HELD_OUT_WORDS))
