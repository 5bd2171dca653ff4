"""Subject-verb agreement across an attractor: `the keys near the cabinet` -> `are`, `were` or `have`.

(subject, attractor) pairs of nouns are held out in all their numbers.
"""

import numpy as np

from replacement.demo.corpus.sentences import Probe, Sentence, indices, listed, split

_NOUNS = """
key/keys cabinet/cabinets lamp/lamps chair/chairs table/tables window/windows door/doors bottle/bottles plate/plates
mirror/mirrors clock/clocks basket/baskets box/boxes shelf/shelves candle/candles carpet/carpets painting/paintings
pillow/pillows blanket/blankets guitar/guitars piano/pianos engine/engines bridge/bridges tower/towers fence/fences
statue/statues tree/trees bush/bushes wagon/wagons barrel/barrels ladder/ladders hammer/hammers bucket/buckets
coat/coats
"""
NOUNS: tuple[tuple[str, str], ...] = tuple((noun.split("/")[0], noun.split("/")[1]) for noun in listed(_NOUNS))
PREPOSITIONS: tuple[str, ...] = ("near", "behind", "beside", "above", "under")
STATES: tuple[str, ...] = ("broken", "missing", "wooden", "famous", "red", "green", "damaged", "ready")
VERBS: tuple[tuple[str, ...], tuple[str, ...]] = (("is", "was", "has"), ("are", "were", "have"))
"""Singular and plural verb forms; the third form of each is followed by `been`."""

_PAIRS = [(i, j) for i in range(len(NOUNS)) for j in range(len(NOUNS)) if i != j]

HELD_OUT_PAIRS, _TRAINED_PAIRS = split(_PAIRS, 0.1, stream=5)
"""(subject, attractor) indices into `NOUNS` that never meet in a training sentence."""

_SIMPLE_SHARE = 0.2

WORDS = ("the", "been", ".", *(word for noun in NOUNS for word in noun), *PREPOSITIONS, *STATES, *VERBS[0], *VERBS[1])
"""Every word of this behaviour's sentences."""


def _subject(pair: tuple[int, int], number: int, attractor_number: int, preposition: int) -> Sentence:
    subject, attractor = NOUNS[pair[0]][number], NOUNS[pair[1]][attractor_number]
    return ("the", subject, PREPOSITIONS[preposition], "the", attractor)


def sample(rng: np.random.Generator, n: int) -> list[Sentence]:
    """`n` training sentences, a fifth of them without attractor."""
    n_simple = int(rng.binomial(n, _SIMPLE_SHARE))
    rows = indices(rng, n, len(_TRAINED_PAIRS), 2, 2, len(PREPOSITIONS), 3, len(STATES))
    sentences = []
    for k, (pair, number, attractor_number, preposition, verb, state) in enumerate(rows):
        subject = _subject(_TRAINED_PAIRS[pair], number, attractor_number, preposition)
        predicate = (VERBS[number][verb], *(("been",) if verb == 2 else ()), STATES[state], ".")
        sentences.append((subject[:2] if k < n_simple else subject) + predicate)
    return sentences


def probes(rng: np.random.Generator, limit: int = 300) -> tuple[Probe, ...]:
    """`limit` subjects with a held-out attractor of the other number."""
    pairs = sorted(HELD_OUT_PAIRS)
    rows = indices(rng, limit, len(pairs), 2, len(PREPOSITIONS))
    return tuple(
        Probe(" ".join(_subject(pairs[pair], number, 1 - number, preposition)), VERBS[number])
        for pair, number, preposition in rows
    )
