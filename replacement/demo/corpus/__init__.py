"""The corpus of the demo language model: generated sentences, and probes for what was held out of them."""

from replacement.demo.corpus.behaviours import Behaviour, behaviours, multi_word_names, vocabulary
from replacement.demo.corpus.geography import (
    HELD_OUT_CITIES,
    HELD_OUT_STATES,
    capital_of,
    cities_of,
    state_of,
    states,
    training_cities_of,
    two_hop_probe,
)
from replacement.demo.corpus.mixture import held_out_rows, sample_marked_rows, sample_rows, sample_sentences
from replacement.demo.corpus.sentences import Probe, Sentence
from replacement.demo.corpus.word_lists import word_lists

__all__ = [
    "HELD_OUT_CITIES",
    "HELD_OUT_STATES",
    "Behaviour",
    "Probe",
    "Sentence",
    "behaviours",
    "capital_of",
    "cities_of",
    "held_out_rows",
    "multi_word_names",
    "sample_marked_rows",
    "sample_rows",
    "sample_sentences",
    "state_of",
    "states",
    "training_cities_of",
    "two_hop_probe",
    "vocabulary",
    "word_lists",
]
