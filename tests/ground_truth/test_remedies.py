"""Penalties and wirings of `hop_remedies.py` against dense formulas, on a random crosscoder."""

from __future__ import annotations

import pytest
import torch
from hop_remedies import choose
from models import GroundTruth, two_hop
from remedies import PLTS, FeatureJacobian, OwnLayer, limited, remedies, with_stream
from torch import Tensor
from trained import Activations, of_mlps

from replacement import Crosscoder, ReLU, Wiring
from replacement.crosscoder.sites import Site
from replacement.training.losses import StepState


@pytest.fixture(scope="module")
def truth() -> GroundTruth:
    """One family of two B's, in float64."""
    return two_hop(rotation=0, n_families=1, n_first=2, dtype=torch.float64)


def random_crosscoder(truth: GroundTruth, wiring: Wiring) -> Crosscoder:
    crosscoder = Crosscoder(wiring, n_features=5, activation=ReLU(), dtype=torch.float64, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return crosscoder


def state_of(truth: GroundTruth, crosscoder: Crosscoder) -> StepState:
    acts = Activations.of(truth, crosscoder.wiring).by_site
    features = crosscoder.encode(acts)
    writes = crosscoder.wiring.write_sites
    return StepState(
        crosscoder=crosscoder,
        inputs=acts,
        targets={site: acts[site] for site in writes},
        reconstructions=crosscoder.decode(features),
        features=features,
        dead_GF=torch.zeros(crosscoder.n_groups, 5, dtype=torch.bool),
        variances={site: torch.tensor(2.0 + site.layer, dtype=torch.float64) for site in writes},
        scales={site: 1.0 + 0.5 * number for number, site in enumerate(acts)},
        n_rows=len(next(iter(acts.values()))),
    )


@torch.no_grad()
def acts_of(state: StepState) -> list[Tensor]:
    return [torch.relu(state.crosscoder.pre_activations(state.inputs, group)) for group in range(3)]


def test_feature_jacobian_is_what_autograd_finds(truth: GroundTruth) -> None:
    crosscoder = random_crosscoder(truth, Wiring.strictly_causal(truth.language_model))
    state = state_of(truth, crosscoder)
    acts, expected, scales = acts_of(state), 0.0, state.scales
    for row in range(state.n_rows):
        for target in range(3):
            read = Site(target, "resid_mid")

            def pre_activations(*acts_F: Tensor, target: int = target, read: Site = read, row: int = row) -> Tensor:
                x_D = state.inputs[read][row]
                for source, act_F in enumerate(acts_F):
                    for layer in range(source, target):
                        write = Site(layer, "mlp_out")
                        x_D = x_D + act_F @ crosscoder.decoder(source, write) * scales[read] / scales[write]
                return crosscoder.encoder(target, read) @ x_D

            given = tuple(acts[source][row].detach() for source in range(target))
            for jacobian_FF, act_F in zip(
                torch.autograd.functional.jacobian(pre_activations, given) if given else (), given, strict=True
            ):
                expected += float((jacobian_FF.abs() * act_F * (acts[target][row] > 0)[:, None]).sum())
    assert float(FeatureJacobian(0.5)(state).detach()) == pytest.approx(0.5 * expected / state.n_rows)


def test_own_layer_is_its_dense_formula(truth: GroundTruth) -> None:
    crosscoder = random_crosscoder(truth, Wiring.strictly_causal(truth.language_model))
    state, fractions = state_of(truth, crosscoder), []
    for layer, acts_BF in enumerate(acts_of(state)):
        site = Site(layer, "mlp_out")
        y_BD = (acts_BF @ crosscoder.decoder(layer, site) + crosscoder.b_dec[layer]).detach()
        fractions.append(float((y_BD - state.targets[site]).square().sum(1).mean()) / (2 + layer))
    assert float(OwnLayer(0.5)(state).detach()) == pytest.approx(0.5 * sum(fractions) / 3)


def test_wirings_write_less_or_more(truth: GroundTruth) -> None:
    clt = Wiring.strictly_causal(truth.language_model)
    assert limited(clt, 0).writes == Wiring.per_layer(truth.language_model).writes
    assert [len(sites) for sites in limited(clt, 1).writes] == [2, 2, 1]
    crosscoder = random_crosscoder(truth, with_stream(clt)).eval()
    assert [len(sites) for sites in crosscoder.wiring.writes] == [6, 4, 2]
    acts = Activations.of(truth, crosscoder.wiring).by_site
    part = of_mlps(crosscoder)
    assert part.wiring == clt
    whole, less = crosscoder(acts)[0], part(acts)[0]
    for site in clt.write_sites:
        torch.testing.assert_close(less[site], whole[site])


def test_the_choice_is_the_most_faithful_of_the_cheap() -> None:
    given = {"none": (0.01, 0.1), "dear": (0.03, 0.9), "cheap": (0.019, 0.5), "cheapest": (0.0, 0.4)}
    given |= dict.fromkeys(PLTS, (0.0, 1.0))

    class Rows:
        remedies = tuple(given)

        def rows(self, title: str, seeds: object) -> list[dict[str, float]]:
            return [dict(zip(("FVU", "hop fidelity"), given[title], strict=True))]

    assert choose(Rows(), (0, 1)) == "cheap"


def test_every_remedy_has_a_name_of_its_own(truth: GroundTruth) -> None:
    titles = [remedy.title for remedy in remedies(truth)]
    assert len(set(titles)) == len(titles)
    assert (titles[0], titles[-2:]) == ("none", list(PLTS))
