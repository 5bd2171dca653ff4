"""Families of features that a reader of the demo's circuits hopes for, defined by what they should fire on.

A family belongs to a behaviour. It has concepts (a state, a sum, a name) and cases (`family_cases.py`): prompts whose concept
is known, with a place where a feature of the concept should fire. There the cases of a concept are its positives, and those of
all other concepts its negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from replacement.demo.corpus import agreement, capital_of
from replacement.demo.family_cases import (
    GRAMMATICAL_NUMBERS,
    Case,
    antonym_cases,
    check_probes,
    decade_cases,
    digit_cases,
    ending_in,
    later_years,
    next_word_cases,
    number_cases,
    opposite,
    question_cases,
    receiver_cases,
    repeated_cases,
    state_cases,
    sum_cases,
    year_cases,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Concepts of one kind, with cases that choose a feature for each of them and cases that judge it."""

    name: str
    behaviour: str
    """The behaviour it belongs to, as in `replacement.demo.corpus.behaviours`."""
    place: str = "the last word"
    """Where in a prompt its features are read and changed."""
    about: str
    """What the feature of a concept fires on."""
    cases: Callable[[str], Iterable[Case]]
    """The cases of the set `choose` or `judge`."""
    answers: Callable[[Case, str], tuple[str, ...]]
    """What would be right answers to a case if its concept were another one."""

    def of(self, probes: str) -> tuple[Case, ...]:
        """The cases of one set, each once.

        Raises:
            ValueError: a set that is neither `choose` nor `judge`.
        """
        check_probes(probes)
        return tuple(dict.fromkeys(self.cases(probes)))


FAMILIES: tuple[Family, ...] = (
    Family(
        name="state",
        behaviour="two-hop geography",
        place="the city's last token",
        about="the state of a city: fires on the cities of one state and on no other city",
        cases=state_cases,
        answers=lambda case, state: (capital_of(state),),
    ),
    Family(
        name="meaning of a word",
        behaviour="antonyms",
        place="the word",
        about="what a word means: fires on its English, French and Spanish word and on no other word",
        cases=antonym_cases,
        answers=opposite,
    ),
    Family(
        name="whose opposite is asked",
        behaviour="antonyms",
        about="the same where the answer is due: fires for three words of one meaning and for no other word",
        cases=lambda probes: (case._replace(beginning=case.prompt) for case in antonym_cases(probes)),
        answers=opposite,
    ),
    Family(
        name="sum",
        behaviour="addition",
        about="the sum: fires at `=` for all pairs with one sum",
        cases=sum_cases,
        answers=lambda case, total: (total,),
    ),
    Family(
        name="last digit of the sum",
        behaviour="addition",
        about="the last digit of the sum: fires at `=` for all pairs whose sum ends in it",
        cases=digit_cases,
        answers=ending_in,
    ),
    Family(
        name="receiver",
        behaviour="indirect object",
        about="whose name is to be said: fires at `to` where one name is the receiver's, not where it is the giver's",
        cases=receiver_cases,
        answers=lambda case, name: (name,),
    ),
    Family(
        name="next word",
        behaviour="induction",
        about="the word that followed the last time: fires where it is about to come again",
        cases=next_word_cases,
        answers=lambda case, word: (word,),
    ),
    Family(
        name="seen before",
        behaviour="induction",
        about="this word has occurred before: fires in the second copy of a sequence, not in the first",
        cases=repeated_cases,
        answers=lambda case, concept: (case.detail,),
    ),
    Family(
        name="number of the subject",
        behaviour="agreement",
        about="singular or plural subject: fires at the attractor, whatever the attractor's own number",
        cases=number_cases,
        answers=lambda case, number: agreement.VERBS[GRAMMATICAL_NUMBERS.index(number)],
    ),
    Family(
        name="inside a question",
        behaviour="question mark",
        about="a sentence that began with which, who or where: fires at its last word, and at no statement's, though `who "
        "saw the teacher with the rope` and `we saw the teacher with the rope` differ in their first word alone",
        cases=question_cases,
        answers=lambda case, concept: ("?",) if concept else (".",),
    ),
    Family(
        name="start year",
        behaviour="greater-than",
        place="the start year",
        about="the last two digits of the first year, in any century",
        cases=year_cases,
        answers=later_years,
    ),
    Family(
        name="decade of the start year",
        behaviour="greater-than",
        about="the decade of the first year where the end of the second is due",
        cases=decade_cases,
        answers=later_years,
    ),
)
"""One row or two for every behaviour."""
