"""Greater-than on years: `the war lasted from 1732 to 17` -> any two digits above 32.

A year is two tokens, its century and its last two digits. (century, start) pairs are held out.
"""

import numpy as np

from replacement.demo.corpus.sentences import Probe, Sentence, fill, indices, listed, split, template_words

EVENTS: tuple[str, ...] = listed("war siege reign voyage famine drought dynasty trial feud plague")
CENTURIES: tuple[int, ...] = tuple(range(11, 20))
STARTS: tuple[int, ...] = tuple(range(2, 98))
TEMPLATES: tuple[str, ...] = (
    "the {event} lasted from {start} to {end} .",
    "the {event} went on from {start} to {end} .",
)

_PAIRS = [(century, start) for century in CENTURIES for start in STARTS]

HELD_OUT_PAIRS, _TRAINED_PAIRS = split(_PAIRS, 0.12, stream=7)
"""(century, start) pairs that never open an interval in training."""


def two_digits(n: int) -> str:
    """The token of the last two digits of a year, `two_digits(5) == "05"`."""
    return f"{n:02d}"


WORDS = (*template_words(TEMPLATES), *EVENTS, *map(two_digits, range(100)))
"""Every word of this behaviour's sentences; years are given as their two halves."""


def sample(rng: np.random.Generator, n: int) -> list[Sentence]:
    """`n` training sentences; the end is uniform over the later years of the century."""
    rows = indices(rng, n, len(TEMPLATES), len(EVENTS), len(_TRAINED_PAIRS))
    sentences = []
    for (template, event, pair), share in zip(rows, rng.random(n).tolist(), strict=True):
        century, start = _TRAINED_PAIRS[pair]
        end = start + 1 + int(share * (99 - start))
        years = {"start": f"{century}{two_digits(start)}", "end": f"{century}{two_digits(end)}"}
        sentences.append(fill(TEMPLATES[template], event=EVENTS[event], **years))
    return sentences


def probe(event: str, century: int, start: int, template: int = 0) -> Probe:
    """The question about one interval."""
    unfinished = TEMPLATES[template].removesuffix(" .")
    prompt = unfinished.format(event=event, start=f"{century}{two_digits(start)}", end=century)
    return Probe(prompt, tuple(two_digits(end) for end in range(start + 1, 100)))


def probes(rng: np.random.Generator) -> tuple[Probe, ...]:
    """Every held-out (century, start) pair twice, with random events and templates."""
    pairs = sorted(HELD_OUT_PAIRS) * 2
    chosen = indices(rng, len(pairs), len(EVENTS), len(TEMPLATES))
    return tuple(probe(EVENTS[e], *pair, template=t) for pair, (e, t) in zip(pairs, chosen, strict=True))
