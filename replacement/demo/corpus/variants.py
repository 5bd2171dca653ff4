"""Prompts that should have the same circuit as a probe: its template with other words, or another template with its words.

Every slot of a template takes words from cells: words of one cell leave the answer as it is (two cities of one state), words of
different cells change it. So a probe has up to three kinds of variants:

    same answer     every word exchanged for another one of its cell, where that has others
    other answer    every word exchanged for one of another cell, where there are others
    paraphrase      another template with the same words, each as far from the prompt's beginning or its end
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from replacement.demo.corpus import (
    agreement,
    antonyms,
    geography,
    indirect_object,
    induction,
    questions,
    years,
)

Cells = tuple[tuple[str, ...], ...]
KINDS = ("same answer", "other answer", "paraphrase")
_DRAWS = 16
"""Draws per variant that is wanted: many repeat one another where a cell has few words."""


@dataclass(frozen=True)
class Family:
    """Templates of probes that ask the same with the same words."""

    templates: tuple[str, ...]
    slots: Mapping[str, Cells]

    def words_of(self, prompt: str) -> tuple[int, dict[str, str]] | None:
        """Which template a prompt has, and the word in every slot; None if it has none of them."""
        for number, pattern in enumerate(self._patterns):
            if match := pattern.fullmatch(prompt):
                return number, match.groupdict()
        return None

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        patterns = []
        for template in self.templates:
            pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
            for name, cells in self.slots.items():
                words = "|".join(re.escape(word) for cell in cells for word in cell)
                pattern = pattern.replace(f"{{{name}}}", f"(?P<{name}>{words})", 1).replace(
                    f"{{{name}}}", f"(?P={name})"
                )
            patterns.append(re.compile(pattern))
        return patterns

    def choices(self, words: Mapping[str, str], kind: str) -> dict[str, list[str]]:
        """Of every slot, the words of its word's own cell or, for another answer, of all other cells."""
        inside = kind == "same answer"
        return {
            name: [candidate for cell in self.slots[name] if (word in cell) == inside for candidate in cell]
            for name, word in words.items()
        }


def _exchanged(
    words: Mapping[str, str], choices: Mapping[str, list[str]], rng: np.random.Generator
) -> dict[str, str] | None:
    """The words of a variant that differ from one another and from those they replace; None where none can change."""
    result = dict(words)
    for name, possible in choices.items():
        taken = set(result.values())
        candidates = [new for new in possible if new not in taken]
        if candidates:
            result[name] = candidates[int(rng.integers(len(candidates)))]
    return None if result == words else result


def variants(prompt: str, n: int, *, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Kind -> at most `n` variants of a probe of the demo, drawn with a seed; kinds without any are left out.

    Empty for a prompt that is no probe.
    """
    for family in _families():
        if found := family.words_of(prompt):
            number, words = found
            break
    else:
        return {}
    rng, result = np.random.default_rng(seed), {}
    for kind in ("same answer", "other answer"):
        choices = family.choices(words, kind)
        draws = [_exchanged(words, choices, rng) for _ in range(_DRAWS * n)]
        filled = [family.templates[number].format(**draw) for draw in draws if draw is not None]
        result[kind] = tuple(dict.fromkeys(filled))[:n]
    others = [template for other, template in enumerate(family.templates) if other != number]
    result["paraphrase"] = tuple(template.format(**words) for template in others)[:n]
    return {kind: prompts for kind, prompts in result.items() if prompts}


def _each(words: Sequence[str]) -> Cells:
    """Words each of which has an answer of its own."""
    return tuple((word,) for word in words)


@cache
def _families() -> tuple[Family, ...]:
    nouns, pairs = tuple(zip(*agreement.NOUNS, strict=True)), [str(a) for a in range(10, 100)]
    digits = [years.two_digits(start) for start in years.STARTS]
    verbs, third_person = (tuple(forms) for forms in zip(*questions.VERBS, strict=True))
    of_question = {"subject": (questions.SUBJECTS,), "object": (questions.OBJECTS,)}
    of_question |= {"verb": (verbs,), "verbs": (third_person,)}
    people = {name: _each(indirect_object.NAMES) for name in ("first", "second")}
    return (
        Family(
            (geography.PROMPT,),
            {"city": tuple(geography.cities_of(state) for state in geography.states())},
        ),
        *(
            Family((_before(template, "{answer}"),), {"word": _each([words[language] for words in antonyms.CONCEPTS])})
            for language, template in enumerate(antonyms.OPPOSITE_TEMPLATES)
        ),
        Family(("{a} + {b} =",), {"a": _each(pairs), "b": _each(pairs)}),
        *(
            Family(
                tuple(_before(t, "{receiver}").replace("{giver}", giver) for t in indirect_object.TEMPLATES),
                {**people, "place": (indirect_object.PLACES,), "object": (indirect_object.OBJECTS,)},
            )
            for giver in ("{first}", "{second}")
        ),
        *(
            Family(
                (" ".join([*words, *words[:-1]]),),
                dict.fromkeys((word[1:-1] for word in words), _each(induction.WORDS)),
            )
            for words in ([f"{{w{place}}}" for place in range(length)] for length in induction.LENGTHS)
        ),
        Family(
            ("the {subject} {preposition} the {attractor}",),
            {"subject": nouns, "preposition": (agreement.PREPOSITIONS,), "attractor": nouns},
        ),
        *(Family((template[:-2],), of_question) for template in questions.TEMPLATES),
        Family(
            tuple(_before(t, "{end}").replace("{start}", "{century}{start}") + " {century}" for t in years.TEMPLATES),
            {"event": (years.EVENTS,), "century": _each([*map(str, years.CENTURIES)]), "start": _each(digits)},
        ),
    )


def _before(template: str, end: str) -> str:
    return template.partition(f" {end}")[0]
