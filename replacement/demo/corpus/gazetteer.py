"""The fifty states of the USA, read from `states.csv`: capital, postal code, region and cities.

City names that belong to well-known places in several states (Portland, Kansas City, ...) are left out, so that a city
always names one state. New York City is left out because its short name is the name of its state.
"""

from typing import NamedTuple

from replacement.demo.corpus.sentences import rows_of


class State(NamedTuple):
    """One state and the facts the corpus states about it."""

    name: str
    capital: str
    code: str
    region: str
    cities: tuple[str, ...]
    """Cities other than the capital."""


STATES: tuple[State, ...] = tuple(
    State(name, capital, code, region, tuple(cities.split("; ")))
    for name, capital, code, region, cities in rows_of("states.csv")
)
"""All fifty states in alphabetical order."""
