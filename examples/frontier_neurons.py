"""The demo model's MLP neurons as features: what any dictionary has to beat.

Per token and layer the k neurons with the largest `|activation| * ||output weights||` are kept and the others set to 0; the
MLP's output is `kept @ W_out + b_out`. Nothing is trained (Ameisen et al. 2025, "Circuit Tracing", compare the same way).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from replacement import LanguageModel, Site
from replacement.validation.controls import ThresholdedNeurons
from replacement.validation.measure import measure, site_facts
from replacement.validation.slices import batches_of


def measure_neurons(lm: LanguageModel, rows_RT: Tensor, k: int) -> dict[str, Any]:
    """Reconstruction on clean activations, and the output with every layer's neurons thresholded at once."""
    layers = range(lm.shape.n_layers)
    neurons = ThresholdedNeurons(lm, {Site(layer, "mlp_out"): k for layer in layers})
    measured = measure(lm, [], batches_of(rows_RT, lm), [neurons])
    errors, output = site_facts(measured.stand_ins[neurons.name]), measured.outputs[neurons.name]
    return {
        "l0": float(k * len(layers)),
        "l0_by_layer": [float(k)] * len(layers),
        "unexplained": errors["unexplained_mean"],
        "unexplained_by_layer": [site["unexplained"] for site in errors["sites"]],
        "kl": output.kl.mean,
        "agreement": output.agreed_confident.value(),
        "agreement_all": output.agreed.value(),
    }
