"""What might make a cross-layer transcoder (CLT) take the true step: penalties and wirings for `hop_remedies.py`.

B rows, F features per group, D width of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from models import GroundTruth
from torch import Tensor

from replacement import Wiring
from replacement.crosscoder.sites import Site
from replacement.training.losses import Loss, StepState
from replacement.training.model_losses import JacobianMatching
from replacement.training.penalties import Distance


@dataclass(frozen=True)
class FeatureJacobian(Loss):
    """`sum over active pairs |a_s W_enc[t] . sum_w W_dec[s, w]|`: an L1 penalty on direct effects between features.

    The sum over w runs over the sites written before t reads. Right for models without attention and norms.
    """

    name: ClassVar[str] = "feature_jacobian"
    ramps: ClassVar[bool] = True

    def __call__(self, state: StepState) -> Tensor:
        crosscoder, terms = state.crosscoder, []
        acts = [self._dense(state, group) for group in range(crosscoder.n_groups)]
        for target in range(crosscoder.n_groups):
            [read] = crosscoder.wiring.reads[target]
            on_BF = (acts[target].detach() > 0).to(acts[target].dtype)
            for source in range(target):
                writes = [w for w in crosscoder.wiring.writes[source] if w.layer < read.layer]
                ratios = [state.scales[read] / state.scales[w] for w in writes]
                vectors = [r * crosscoder.decoder(source, w) for r, w in zip(ratios, writes, strict=True)]
                effect_TS = crosscoder.encoder(target, read) @ torch.stack(vectors).sum(0).T
                terms.append((effect_TS.abs() * (on_BF.T @ acts[source])).sum())
        return self.coefficient * torch.stack(terms).sum() / state.n_rows

    def _dense(self, state: StepState, group: int) -> Tensor:
        part = state.features.of(group)
        acts_BF = part.activation.new_zeros(part.n_rows, part.n_features)
        return acts_BF.index_put((part.row, part.index), part.activation)


@dataclass(frozen=True)
class OwnLayer(Loss):
    """Fraction of the variance of each layer's output that the features of that layer alone leave unexplained, mean of layers.

    A loss on the intermediate variable itself: B must be reconstructed by features of B's layer too.
    """

    name: ClassVar[str] = "own_layer"

    def __call__(self, state: StepState) -> Tensor:
        crosscoder, terms = state.crosscoder, []
        biases = dict(zip(crosscoder.wiring.write_sites, crosscoder.b_dec, strict=True))
        for group in range(crosscoder.n_groups):
            site = crosscoder.wiring.writes[group][0]
            y_BD = crosscoder.decode_contribution(state.features, groups=[group], sites=[site])[site] + biases[site]
            terms.append((y_BD - state.targets[site]).square().sum() / (state.n_rows * state.variances[site]))
        return self.coefficient * torch.stack(terms).mean()


PLTS = ("PLT", "PLT, jacobian 0.4")
"""Titles of per-layer transcoders, which are there to compare with."""


class Remedy(NamedTuple):
    """A way to train a CLT."""

    title: str
    wiring: Wiring
    losses: list[Loss]


def limited(wiring: Wiring, reach: int) -> Wiring:
    """The wiring with writes to a group's own layer and the next `reach` layers only; 0 gives a per-layer one."""
    writes = tuple(sites[: reach + 1] for sites in wiring.writes)
    return Wiring(wiring.name, wiring.reads, writes, wiring.widths)


def with_stream(wiring: Wiring) -> Wiring:
    """The wiring that reconstructs the stream behind each layer, too: group l writes `resid_post` from layer l on."""
    writes = tuple((*sites, *(Site(site.layer, "resid_post") for site in sites)) for sites in wiring.writes)
    widths = {**wiring.widths, "resid_post": wiring.widths["mlp_out"]}
    return Wiring(wiring.name, wiring.reads, writes, widths)


def jacobian(truth: GroundTruth, coefficient: float) -> JacobianMatching:
    """The trainer's loss `jacobian` with the network's own MLPs."""
    parts, wiring = truth.language_model.parts, truth.crosscoder.wiring
    maps = {(read, Site(read.layer, "mlp_out")): parts.mlp_map(read.layer, read.kind) for [read] in wiring.reads}
    return JacobianMatching(coefficient, maps=maps)


def remedies(truth: GroundTruth) -> list[Remedy]:
    """Everything that is tried, first a CLT without any, last a PLT without and with one."""
    clt = Wiring.strictly_causal(truth.language_model)
    penalties: list[tuple[str, Sequence[float]]] = [
        ("distance", (0.003, 0.01, 0.03)),
        ("feature_jacobian", (0.001, 0.01)),
        ("jacobian", (0.03, 0.1, 0.4, 1.0)),
        ("own_layer", (0.1, 0.3, 1.0)),
    ]
    makers = {
        "distance": Distance,
        "feature_jacobian": FeatureJacobian,
        "jacobian": lambda c: jacobian(truth, c),
        "own_layer": OwnLayer,
    }
    tried = [Remedy("none", clt, [])]
    tried += [Remedy(f"{name} {c:g}", clt, [makers[name](c)]) for name, values in penalties for c in values]
    tried += [Remedy("reach 1", limited(clt, 1), []), Remedy("stream written", with_stream(clt), [])]
    tried += [Remedy(f"jacobian 0.4, distance {c:g}", clt, [jacobian(truth, 0.4), Distance(c)]) for c in (0.003, 0.01)]
    tried += [Remedy("jacobian 0.4, reach 1", limited(clt, 1), [jacobian(truth, 0.4)])]
    plt = Wiring.per_layer(truth.language_model)
    return [
        *tried,
        *(Remedy(title, plt, losses) for title, losses in zip(PLTS, ([], [jacobian(truth, 0.4)]), strict=True)),
    ]
