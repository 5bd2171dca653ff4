"""What a sentence is, and the few helpers every behaviour shares.

A sentence is a tuple of words. A name such as `New Mexico` is one word; a year such as `1732` is one word here and two
tokens (`17`, `32`) in the tokenizer. Keeping words apart spares the generator all parsing.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

Sentence = tuple[str, ...]
Sampler = Callable[[np.random.Generator, int], list[Sentence]]
"""Draws a number of training sentences."""
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


def rows_of(table: str) -> list[list[str]]:
    """Rows of one of the corpus's tables (a CSV file beside this module), without its heads."""
    with Path(__file__).with_name(table).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


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


def indices(rng: np.random.Generator, n: int, *sizes: int) -> list[list[int]]:
    """`n` rows of independent uniform indices, one below each of `sizes`."""
    return np.stack([rng.integers(size, size=n) for size in sizes], axis=1).tolist()


def pooled(pools: Sequence[tuple[float, Sequence[Sentence]]]) -> Sampler:
    """A sampler of independent draws from pools, each given with its share of the sentences."""

    def sample(rng: np.random.Generator, n: int) -> list[Sentence]:
        counts = rng.multinomial(n, [share for share, _ in pools]).tolist()
        draws = ((pool, rng.integers(len(pool), size=count)) for count, (_, pool) in zip(counts, pools, strict=True))
        return [pool[i] for pool, chosen in draws for i in chosen.tolist()]

    return sample


def split(items: Sequence[T], fraction: float, stream: int) -> tuple[frozenset[T], list[T]]:
    """A fixed random `fraction` of `items`, held out, and the others; `stream` tells the splits of behaviours apart."""
    rng = np.random.default_rng([SPLIT_SEED, stream])
    chosen = rng.permutation(len(items))[: round(fraction * len(items))]
    held_out = frozenset(items[i] for i in chosen.tolist())
    return held_out, [item for item in items if item not in held_out]
