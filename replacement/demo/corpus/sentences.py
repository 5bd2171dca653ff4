"""What a sentence is, and the few helpers every behaviour shares.

A sentence is a tuple of words. A name such as `New Mexico` is one word; a year such as `1732` is one word here and two
tokens (`17`, `32`) in the tokenizer. Keeping words apart spares the generator all parsing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Sentence = tuple[str, ...]
T = TypeVar("T")

SPLIT_SEED = 20_061
"""Seed of every train / held-out split. It is part of the corpus: changing it changes what was held out."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with a determinate continuation.

    Example: `Probe("the capital of the state containing Dallas is", ("Austin",))`. The prompt carries no `<bos>`. It is
    answered correctly if the most likely next token after `<bos>` + prompt is one of `answers` (each a single token).
    """

    prompt: str
    answers: tuple[str, ...]


def listed(words: str) -> tuple[str, ...]:
    """The words of a list written as one text."""
    return tuple(words.split())


def fill(template: str, **slots: str) -> Sentence:
    """Fill the `{slot}` words of a template, keeping multi-word fillers whole.

    >>> fill("the capital of {state} is {capital} .", state="New Mexico", capital="Santa Fe")
    ('the', 'capital', 'of', 'New Mexico', 'is', 'Santa Fe', '.')
    """
    return tuple(slots[word[1:-1]] if word[0] == "{" else word for word in template.split())


def text(sentence: Sentence) -> str:
    """The sentence as the text a user would type."""
    return " ".join(sentence)


def template_words(templates: Sequence[str]) -> list[str]:
    """The fixed words of templates, in order of appearance, slots left out."""
    return [word for template in templates for word in template.split() if word[0] != "{"]


def draw(rng: np.random.Generator, pool: Sequence[T], n: int) -> list[T]:
    """`n` independent uniform draws from `pool`."""
    return [pool[i] for i in rng.integers(len(pool), size=n).tolist()]


def hold_out(items: Sequence[T], fraction: float, stream: int) -> frozenset[T]:
    """A fixed random `fraction` of `items`; `stream` tells the splits of different behaviours apart."""
    rng = np.random.default_rng([SPLIT_SEED, stream])
    n_held_out = round(fraction * len(items))
    return frozenset(items[i] for i in rng.permutation(len(items))[:n_held_out].tolist())
