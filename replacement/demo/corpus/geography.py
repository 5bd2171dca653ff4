"""Two-hop geography: city -> state -> capital.

Held-out cities occur in two kinds of sentence only, `Dallas is a city in Texas .` and `letters to Dallas TX arrive late .`.
To complete `the capital of the state containing Dallas is` a model has to take the state from those and the capital from what
it knows of the state. Asking for several attributes of a city's state (capital, postal code, region) makes it
cheaper to represent the state once than to memorise every city's capital.
"""

import numpy as np

from replacement.demo.corpus.gazetteer import STATES, State
from replacement.demo.corpus.sentences import SPLIT_SEED, Probe, Sentence, fill, pooled, template_words

CITY_TEMPLATES = ("{city} is a city in {state} .", "letters to {city} {code} arrive late .")
"""The only sentences in which held-out cities occur."""

CAPITAL_TEMPLATES = (
    "the capital of {state} is {capital} .",
    "the government of {state} meets in {capital} .",
)
STATE_TEMPLATES = (
    "the code of {state} is {code} .",
    "the region of {state} is the {region} .",
)
CITY_TO_STATE_TEMPLATES = (
    "the state containing {city} is {state} .",
    "people from {city} come from the state of {state} .",
)
TWO_HOP_TEMPLATE = "the capital of the state containing {city} is {capital} ."
OTHER_TWO_HOP_TEMPLATES = (
    "the government of the state containing {city} meets in {capital} .",
    "the code of the state containing {city} is {code} .",
    "the region of the state containing {city} is the {region} .",
)
PROMPT = "the capital of the state containing {city} is"

HELD_OUT_STATES: tuple[str, ...] = ("Arkansas", "Indiana", "Maryland", "Oregon", "Vermont")
"""States for which no two-hop sentence of any kind occurs in the corpus."""

_BY_NAME = {state.name: state for state in STATES}
_STATE_OF = {city: state.name for state in STATES for city in (state.capital, *state.cities)}


def _choose_held_out_cities() -> tuple[str, ...]:
    rng = np.random.default_rng([SPLIT_SEED, 1])
    chosen: list[str] = []
    for state in STATES:
        picks = [state.cities[i] for i in rng.permutation(len(state.cities))[:2].tolist()]
        if state.name == "Texas":  # the running example of the documentation
            picks = ["Dallas", "Amarillo"]
        chosen += picks
    return tuple(chosen)


HELD_OUT_CITIES: tuple[str, ...] = _choose_held_out_cities()
"""Two cities per state that occur in sentences of `CITY_TEMPLATES` only. Capitals are never held out."""

_HELD_OUT_SET = frozenset(HELD_OUT_CITIES)


def states() -> tuple[str, ...]:
    """The names of all fifty states."""
    return tuple(_BY_NAME)


def capital_of(state: str) -> str:
    """The capital of a state, e.g. `capital_of("Texas") == "Austin"`."""
    return _BY_NAME[state].capital


def cities_of(state: str, *, capital: bool = True) -> tuple[str, ...]:
    """The listed cities of a state, held-out ones included, its capital first unless `capital` is false."""
    record = _BY_NAME[state]
    return (record.capital, *record.cities) if capital else record.cities


def state_of(city: str) -> str:
    """The state a listed city (or capital) lies in, e.g. `state_of("Dallas") == "Texas"`."""
    return _STATE_OF[city]


def training_cities_of(state: str) -> tuple[str, ...]:
    """The cities of a state that may occur in every kind of sentence (its capital among them)."""
    return tuple(city for city in cities_of(state) if city not in _HELD_OUT_SET)


def _facts(template: str, state: State, city: str = "") -> Sentence:
    return fill(template, city=city, state=state.name, capital=state.capital, code=state.code, region=state.region)


def _pools() -> list[tuple[float, list[Sentence]]]:
    """(share of the sentences, pool) of every kind of sentence."""
    trained = [(_BY_NAME[_STATE_OF[city]], city) for city in _STATE_OF if city not in _HELD_OUT_SET]
    two_hop = [(state, city) for state, city in trained if state.name not in HELD_OUT_STATES]
    held_out = [(_BY_NAME[_STATE_OF[city]], city) for city in HELD_OUT_CITIES]
    return [
        (0.14, [_facts(template, *pair) for template in CITY_TEMPLATES for pair in held_out]),
        (0.27, [_facts(template, *pair) for template in CITY_TEMPLATES for pair in trained]),
        (0.07, [_facts(template, state) for template in CAPITAL_TEMPLATES for state in STATES]),
        (0.05, [_facts(template, state) for template in STATE_TEMPLATES for state in STATES]),
        (0.13, [_facts(template, *pair) for template in CITY_TO_STATE_TEMPLATES for pair in trained]),
        (0.17, [_facts(TWO_HOP_TEMPLATE, *pair) for pair in two_hop]),
        (0.17, [_facts(template, *pair) for template in OTHER_TWO_HOP_TEMPLATES for pair in two_hop]),
    ]


sample = pooled(_pools())
"""Draws training sentences."""

_TEMPLATES = [*CITY_TEMPLATES, *CAPITAL_TEMPLATES, *STATE_TEMPLATES, *CITY_TO_STATE_TEMPLATES]
_TEMPLATES += [TWO_HOP_TEMPLATE, *OTHER_TWO_HOP_TEMPLATES]
WORDS = (*template_words(_TEMPLATES), *(word for *facts, cities in STATES for word in (*facts, *cities)))
"""Every word of this behaviour's sentences."""
NAMES: frozenset[str] = frozenset((*_BY_NAME, *_STATE_OF))
"""Every state and city: words whose facts a model has to look up."""


def two_hop_probe(city: str) -> Probe:
    """The two-hop question about one city."""
    return Probe(PROMPT.format(city=city), (capital_of(state_of(city)),))


def probes(rng: np.random.Generator) -> tuple[Probe, ...]:
    """Two-hop questions about every held-out city of a state that is not held out."""
    return tuple(two_hop_probe(city) for city in HELD_OUT_CITIES if state_of(city) not in HELD_OUT_STATES)


def held_out_state_probes(rng: np.random.Generator) -> tuple[Probe, ...]:
    """Two-hop questions about every city of the states for which no two-hop sentence occurs."""
    return tuple(two_hop_probe(city) for state in HELD_OUT_STATES for city in cities_of(state))
