"""Controls: what any crosscoder has to beat at its number of active features, and where it must not do as well.

- thresholded neurons: the MLPs' neurons, all but the k largest contributions set to 0 (Ameisen et al. 2025, "Circuit
  Tracing", compare the same way);
- random encoder: k of as many random features as the crosscoder has, which read what the crosscoder reads; only their decoder
  is fitted (`random_dictionaries.py`);
- oracle dictionary: k of as many random vectors, chosen while seeing the very output that is replaced. No crosscoder sees that,
  so it is shown for comparison and a crosscoder need not beat it;
- random weights: the same crosscoder in a model whose matrices are drawn anew with the mean and spread they had (Heap et al.
  2025, "Sparse autoencoders can interpret randomly initialized transformers"). If it were as good there, it would have learnt
  the data and not the model.

k is the crosscoder's mean number of active features in every layer, rounded. M neurons, P tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.boot import copy_bridge
from replacement.language_model.language_model import LanguageModel
from replacement.validation.measure import Measured, Progress, measure, no_progress, site_facts
from replacement.validation.metrics import ReconstructionError
from replacement.validation.outputs import OutputSums
from replacement.validation.protocols import MEAN, PROPAGATED, ZERO, BatchRun, Protocol, protocols
from replacement.validation.random_dictionaries import ORACLE, OracleDictionary, RandomEncoder
from replacement.validation.slices import Slice

Errors = Mapping[Site, ReconstructionError]


def keep_largest(acts: Float[Tensor, "*P M"], output_norms_M: Float[Tensor, " M"], k: int) -> Float[Tensor, "*P M"]:
    """Neuron activations with all but the k largest `|activation| * ||output weights||` of each token set to 0."""
    index = (acts.abs() * output_norms_M).topk(min(k, acts.shape[-1]), dim=-1).indices
    return torch.zeros_like(acts).scatter(-1, index, acts.gather(-1, index))


class ThresholdedNeurons(Protocol):
    """A protocol in which every MLP computes with its k neurons of largest contribution alone.

    Neurons are the inputs of an MLP's output matrix, in any architecture: `output = acts @ W_out + b_out` (before a post-norm).
    """

    def __init__(self, lm: LanguageModel, k: Mapping[Site, int]) -> None:
        about = "the MLPs' neurons, all but the largest contributions set to 0"
        super().__init__(name="thresholded neurons", about=about, sites=frozenset(k))
        self._parts = lm.parts
        self._k = {site.layer: count for site, count in k.items()}
        mlps = {layer: lm.parts.bridge.blocks[layer].mlp for layer in self._k}
        self.weights: dict[int, Tensor] = {layer: mlp.W_out.detach() for layer, mlp in mlps.items()}
        self.biases: dict[int, Tensor | None] = {layer: getattr(mlp, "b_out", None) for layer, mlp in mlps.items()}

    def logits(self, run: BatchRun, means: Mapping[Site, Tensor]) -> Tensor:
        """Logits with every layer's neurons thresholded at once."""
        mask_BT1 = run.replaced_BT[..., None]
        return self._run(run, lambda acts, layer: torch.where(mask_BT1, self._kept(acts, layer), acts))

    def stand_ins(self, run: BatchRun) -> dict[Site, tuple[Tensor, Tensor]]:
        """Outputs of all neurons and of those kept, on clean activations."""
        outputs: dict[Site, tuple[Tensor, Tensor]] = {}

        def see(acts: Tensor, layer: int) -> None:
            outputs[Site(layer, "mlp_out")] = self._output(acts, layer), self._output(self._kept(acts, layer), layer)

        self._run(run, see)
        return outputs

    def _run(self, run: BatchRun, hook: Callable[[Tensor, int], Tensor | None]) -> Tensor:
        """Logits with a hook on every layer's neuron activations, `[B, T, M]` or `[R, M]`."""
        named = [
            (f"blocks.{layer}.mlp.out.hook_in", lambda x, hook, layer=layer, call=hook: call(x, layer))
            for layer in self._k
        ]
        return self._parts.run(run.tokens_BT, named)

    def _kept(self, acts: Tensor, layer: int) -> Tensor:
        return keep_largest(acts, self.weights[layer].norm(dim=1), self._k[layer])

    def _output(self, acts: Tensor, layer: int) -> Tensor:
        """What the MLP writes, `[R, D]`."""
        y_RD, bias_D = (acts @ self.weights[layer]).flatten(0, -2), self.biases[layer]
        return y_RD if bias_D is None else y_RD + bias_D.detach()


def random_weights(lm: LanguageModel, *, seed: int = 0) -> LanguageModel:
    """A model of the same shape whose matrices are drawn anew, normal with the mean and spread each had; vectors stay."""
    bridge = copy_bridge(lm.parts.bridge)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bridge.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(noise * parameter.std() + parameter.mean())
    return LanguageModel(bridge, name=f"{lm.name}, random weights")


def matched_counts(crosscoder: Crosscoder, l0: Sequence[float]) -> dict[Site, int]:
    """Active features of every written site's stand-in: those of the groups that belong to its layer, at least 1."""
    counts = {site: 0.0 for site in crosscoder.wiring.write_sites}
    for group, count in enumerate(l0):
        layer = crosscoder.wiring.group_layer(group)
        nearest = min(counts, key=lambda site: abs(site.layer - layer))
        counts[nearest] += count
    return {site: max(1, round(count)) for site, count in counts.items()}


@torch.no_grad()
def measure_controls(
    lm: LanguageModel,
    crosscoder: Crosscoder,
    sample: Slice,
    means: Mapping[Site, Tensor],
    *,
    fitted_on: Slice,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """The crosscoder of MLP outputs and every control on the same tokens, as plain JSON values; for an adapter the random
    encoder and the oracle alone.

    Args:
        sample: what is measured.
        means: of every written site.
        fitted_on: other rows of the same kind, for the decoder of the random encoder; without any that control is left out.
    """
    known = protocols([crosscoder])
    chosen = [known[name] for name in (PROPAGATED, ZERO, MEAN)]
    measured = measure(lm, [crosscoder], sample.batches(), chosen, means=means, progress=progress)
    k = matched_counts(crosscoder, measured.activity[0].l0)
    is_adapter = crosscoder.wiring.writes_differences  # it stands for no neurons, and a random model was not fine-tuned
    controls: list[Protocol] = [] if is_adapter else [ThresholdedNeurons(lm, k)]
    if rows := list(fitted_on.batches()):
        controls.append(RandomEncoder(lm, crosscoder, k, rows))
    controls.append(OracleDictionary(k, means, crosscoder.n_features))
    others = measure(lm, [crosscoder], sample.batches(), controls, progress=progress)

    l0 = float(sum(k.values()))
    result = [
        _crosscoder_row("this crosscoder", "errors propagating", measured),
        *(_row(c.name, c.about, l0, others.stand_ins[c.name], others.outputs[c.name], measured) for c in controls),
    ]
    if is_adapter:
        return result
    other_lm = random_weights(lm)
    other_means = measure(other_lm, [crosscoder], sample.batches(), [], progress=progress).means
    there = measure(other_lm, [crosscoder], sample.batches(), chosen, means=other_means, progress=progress)
    about = "the same crosscoder in a model of random weights, against that model's own output"
    # What a random model says of the next token is no yardstick; that the crosscoder says the same would be.
    undefined = {"cross_entropy_increase": None, "cross_entropy_recovered": {ZERO: None, MEAN: None}}
    return [*result, _crosscoder_row("random weights", about, there) | undefined]


def _crosscoder_row(name: str, about: str, of: Measured) -> dict[str, Any]:
    return _row(name, about, sum(of.activity[0].l0), of.errors, of.outputs[PROPAGATED], of)


def _row(name: str, about: str, l0: float, errors: Errors, output: OutputSums, ablated: Measured) -> dict[str, Any]:
    """What is said of one control, or of the crosscoder; its outputs are compared with those of the ablated model."""
    reconstruction = site_facts(errors)
    facts = output.facts({ablation: ablated.outputs[ablation] for ablation in (ZERO, MEAN)})
    return {
        "name": name,
        "about": about,
        "is_oracle": name == ORACLE,
        "n_tokens": facts["n_tokens"],
        "l0": l0,
        "unexplained": reconstruction["unexplained"],
        "unexplained_mean": reconstruction["unexplained_mean"],
        "kl": facts["kl"]["mean"],
        "cross_entropy_increase": facts["cross_entropy_increase"],
        "cross_entropy_recovered": facts["cross_entropy_recovered"],
        "agreement": facts["agreement"]["all"],
    }
