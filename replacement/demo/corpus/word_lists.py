"""Names for the lists of words that sentences are made of: what a label may call a feature that fires on one of them."""

from replacement.demo.corpus import agreement, antonyms, geography, indirect_object, questions, years
from replacement.demo.corpus.gazetteer import STATES


def word_lists() -> dict[str, tuple[str, ...]]:
    """Name -> words: a state and its cities, a meaning in three languages, and the roles of words in sentences."""
    places = {state.name: (state.name, state.code, *geography.cities_of(state.name)) for state in STATES}
    meanings = {f"{words[0]} (in any language)": words for words in antonyms.CONCEPTS}
    singular, plural = zip(*agreement.NOUNS, strict=True)
    roles = {
        "question": ("which", "who", "where"),
        "worker": questions.SUBJECTS,
        "thing": questions.OBJECTS,
        "person": indirect_object.NAMES,
        "place": indirect_object.PLACES,
        "gift": indirect_object.OBJECTS,
        "singular noun": singular,
        "plural noun": plural,
        "preposition": agreement.PREPOSITIONS,
        "event": years.EVENTS,
        "century": tuple(map(str, years.CENTURIES)),
    }
    return {**places, **meanings, **roles}
