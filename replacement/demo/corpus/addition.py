"""Addition of two-digit numbers: `36 + 59 = 95 .`.

Numbers are single tokens from 0 to 198. A fifth of the unordered pairs of two-digit operands is held out in both
orders, from sums and from every other sentence with two operands. The helper sentences (the last digit of a sum, tens
and ones, successors, sums with a one-digit operand) tie the tokens to their digits, which carries a small model from
a feeling for magnitude to the exact rule.
"""

import numpy as np

from replacement.demo.corpus.sentences import Probe, Sentence, pooled, split

LARGEST = 198

_PAIRS = [(a, b) for a in range(10, 100) for b in range(a, 100)]

HELD_OUT_PAIRS, _ = split(_PAIRS, 0.2, stream=2)
"""Unordered (a <= b) pairs of two-digit operands that never occur in a sum."""


def is_held_out(a: int, b: int) -> bool:
    """Whether the sum of `a` and `b`, in either order, is held out."""
    return (min(a, b), max(a, b)) in HELD_OUT_PAIRS


def _sum(a: int, b: int) -> Sentence:
    return (str(a), "+", str(b), "=", str(a + b), ".")


def _digits(n: int) -> Sentence:
    return (str(n), "is", str(n // 10), "tens", "and", str(n % 10), "ones", ".")


def _compose(n: int) -> Sentence:
    return (str(n // 10), "tens", "and", str(n % 10), "ones", "make", str(n), ".")


def _last_digit(a: int, b: int) -> Sentence:
    return (str(a), "+", str(b), "ends", "in", str((a + b) % 10), ".")


_TRAINED = [(a, b) for a in range(10, 100) for b in range(10, 100) if not is_held_out(a, b)]
_SMALL = [(a, b) for a in range(100) for b in range(100) if min(a, b) < 10]
_NUMBERS = range(LARGEST + 1)

WORDS = (*["+", "=", ".", "is", "tens", "and", "ones", "make", "comes", "before", "ends", "in"], *map(str, _NUMBERS))
"""Every word of this behaviour's sentences."""

sample = pooled(
    [
        (0.55, [_sum(*pair) for pair in _TRAINED]),
        (0.12, [_sum(*pair) for pair in _SMALL]),
        (0.08, [_last_digit(*pair) for pair in _TRAINED + _SMALL]),
        (0.06, [_digits(n) for n in _NUMBERS]),
        (0.08, [_compose(n) for n in _NUMBERS]),
        (0.04, [(str(n), "ends", "in", str(n % 10), ".") for n in _NUMBERS]),
        (0.07, [(str(n), "comes", "before", str(n + 1), ".") for n in _NUMBERS[:-1]]),
    ]
)
"""Draws training sentences: share and pool of every kind."""


def probe(a: int, b: int) -> Probe:
    """The question for one sum."""
    return Probe(f"{a} + {b} =", (str(a + b),))


def probes(rng: np.random.Generator, limit: int = 400) -> tuple[Probe, ...]:
    """`limit` random held-out sums, each in one random order."""
    pairs = sorted(HELD_OUT_PAIRS)
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:limit].tolist()]
    flips = rng.integers(2, size=len(chosen)).tolist()
    return tuple(probe(b, a) if flip else probe(a, b) for (a, b), flip in zip(chosen, flips, strict=True))
