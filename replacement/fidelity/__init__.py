"""How faithful a reconstruction or a replacement model is."""

from replacement.fidelity.measure import Fidelity, measure_fidelity
from replacement.fidelity.metrics import (
    Agreement,
    Mean,
    VarianceUnexplained,
    fraction_of_variance_unexplained,
    kl_divergence,
    l0,
    next_token_loss,
    top1_agreement,
)
from replacement.fidelity.parts import fidelity_by_parts
from replacement.fidelity.reads import OutputChange, fidelity_by_reads

__all__ = [
    "Agreement",
    "Fidelity",
    "Mean",
    "OutputChange",
    "VarianceUnexplained",
    "fidelity_by_parts",
    "fidelity_by_reads",
    "fraction_of_variance_unexplained",
    "kl_divergence",
    "l0",
    "measure_fidelity",
    "next_token_loss",
    "top1_agreement",
]
