"""How faithful a reconstruction or a replacement model is."""

from replacement.fidelity.measure import Fidelity, measure_fidelity
from replacement.fidelity.metrics import (
    Agreement,
    Mean,
    VarianceUnexplained,
    fraction_of_variance_unexplained,
    kl_divergence,
    l0,
    top1_agreement,
)

__all__ = [
    "Agreement",
    "Fidelity",
    "Mean",
    "VarianceUnexplained",
    "fraction_of_variance_unexplained",
    "kl_divergence",
    "l0",
    "measure_fidelity",
    "top1_agreement",
]
