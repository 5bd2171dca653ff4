"""Dictionaries of random vectors, in the place of a crosscoder's.

- `RandomEncoder` reads what the crosscoder reads. Its k active features are those of F random directions that the centred input
  points along the most; their decoder is fitted to the output by ridge regression. So it is a transcoder of every layer by
  itself whose encoder was never trained: what a crosscoder does better is owed to the training of its features.
- `OracleDictionary` sees the output that it replaces, and sums k of F random vectors to come close to it, by matching pursuit.

F features or vectors (4,096 at most), k active ones, P tokens, C numbers read, D numbers written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook, LanguageModel
from replacement.splicing.splice_options import possible_reads
from replacement.validation.protocols import BatchRun, Protocol
from replacement.validation.slices import Batch

MAX_FEATURES = 4096
"""More would need too large a table of their products."""
RIDGE = 0.1
"""Ridge of the decoder's regression, as a share of the mean squared norm of a feature's activations.

Of 0.001, 0.01, 0.1 and 1 the best for the control on the demo."""
ORACLE = "oracle dictionary"
_ROWS_AT_ONCE = 128  # their products with every vector stay in a cache


class Layer(NamedTuple):
    """The random encoder in the place of one written site."""

    reads: tuple[Site, ...]
    input_mean_C: Float[Tensor, " C"]
    encoder_FC: Float[Tensor, "F C"]
    decoder_FD: Float[Tensor, "F D"]
    output_mean_D: Float[Tensor, " D"]


class RandomEncoder(Protocol):
    """A protocol that replaces every written site by k of F random features of what the crosscoder reads in that layer."""

    def __init__(
        self,
        lm: LanguageModel,
        crosscoder: Crosscoder,
        k: Mapping[Site, int],
        batches: Iterable[Batch],
        *,
        seed: int = 0,
    ) -> None:
        """Draw the features and fit their decoder.

        Args:
            k: active features of every written site.
            batches: rows that the decoder is fitted on.

        Raises:
            ValueError: no rows.
        """
        about = "random features of what the crosscoder reads, a decoder fitted on other rows"
        super().__init__(name="random encoder", about=about, sites=frozenset(k))
        self._k = k
        self._propagates = "propagated" in possible_reads(crosscoder.wiring, crosscoder.activation)
        rows = self._rows(lm, crosscoder, batches)
        generator = torch.Generator().manual_seed(seed)
        n_features = min(crosscoder.n_features, MAX_FEATURES)
        self.layers = {
            site: _fitted(
                reads, torch.cat([rows[read] for read in reads], -1), rows[site], k[site], n_features, generator
            )
            for site, reads in ((site, _reads_of(crosscoder, site)) for site in k)
        }

    def logits(self, run: BatchRun, means: Mapping[Site, Tensor]) -> Tensor:
        """Logits with every written site replaced, read off the replacement's own stream where the crosscoder can do so."""
        mask_BT1, inputs = run.replaced_BT[..., None], dict(run.clean)

        def hook(site: Site) -> Hook:
            def replace(x_BTD: Tensor) -> Tensor | None:
                if self._propagates:
                    inputs[site] = x_BTD.flatten(2).flatten(0, 1)
                if site not in self._k:
                    return None
                y_BTD = self._output(site, inputs).to(x_BTD).view_as(x_BTD)
                return torch.where(mask_BT1, y_BTD, x_BTD)

            return replace

        sites = {*self._k, *(read for layer in self.layers.values() for read in layer.reads)}
        return run.language_model.run(run.tokens_BT, {site: hook(site) for site in sites})

    def stand_ins(self, run: BatchRun) -> dict[Site, tuple[Tensor, Tensor]]:
        """Clean outputs and what is made of the clean inputs."""
        return {site: (run.clean[site], self._output(site, run.clean).to(run.clean[site])) for site in self._k}

    def _output(self, site: Site, inputs: Mapping[Site, Tensor]) -> Tensor:
        layer = self.layers[site]
        x_PC = torch.cat([inputs[read] for read in layer.reads], -1).float()
        value_Pk, index_Pk = _codes(x_PC - layer.input_mean_C, layer.encoder_FC, self._k[site])
        return torch.einsum("pk,pkd->pd", value_Pk, layer.decoder_FD[index_Pk]) + layer.output_mean_D

    def _rows(self, lm: LanguageModel, crosscoder: Crosscoder, batches: Iterable[Batch]) -> dict[Site, Tensor]:
        """What every site shows at the tokens that are replaced, float32."""
        runs = [(run.clean, run.replaced_BT.flatten()) for run in (BatchRun(lm, [crosscoder], b) for b in batches)]
        if not runs:
            raise ValueError("random encoder: expected rows to fit its decoder on, given none")
        return {site: torch.cat([clean[site][mask].float() for clean, mask in runs]) for site in runs[0][0]}


def _reads_of(crosscoder: Crosscoder, site: Site) -> tuple[Site, ...]:
    """What the group of a written site's layer reads, or else the group of the layer closest to it."""
    wiring = crosscoder.wiring
    group = min(range(wiring.n_groups), key=lambda group: abs(wiring.group_layer(group) - site.layer))
    return tuple(wiring.reads[group])


def _codes(x_PC: Tensor, encoder_FC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (0 or more) and numbers `[P, k]` of the features that are active."""
    value_Pk, index_Pk = (x_PC @ encoder_FC.T).topk(min(k, len(encoder_FC)), dim=1)
    return value_Pk.clamp(min=0), index_Pk


def _fitted(
    reads: tuple[Site, ...], x_PC: Tensor, y_PD: Tensor, k: int, n_features: int, generator: torch.Generator
) -> Layer:
    """Random unit directions, and the decoder `(Z'Z + r I)^-1 Z'Y` of their sparse activations Z."""
    encoder_FC = torch.randn(n_features, x_PC.shape[1], generator=generator).to(x_PC.device)
    encoder_FC /= encoder_FC.norm(dim=1, keepdim=True)
    input_mean_C, output_mean_D = x_PC.mean(0), y_PD.mean(0)
    gram_FF, product_FD = x_PC.new_zeros(n_features**2), y_PD.new_zeros(n_features, y_PD.shape[1])
    for rows_PC, targets_PD in zip(x_PC.split(_ROWS_AT_ONCE), y_PD.split(_ROWS_AT_ONCE), strict=True):
        value_Pk, index_Pk = _codes(rows_PC - input_mean_C, encoder_FC, k)
        pairs = index_Pk[:, :, None] * n_features + index_Pk[:, None, :]
        gram_FF.index_add_(0, pairs.flatten(), (value_Pk[:, :, None] * value_Pk[:, None, :]).flatten())
        written = value_Pk[:, :, None] * (targets_PD - output_mean_D)[:, None, :]
        product_FD.index_add_(0, index_Pk.flatten(), written.flatten(0, 1))
    gram_FF = gram_FF.view(n_features, n_features)
    gram_FF.diagonal().add_(RIDGE * float(gram_FF.diagonal().mean()) or 1.0)
    return Layer(reads, input_mean_C, encoder_FC, torch.linalg.solve(gram_FF, product_FD), output_mean_D)


class OracleDictionary(Protocol):
    """A protocol that sets every site to its mean plus k of F random unit vectors with non-negative coefficients."""

    def __init__(self, k: Mapping[Site, int], means: Mapping[Site, Tensor], n_features: int, *, seed: int = 0) -> None:
        about = "random vectors, chosen by matching pursuit on the replaced output itself, which no crosscoder sees"
        super().__init__(name=ORACLE, about=about, sites=frozenset(k))
        self._k, self._means = k, {site: mean_D.float() for site, mean_D in means.items()}
        generator = torch.Generator().manual_seed(seed)
        self._vectors: dict[Site, Tensor] = {}
        for site in k:
            w_FD = torch.randn(min(n_features, MAX_FEATURES), len(means[site]), generator=generator)
            self._vectors[site] = (w_FD / w_FD.norm(dim=1, keepdim=True)).to(means[site].device)

    def logits(self, run: BatchRun, means: Mapping[Site, Tensor]) -> Tensor:
        """Logits with every MLP output replaced by its sparse code, layer after layer."""
        mask_BT1 = run.replaced_BT[..., None]

        def hook(site: Site) -> Callable[[Tensor], Tensor]:
            return lambda x_BTD: torch.where(mask_BT1, self._coded(site, x_BTD.flatten(0, 1)).view_as(x_BTD), x_BTD)

        return run.language_model.run(run.tokens_BT, {site: hook(site) for site in self._k})

    def stand_ins(self, run: BatchRun) -> dict[Site, tuple[Tensor, Tensor]]:
        """Clean outputs and their codes."""
        return {site: (run.clean[site], self._coded(site, run.clean[site])) for site in self._k}

    def _coded(self, site: Site, y_RD: Tensor) -> Tensor:
        centred_RD = y_RD.float() - self._means[site]
        return (matching_pursuit(centred_RD, self._vectors[site], self._k[site]) + self._means[site]).to(y_RD)


def matching_pursuit(y_PD: Float[Tensor, "P D"], w_FD: Float[Tensor, "F D"], k: int) -> Float[Tensor, "P D"]:
    """Greedy sparse code with unit vectors: k times, take the largest positive product with what is left over.

    Mallat and Zhang 1993, "Matching pursuits with time-frequency dictionaries", without negative coefficients.
    """
    gram_FF = w_FD @ w_FD.T
    parts = []
    for some_PD in y_PD.split(_ROWS_AT_ONCE):
        product_PF, coefficient_PF = some_PD @ w_FD.T, torch.zeros(len(some_PD), len(w_FD), device=y_PD.device)
        for _ in range(k):
            best_P1, index_P1 = product_PF.max(dim=1, keepdim=True)
            best_P1 = best_P1.clamp(min=0)
            coefficient_PF.scatter_add_(1, index_P1, best_P1)
            product_PF -= best_P1 * gram_FF[index_P1[:, 0]]
        parts.append(coefficient_PF @ w_FD)
    return torch.cat(parts) if parts else torch.zeros_like(y_PD)
