"""What any crosscoder has to beat at its own number of active features, and what it must not do as well.

N tokens, M neurons, F dictionary vectors, D width, R = B T rows of activations.

- thresholded neurons: the MLPs' own neurons, all but the k largest contributions set to 0 (Ameisen et al. 2025, "Circuit
  Tracing", compare the same way);
- random dictionary: k of as many random unit vectors as the crosscoder has features (4,096 at most), never trained. Its codes
  are found by matching pursuit on the very output that is replaced, which the crosscoder never sees;
- random weights: the same crosscoder in a model whose matrices are drawn anew with the mean and spread they had (Heap et al.
  2025, "Sparse autoencoders can interpret randomly initialized transformers"). If it were as good there, it would have learnt
  the data and not the model.

k is the crosscoder's own mean number of active features of every layer, rounded.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import LanguageModel
from replacement.validation.measure import Measured, Progress, measure_slice, no_progress, site_means
from replacement.validation.outputs import OutputSums, compare, read_original
from replacement.validation.protocols import MEAN, PROPAGATED, ZERO, Run
from replacement.validation.reconstruction import SiteErrors
from replacement.validation.slices import Slice

MAX_DICTIONARY = 4096
"""Most vectors of the random dictionary; more would need a table of their products too large to hold."""
_ROWS_AT_ONCE = 128  # their products with every vector stay in a cache


class Control(ABC):
    """A stand-in for the MLPs with k active features in every layer."""

    name: str
    about: str

    @abstractmethod
    def logits(self, run: Run) -> Tensor:
        """Logits with every layer's stand-in in place, errors propagating."""

    @abstractmethod
    def reconstructions(self, run: Run) -> dict[Site, tuple[Tensor, Tensor]]:
        """Of every site its clean target and its reconstruction, `[R, D]`."""


def keep_largest(acts_NM: Float[Tensor, "*N M"], output_norms_M: Float[Tensor, " M"], k: int) -> Float[Tensor, "*N M"]:
    """Neuron activations with all but the k largest `|activation| * ||output weights||` of each token set to 0."""
    index_NK = (acts_NM.abs() * output_norms_M).topk(min(k, acts_NM.shape[-1]), dim=-1).indices
    return torch.zeros_like(acts_NM).scatter(-1, index_NK, acts_NM.gather(-1, index_NK))


class Neurons:
    """The inputs of every MLP's output matrix, in any architecture: `output = acts @ W_out + b_out` (before a post-norm)."""

    def __init__(self, lm: LanguageModel, layers: list[int]) -> None:
        self.lm, self.layers = lm, layers
        mlps = {layer: lm.parts.bridge.blocks[layer].mlp for layer in layers}
        self.weights: dict[int, Tensor] = {layer: mlp.W_out.detach() for layer, mlp in mlps.items()}
        self.biases = {layer: getattr(mlp, "b_out", None) for layer, mlp in mlps.items()}
        self.norms = {layer: weight_MD.norm(dim=1) for layer, weight_MD in self.weights.items()}

    def run(self, tokens_BT: Tensor, hook: Callable[[Tensor, int], Tensor | None]) -> Tensor:
        """Logits with a hook on every layer's neuron activations `[B, T, M]`."""
        named = [
            (f"blocks.{layer}.mlp.out.hook_in", lambda x, hook, layer=layer, call=hook: call(x, layer))
            for layer in self.layers
        ]
        return self.lm.parts.run(tokens_BT, named)

    def output(self, acts: Tensor, layer: int) -> Tensor:
        """What the MLP writes, `[R, D]`."""
        y_RD = (acts @ self.weights[layer]).flatten(0, -2)
        bias_D = self.biases[layer]
        return y_RD if bias_D is None else y_RD + bias_D.detach()


class ThresholdedNeurons(Control):
    """The MLPs' own neurons, the k largest contributions of each token kept."""

    name, about = "thresholded neurons", "the MLPs' own neurons, all but the largest contributions set to 0"

    def __init__(self, lm: LanguageModel, k: Mapping[Site, int]) -> None:
        self._neurons = Neurons(lm, [site.layer for site in k])
        self._k = {site.layer: count for site, count in k.items()}

    def _kept(self, acts: Tensor, layer: int) -> Tensor:
        return keep_largest(acts, self._neurons.norms[layer], self._k[layer])

    def logits(self, run: Run) -> Tensor:
        """Logits with every layer's neurons thresholded at once."""
        mask_BT1 = run.replaced_BT[0][..., None]
        return self._neurons.run(
            run.tokens_BT, lambda acts, layer: torch.where(mask_BT1, self._kept(acts, layer).view_as(acts), acts)
        )

    def reconstructions(self, run: Run) -> dict[Site, tuple[Tensor, Tensor]]:
        """Outputs of all neurons and of those kept, on clean activations."""
        found = {}

        def see(acts: Tensor, layer: int) -> None:
            both = (self._neurons.output(x, layer) for x in (acts, self._kept(acts, layer)))
            found[Site(layer, "mlp_out")] = (next(both), next(both))

        self._neurons.run(run.tokens_BT, see)
        return found


class RandomDictionary(Control):
    """k of F random unit vectors with non-negative coefficients, added to the site's mean."""

    name, about = (
        "random dictionary",
        "random vectors, never trained, codes by matching pursuit on the replaced output itself",
    )

    def __init__(self, k: Mapping[Site, int], means: Mapping[Site, Tensor], n_features: int, *, seed: int = 0) -> None:
        self._k, self._means = k, {site: mean_D.float() for site, mean_D in means.items()}
        generator = torch.Generator().manual_seed(seed)
        self._vectors: dict[Site, Tensor] = {}
        for site in k:
            w_FD = torch.randn(min(n_features, MAX_DICTIONARY), len(means[site]), generator=generator)
            self._vectors[site] = (w_FD / w_FD.norm(dim=1, keepdim=True)).to(means[site].device)

    def logits(self, run: Run) -> Tensor:
        """Logits with every MLP output replaced by its sparse code, layer after layer."""
        mask_BT1 = run.replaced_BT[0][..., None]

        def hook(site: Site) -> Callable[[Tensor], Tensor]:
            return lambda x_BTD: torch.where(mask_BT1, self._coded(site, x_BTD.flatten(0, 1)).view_as(x_BTD), x_BTD)

        return run.lm.run(run.tokens_BT, {site: hook(site) for site in self._k})

    def reconstructions(self, run: Run) -> dict[Site, tuple[Tensor, Tensor]]:
        """Clean outputs and their codes."""
        return {site: (run.clean[site], self._coded(site, run.clean[site])) for site in self._k}

    def _coded(self, site: Site, y_RD: Tensor) -> Tensor:
        centred_RD = y_RD.float() - self._means[site]
        return (matching_pursuit(centred_RD, self._vectors[site], self._k[site]) + self._means[site]).to(y_RD)


def matching_pursuit(y_ND: Float[Tensor, "N D"], w_FD: Float[Tensor, "F D"], k: int) -> Float[Tensor, "N D"]:
    """Greedy sparse code with unit vectors: k times, take the largest positive product with what is left over.

    Mallat and Zhang 1993, "Matching pursuits with time-frequency dictionaries", without negative coefficients.
    """
    gram_FF = w_FD @ w_FD.T
    parts = []
    for some_ND in y_ND.split(_ROWS_AT_ONCE):
        product_NF, coefficient_NF = some_ND @ w_FD.T, torch.zeros(len(some_ND), len(w_FD), device=y_ND.device)
        for _ in range(k):
            best_N1, index_N1 = product_NF.max(dim=1, keepdim=True)
            best_N1 = best_N1.clamp(min=0)
            coefficient_NF.scatter_add_(1, index_N1, best_N1)
            product_NF -= best_N1 * gram_FF[index_N1[:, 0]]
        parts.append(coefficient_NF @ w_FD)
    return torch.cat(parts) if parts else torch.zeros_like(y_ND)


def random_weights(lm: LanguageModel, *, seed: int = 0) -> LanguageModel:
    """A model of the same shape whose matrices are drawn anew, normal with the mean and spread each had; vectors stay."""
    bridge = copy.deepcopy(lm.parts.bridge)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bridge.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(noise * parameter.std() + parameter.mean())
    return LanguageModel(bridge, name=f"{lm.name}, random weights")


def matched(crosscoder: Crosscoder, l0: list[float]) -> dict[Site, int]:
    """Active features of every written site's stand-in: those of the groups that belong to its layer, at least 1."""
    own = {site: 0.0 for site in crosscoder.wiring.write_sites}
    for group, count in enumerate(l0):
        layer = crosscoder.wiring.group_layer(group)
        nearest = min(own, key=lambda site: abs(site.layer - layer))
        own[nearest] += count
    return {site: max(1, round(count)) for site, count in own.items()}


@torch.no_grad()
def measure_controls(
    lm: LanguageModel,
    crosscoder: Crosscoder,
    part: Slice,
    means: Mapping[Site, Tensor],
    *,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """The crosscoder of MLP outputs and every control on the same tokens, as plain JSON values."""
    names = (PROPAGATED, ZERO, MEAN)
    own = measure_slice(lm, [crosscoder], part, means, names=names, progress=progress)
    k = matched(crosscoder, own.activity[0].l0)
    stand_ins = [ThresholdedNeurons(lm, k), RandomDictionary(k, means, crosscoder.n_features)]
    rows = [_row("this crosscoder", "errors propagating", own)]
    l0 = float(sum(k.values()))
    rows += [_measure(lm, crosscoder, part, control, own, l0, progress) for control in stand_ins]
    other = random_weights(lm)
    other_means = site_means(other, [crosscoder], part, progress)
    there = measure_slice(other, [crosscoder], part, other_means, names=names, progress=progress)
    about = "the same crosscoder in a model of random weights, against that model's own output"
    # What a random model says of the next token is no yardstick; that the crosscoder says the same would be.
    last = _row("random weights", about, there)
    last |= {"cross_entropy_increase": None, "cross_entropy_recovered": {ZERO: None, MEAN: None}}
    return [*rows, last]


def _measure(
    lm: LanguageModel,
    crosscoder: Crosscoder,
    part: Slice,
    control: Control,
    own: Measured,
    l0: float,
    progress: Progress,
) -> dict[str, Any]:
    """One stand-in."""
    errors, sums = SiteErrors(crosscoder.wiring.write_sites), OutputSums()
    for batch in part.batches():
        run = Run(lm, [crosscoder], batch)
        original = read_original(run.logits_BTV, run.tokens_BT, run.asked_BT, run.keep_BT)
        asked_R = run.asked_BT.flatten()
        for site, (target_RD, output_RD) in control.reconstructions(run).items():
            errors.add(site, target_RD[asked_R], output_RD[asked_R])
        sums.add(original, compare(original, control.logits(run)), batch.answers)
        progress(batch.tokens_BT.numel())
    facts = sums.facts({name: own.outputs[name] for name in (ZERO, MEAN)})
    return _flat(control.name, control.about, l0, errors.facts(), facts)


def _row(name: str, about: str, measured: Measured) -> dict[str, Any]:
    facts = measured.facts()
    reconstruction = facts["reconstruction"]
    return _flat(name, about, reconstruction["l0"], reconstruction, facts["protocols"][PROPAGATED])


def _flat(name: str, about: str, l0: float, reconstruction: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "about": about,
        "n_tokens": output["n_tokens"],
        "l0": l0,
        "unexplained": reconstruction["unexplained"],
        "unexplained_mean": reconstruction["unexplained_mean"],
        "kl": output["kl"]["mean"],
        "cross_entropy_increase": output["cross_entropy_increase"],
        "cross_entropy_recovered": output["cross_entropy_recovered"],
        "agreement": output["agreement"]["all"],
    }
