"""Induction: a sequence of random words, repeated: `A B C D A B C` -> `D`.

There is nothing to memorise: training and probes draw fresh sequences from the same words.
"""

import numpy as np

from replacement.demo.corpus import agreement, indirect_object, questions
from replacement.demo.corpus.sentences import Probe, Sentence

_WORDS = (*indirect_object.NAMES, *indirect_object.PLACES, *indirect_object.OBJECTS)
_WORDS += (*(word for noun in agreement.NOUNS for word in noun), *questions.SUBJECTS, *questions.OBJECTS)
WORDS: tuple[str, ...] = tuple(dict.fromkeys(_WORDS))
"""The words the sequences are drawn from; the final mark of a sentence is none of them."""

LENGTHS: tuple[int, ...] = tuple(range(3, 11))
COPIES: tuple[int, ...] = (2, 3)


def _sequences(rng: np.random.Generator, n: int, lengths: tuple[int, ...]) -> list[Sentence]:
    """`n` sequences of distinct random words."""
    longest = max(lengths)
    # The first `longest` entries of a random permutation are distinct; argpartition spares the full sort.
    order = np.argpartition(rng.random((n, len(WORDS)), dtype=np.float32), longest, axis=1)[:, :longest]
    order = rng.permuted(order, axis=1)  # argpartition leaves its own, non-random, order behind
    sizes = rng.choice(lengths, size=n).tolist()
    return [tuple(WORDS[i] for i in row[:size]) for row, size in zip(order.tolist(), sizes, strict=True)]


def sample(rng: np.random.Generator, n: int) -> list[Sentence]:
    """`n` training sentences of two or three whole copies."""
    copies = rng.choice(COPIES, size=n).tolist()
    return [seq * k + (".",) for seq, k in zip(_sequences(rng, n, LENGTHS), copies, strict=True)]


def probes(rng: np.random.Generator, limit: int = 300) -> tuple[Probe, ...]:
    """`limit` sequences of at least four words, the second copy cut before its last word."""
    sequences = _sequences(rng, limit, tuple(length for length in LENGTHS if length >= 4))
    return tuple(Probe(" ".join(seq + seq[:-1]), (seq[-1],)) for seq in sequences)
