"""Validation: how far a graph predicts what interventions on the model do, and whether its circuit is enough and needed."""

from circuits.validation.confidence import confidence_sequence
from circuits.validation.hops import hop_fidelity

__all__ = ["confidence_sequence", "hop_fidelity"]
