"""Validation: how far a graph predicts what interventions on the model do, and whether its circuit is enough and needed."""

from circuits.validation.hops import hop_fidelity

__all__ = ["hop_fidelity"]
