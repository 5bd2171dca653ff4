"""The demo model's own MLP neurons as features: what any dictionary has to beat. N rows, T tokens per row, M neurons.

Per token and layer the k neurons with the largest `|activation| * ||output weights||` are kept and the others set to 0; the
MLP's output is `kept @ W_out + b_out`. Nothing is trained (Ameisen et al. 2025, "Circuit Tracing", compare the same way).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from replacement import LanguageModel
from replacement.validation.controls import Neurons, keep_largest
from replacement.validation.fidelity_metrics import Mean, VarianceUnexplained, kl_divergence, top1_agreement


@torch.no_grad()
def measure_neurons(lm: LanguageModel, rows_RT: Tensor, k: int, *, rows_per_pass: int = 64) -> dict[str, Any]:
    """Reconstruction on clean activations, and the output with every layer's neurons thresholded at once."""
    layers = list(range(lm.shape.n_layers))
    neurons = Neurons(lm, layers)
    errors, kl = [VarianceUnexplained() for _ in layers], Mean()
    agreed = counted = agreed_all = 0
    for tokens_BT in rows_RT.split(rows_per_pass):
        clean: dict[int, Tensor] = {}

        def see(acts: Tensor, layer: int) -> None:
            clean[layer] = acts  # noqa: B023 - runs before the next pass

        def threshold(acts: Tensor, layer: int) -> Tensor:
            return keep_largest(acts, neurons.norms[layer], k).view_as(acts)

        logits, spliced = (neurons.run(tokens_BT, hook) for hook in (see, threshold))
        for layer in layers:
            kept = keep_largest(clean[layer], neurons.norms[layer], k)
            errors[layer].update(neurons.output(clean[layer], layer), neurons.output(kept, layer))
        kl.update(kl_divergence(logits, spliced))
        confident, everything = (top1_agreement(logits, spliced, min_probability=p) for p in (0.5, 0.0))
        agreed, counted = agreed + confident.agreed, counted + confident.counted
        agreed_all += everything.agreed
    unexplained = [error.value() for error in errors]
    return {
        "l0": float(k * len(unexplained)),
        "l0_by_layer": [float(k)] * len(unexplained),
        "unexplained": sum(unexplained) / len(unexplained),
        "unexplained_by_layer": unexplained,
        "kl": kl.value(),
        "agreement": agreed / counted,
        "agreement_all": agreed_all / kl.count,
    }
