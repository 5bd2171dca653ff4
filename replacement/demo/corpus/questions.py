"""Punctuation: sentences opened by `which`, `who` or `where` end in `?`, statements in `.`.

Every template has a fixed length and no optional part, so the end of the sentence is certain from its words.
(subject, object) combinations are held out.
"""

import numpy as np

from replacement.demo.corpus.sentences import Probe, Sentence, fill, indices, listed, split, template_words

SUBJECTS: tuple[str, ...] = listed(
    """teacher doctor farmer baker sailor painter singer lawyer nurse soldier writer judge miner pilot driver gardener
    merchant dancer"""
)
OBJECTS: tuple[str, ...] = listed(
    "boat horse wheel drum rope knife cart tent sword flag bell crown violin saddle anchor shield torch kite"
)
_VERBS = "paint/paints repair/repairs keep/keeps borrow/borrows carry/carries hide/hides"
VERBS: tuple[tuple[str, ...], ...] = tuple(tuple(verb.split("/")) for verb in listed(_VERBS))
TEMPLATES: tuple[str, ...] = (
    "which {subject} {verbs} the {object} ?",
    "who saw the {subject} with the {object} ?",
    "where does the {subject} {verb} the {object} ?",
    "the {subject} {verbs} the {object} .",
    "we saw the {subject} with the {object} .",
    "today the {subject} {verbs} the {object} .",
)

_PAIRS = [(i, j) for i in range(len(SUBJECTS)) for j in range(len(OBJECTS))]

HELD_OUT_PAIRS, _TRAINED_PAIRS = split(_PAIRS, 0.12, stream=6)
"""(subject, object) indices that never meet in a training sentence."""

WORDS = (*template_words(TEMPLATES), *SUBJECTS, *OBJECTS, *(form for verb in VERBS for form in verb))
"""Every word of this behaviour's sentences."""


def _sample(rng: np.random.Generator, n: int, pairs: list[tuple[int, int]]) -> list[Sentence]:
    sentences = []
    for template, pair, verb in indices(rng, n, len(TEMPLATES), len(pairs), len(VERBS)):
        (subject, item), (base, third_person) = pairs[pair], VERBS[verb]
        slots = {"subject": SUBJECTS[subject], "object": OBJECTS[item], "verb": base, "verbs": third_person}
        sentences.append(fill(TEMPLATES[template], **slots))
    return sentences


def sample(rng: np.random.Generator, n: int) -> list[Sentence]:
    """`n` training sentences, half of them questions."""
    return _sample(rng, n, _TRAINED_PAIRS)


def probes(rng: np.random.Generator, limit: int = 200) -> tuple[Probe, ...]:
    """`limit` sentences with held-out combinations, without their final mark."""
    return tuple(Probe(" ".join(s[:-1]), (s[-1],)) for s in _sample(rng, limit, sorted(HELD_OUT_PAIRS)))
