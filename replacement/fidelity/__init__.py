"""How faithful a reconstruction or a replacement model is."""

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
    "Mean",
    "VarianceUnexplained",
    "fraction_of_variance_unexplained",
    "kl_divergence",
    "l0",
    "top1_agreement",
]
