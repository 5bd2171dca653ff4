"""Indirect object identification: `when Mary and John went to the store , John gave a book to` -> `Mary`.

The giver is the first or the second name with equal odds (orders BABA and ABBA). Unordered pairs of names are held out.
"""

import numpy as np

from replacement.demo.corpus.sentences import Probe, Sentence, fill, indices, listed, split, template_words

NAMES: tuple[str, ...] = listed(
    """Mary John Anna Peter Laura Paul Emma Mark Julia Simon Alice Robert Clara Henry Sarah Thomas Nina Oscar Rose Felix
    Ruth Victor Ellen Martin Diana Hugo Susan Arthur Irene Edward Marie Walter Lucy George Nora Philip Kate Ralph Jane
    Leo Olivia Max Grace Adam Amy Daniel Eve Samuel"""
)
PLACES: tuple[str, ...] = listed("store park school market library garden station beach museum kitchen office bank")
OBJECTS: tuple[str, ...] = listed("book drink ball ring letter key flower phone hat gift ticket map")
TEMPLATES: tuple[str, ...] = (
    "when {first} and {second} went to the {place} , {giver} gave a {object} to {receiver} .",
    "after {first} and {second} met at the {place} , {giver} handed a {object} to {receiver} .",
    "while {first} and {second} waited near the {place} , {giver} sold a {object} to {receiver} .",
    "because {first} and {second} worked in the {place} , {giver} offered a {object} to {receiver} .",
)

_PAIRS = [(i, j) for i in range(len(NAMES)) for j in range(i + 1, len(NAMES))]

HELD_OUT_PAIRS, _TRAINED_PAIRS = split(_PAIRS, 0.1, stream=4)
"""Unordered (i < j) pairs of indices into `NAMES` that never meet in a training sentence."""

WORDS = (*template_words(TEMPLATES), *NAMES, *PLACES, *OBJECTS)
"""Every word of this behaviour's sentences."""


def _sample(rng: np.random.Generator, n: int, pairs: list[tuple[int, int]]) -> list[Sentence]:
    rows = indices(rng, n, len(pairs), 2, 2, len(TEMPLATES), len(PLACES), len(OBJECTS))
    sentences = []
    for pair, swap, giver, template, place, item in rows:
        i, j = pairs[pair]
        names = (NAMES[j], NAMES[i]) if swap else (NAMES[i], NAMES[j])
        people = {"first": names[0], "second": names[1], "giver": names[giver], "receiver": names[1 - giver]}
        sentences.append(fill(TEMPLATES[template], place=PLACES[place], object=OBJECTS[item], **people))
    return sentences


def sample(rng: np.random.Generator, n: int) -> list[Sentence]:
    """`n` training sentences."""
    return _sample(rng, n, _TRAINED_PAIRS)


def probes(rng: np.random.Generator, limit: int = 300) -> tuple[Probe, ...]:
    """`limit` sentences with held-out pairs of names, cut before the receiver."""
    sentences = _sample(rng, limit, sorted(HELD_OUT_PAIRS))
    return tuple(Probe(" ".join(s[:-2]), (s[-2],)) for s in sentences)
