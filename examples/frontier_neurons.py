"""The demo model's own MLP neurons as features: what any dictionary has to beat. N rows, T tokens per row, M neurons.

Per token and layer the k neurons with the largest `|activation| * ||output weights||` are kept and the others set to 0; the
MLP's output is `kept @ W_out + b_out`. Nothing is trained (Ameisen et al. 2025, "Circuit Tracing", compare the same way).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from replacement import LanguageModel
from replacement.fidelity import Mean, VarianceUnexplained, kl_divergence, top1_agreement


def keep_largest(acts_NM: Tensor, output_norms_M: Tensor, k: int) -> Tensor:
    """Neuron activations with all but the k largest contributions of each token set to 0."""
    index_NK = (acts_NM.abs() * output_norms_M).topk(k, dim=-1).indices
    return torch.zeros_like(acts_NM).scatter(-1, index_NK, acts_NM.gather(-1, index_NK))


@torch.no_grad()
def measure_neurons(lm: LanguageModel, rows_RT: Tensor, k: int, *, rows_per_pass: int = 64) -> dict[str, Any]:
    """Reconstruction on clean activations, and the output with every layer's neurons thresholded at once."""
    bridge, layers = lm.parts.bridge, range(lm.shape.n_layers)
    weights = [bridge.blocks[layer].mlp.W_out for layer in layers]
    biases = [bridge.blocks[layer].mlp.b_out for layer in layers]
    norms = [weight_MD.norm(dim=1) for weight_MD in weights]
    errors, kl = [VarianceUnexplained() for _ in layers], Mean()
    agreed = counted = agreed_all = 0
    for tokens_BT in rows_RT.split(rows_per_pass):
        clean: dict[int, Tensor] = {}

        def see(acts: Tensor, layer: int) -> None:
            clean[layer] = acts  # noqa: B023 - runs before the next pass

        def threshold(acts: Tensor, layer: int) -> Tensor:
            return keep_largest(acts, norms[layer], k)

        logits, spliced = (_run_with_neurons(lm, tokens_BT, hook) for hook in (see, threshold))
        for layer in layers:
            target, output = (
                (acts @ weights[layer] + biases[layer]).flatten(0, 1)
                for acts in (clean[layer], keep_largest(clean[layer], norms[layer], k))
            )
            errors[layer].update(target, output)
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


def _run_with_neurons(lm: LanguageModel, tokens_BT: Tensor, hook: Callable[[Tensor, int], Tensor | None]) -> Tensor:
    """Logits with a hook on every layer's neuron activations `[B, T, M]`."""
    named = [
        (f"blocks.{layer}.mlp.hook_post", lambda x, hook, layer=layer, call=hook: call(x, layer))
        for layer in range(lm.shape.n_layers)
    ]
    return lm.parts.run(tokens_BT, named)
