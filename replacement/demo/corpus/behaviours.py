"""The behaviours the demo model is trained for, each with its held-out probes, and the closed vocabulary they use."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from replacement.demo.corpus import (
    addition,
    agreement,
    antonyms,
    geography,
    indirect_object,
    induction,
    questions,
    years,
)
from replacement.demo.corpus.sentences import Probe

BOS, UNK, PAD = "<bos>", "<unk>", "<pad>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, UNK, PAD)
PUNCTUATION: tuple[str, ...] = (".", "?", ",")
_PROBE_STREAM = 2  # training rows use stream 0 and held-out rows stream 1, see mixture.py


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A named skill and the probes, absent from the training corpus, that measure it."""

    name: str
    description: str
    probes: tuple[Probe, ...]


_TABLE: tuple[tuple[str, str, Callable[[np.random.Generator], tuple[Probe, ...]]], ...] = (
    ("two-hop geography", "capital of the state of a city that has only been placed in its state", geography.probes),
    (
        "two-hop, held-out states",
        "the same for states about which no two-hop sentence was ever seen",
        geography.held_out_state_probes,
    ),
    ("antonyms", "opposite of a word that has only been translated, in three languages", antonyms.probes),
    ("addition", "sum of two two-digit numbers that were never added in either order", addition.probes),
    ("indirect object", "who received the object, for names that never met", indirect_object.probes),
    ("induction", "continue the second copy of a fresh random sequence", induction.probes),
    ("agreement", "verb number across an attractor of the other number", agreement.probes),
    ("question mark", "final mark of a question or statement with a new subject and object", questions.probes),
    ("greater-than", "a later year of the century for a start year never seen in it", years.probes),
)


def behaviours(seed: int = 0) -> tuple[Behaviour, ...]:
    """All behaviours with their held-out probes.

    Args:
        seed: draws which of the held-out items are asked where there are more than a few hundred.
    """
    return tuple(
        Behaviour(name, description, make(np.random.default_rng([_PROBE_STREAM, seed, i])))
        for i, (name, description, make) in enumerate(_TABLE)
    )


def vocabulary() -> tuple[str, ...]:
    """All tokens, special ones first, in id order."""
    sources = (addition, years, geography, antonyms, indirect_object, agreement, questions, induction)
    words = [word for source in sources for word in source.WORDS]
    return tuple(dict.fromkeys([*SPECIAL_TOKENS, *PUNCTUATION, *words]))


def multi_word_names() -> tuple[str, ...]:
    """The tokens that contain a space, such as `New Mexico`."""
    return tuple(word for word in vocabulary() if " " in word)
