"""Training recovers a known sparse dictionary, is reproducible, and its losses equal their formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from replacement.crosscoder.activation import Activation, JumpReLU, ReLU
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import ModelShape, Site
from replacement.crosscoder.topk import BatchTopK, TopK
from replacement.crosscoder.wiring import Wiring
from replacement.training import (
    Auxiliary,
    Distance,
    L1OfNorms,
    L2OfNorms,
    Penalty,
    PreActivation,
    Progress,
    Strongest,
    Tanh,
    TrainingConfig,
    train,
    trainer,
)
from replacement.training.losses import StepState, reconstruction_losses

SHAPE = ModelShape(n_layers=2, d_model=16, n_heads=1, d_head=16)
N_TRUE = 24


def settings(n_steps: int, **options: Any) -> TrainingConfig:
    """Settings for batches of 256 tokens."""
    return TrainingConfig(**{"n_tokens": 256 * n_steps, "batch_tokens": 256, "warmup_fraction": 0.05} | options)


def true_dictionary() -> tuple[Tensor, Tensor]:
    """Directions in which true features are read `[N, D]`, and written to the MLP outputs of two layers `[2, N, D]`."""
    generator = torch.Generator().manual_seed(0)
    read_ND = torch.nn.functional.normalize(torch.randn(N_TRUE, 16, generator=generator), dim=1)
    return read_ND, torch.randn(2, N_TRUE, 16, generator=generator) / 4


def sparse_batches(n_batches: int, n_rows: int = 256, seed: int = 0) -> Iterator[dict[Site, Tensor]]:
    """Tokens with about 1.5 true features each; layer 0 is read, both layers are written."""
    generator = torch.Generator().manual_seed(seed)
    read_ND, write_LND = true_dictionary()
    for _ in range(n_batches):
        acts_BN = torch.rand(n_rows, N_TRUE, generator=generator) + 0.5
        acts_BN = acts_BN * (torch.rand(n_rows, N_TRUE, generator=generator) < 1.5 / N_TRUE)
        yield {
            Site(0, "resid_mid"): 20 * acts_BN @ read_ND,
            Site(1, "resid_mid"): torch.randn(n_rows, 16, generator=generator),
            Site(0, "mlp_out"): acts_BN @ write_LND[0] + 3,
            Site(1, "mlp_out"): 7 * acts_BN @ write_LND[1],
        }


def clt(activation: Activation, *, tied: bool = False, seed: int = 0) -> Crosscoder:
    return Crosscoder(Wiring.strictly_causal(SHAPE), n_features=48, activation=activation, tied=tied, seed=seed)


def unexplained(crosscoder: Crosscoder) -> dict[Site, float]:
    (batch,) = sparse_batches(1, n_rows=2000, seed=9)
    with torch.no_grad():
        outputs = crosscoder(batch, positions=torch.ones(2000, dtype=torch.int64)).reconstructions
    return {
        s: float((batch[s] - y).square().sum() / (batch[s] - batch[s].mean(0)).square().sum())
        for s, y in outputs.items()
    }


@pytest.fixture(scope="module")
def trained() -> tuple[Crosscoder, list[Progress]]:
    log: list[Progress] = []
    config = settings(400, learning_rate=8e-3, dead_after_tokens=10_000)
    return train(clt(TopK(3)), sparse_batches(400), config, progress=log.append), log


def test_training_recovers_the_dictionary(trained: tuple[Crosscoder, list[Progress]]) -> None:
    """Nearly every true feature has one learned feature that writes in its direction, to both layers at once."""
    crosscoder, _ = trained
    _, write_LND = true_dictionary()
    true_NX = torch.cat([write_LND[0], 7 * write_LND[1]], dim=1)
    learned_FX = crosscoder.W_dec[0].flatten(1)
    best_N = torch.cosine_similarity(true_NX[:, None], learned_FX[None], dim=2).max(dim=1).values
    assert float((best_N > 0.95).float().mean()) > 0.9


def test_result_works_on_unscaled_activations(trained: tuple[Crosscoder, list[Progress]]) -> None:
    """Sites differ in scale by 20 and have a mean; the folded crosscoder takes the raw activations."""
    crosscoder, log = trained
    assert not crosscoder.training
    assert max(unexplained(crosscoder).values()) < 0.1
    assert log[-1].unexplained < 0.2 < log[0].unexplained
    assert [report.step for report in log] == list(range(1, 401))


def test_a_trained_crosscoder_continues_where_it_was(trained: tuple[Crosscoder, list[Progress]]) -> None:
    crosscoder = clt(TopK(3))
    crosscoder.load_state_dict(trained[0].state_dict())
    before = max(unexplained(crosscoder).values())
    log: list[Progress] = []
    continued = train(crosscoder, sparse_batches(1), settings(1, learning_rate=1e-9), progress=log.append)
    assert log[0].unexplained < 0.2
    assert max(unexplained(continued).values()) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(
    ("activation", "penalty", "tied"),
    [
        (TopK(3), None, True),
        (BatchTopK(3), None, False),
        (ReLU(), L1OfNorms(1e-2), False),
        (ReLU(), L2OfNorms(1e-2), False),
        (JumpReLU(), Tanh(3e-3), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_activation_and_penalty_learns(activation: Activation, penalty: Penalty | None, tied: bool) -> None:
    log: list[Progress] = []
    config = settings(200, learning_rate=8e-3, losses=[Auxiliary(), *([penalty] if penalty else [])])
    crosscoder = train(clt(activation, tied=tied), sparse_batches(200), config, progress=log.append)
    assert max(unexplained(crosscoder).values()) < 0.35
    assert log[-1].l0 < log[0].l0 + 1e-9


def test_training_is_reproducible_bit_for_bit() -> None:
    config = settings(20, dead_after_tokens=500)
    first, second = (train(clt(TopK(3)), sparse_batches(20), config).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_jumprelu_thresholds_stay_above_zero() -> None:
    """A strong pull of the straight-through estimate; below 0, activations would be negative."""
    crosscoder = clt(JumpReLU())
    config = settings(200, learning_rate=8e-3, losses=[Tanh(3e-3), PreActivation(1e-2)])
    trained = train(crosscoder, sparse_batches(200), config)
    assert trained.threshold is not None
    assert float(trained.threshold.detach().min()) == 0.0
    (batch,) = sparse_batches(1)
    assert float(trained.encode(batch).activation.detach().min()) > 0


def test_autocast_chooses_in_bfloat16_and_computes_in_float32() -> None:
    """The choice may differ in near ties; every value is that of float32."""
    crosscoder = clt(TopK(3))
    (batch,) = sparse_batches(1)
    exact = [crosscoder.pre_activations(batch, group).detach() for group in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        features = crosscoder.encode(batch, positions=torch.ones(256, dtype=torch.int64))
    assert features.activation.dtype == torch.float32
    for group in range(2):
        part = features.of(group)
        expected = exact[group][part.row, part.index]
        torch.testing.assert_close(part.activation.detach(), expected, rtol=1e-4, atol=1e-4)
        best = exact[group].topk(3, dim=1).values.clamp(min=0).sum()
        assert float(expected.sum() / best) == pytest.approx(1, abs=5e-3)
    log: list[Progress] = []
    train(clt(TopK(3)), sparse_batches(100), settings(100, learning_rate=8e-3, autocast=True), progress=log.append)
    assert log[-1].unexplained < 0.4


def test_undecomposed_positions_do_not_stop_training() -> None:
    crosscoder = Crosscoder(
        Wiring.strictly_causal(SHAPE), n_features=48, activation=TopK(3), undecomposed_positions=1, seed=0
    )
    log: list[Progress] = []
    train(crosscoder, sparse_batches(2), settings(2), progress=log.append)
    assert log[0].l0 > 3


def test_the_auxiliary_loss_revives_dead_features() -> None:
    """Features that start far below zero never fire without it."""
    n_dead = []
    for coefficient in (0.0, 1.0):
        crosscoder = clt(TopK(3))
        log: list[Progress] = []
        losses = [Auxiliary(coefficient, k=8)]
        config = settings(150, learning_rate=2e-2, dead_after_tokens=1000, losses=losses)
        train(crosscoder, sparse_batches(150), config, progress=log.append)
        n_dead.append(log[-1].n_dead)
    assert n_dead[1] < n_dead[0]


def state_of(crosscoder: Crosscoder, inputs: dict[Site, Tensor], **options: Any) -> StepState:
    """The state of a step on random targets."""
    features = crosscoder.encode(inputs)
    generator = torch.Generator().manual_seed(5)
    targets = {s: torch.randn(7, 16, dtype=torch.float64, generator=generator) for s in crosscoder.wiring.write_sites}
    defaults: dict[str, Any] = {
        "crosscoder": crosscoder,
        "inputs": inputs,
        "targets": targets,
        "reconstructions": crosscoder.decode(features),
        "features": features,
        "dead_GF": torch.zeros(crosscoder.n_groups, crosscoder.n_features, dtype=torch.bool),
        "variances": {site: torch.tensor(1.0) for site in targets},
        "n_rows": 7,
    }
    return StepState(**defaults | options)


def test_reconstruction_losses_are_fractions_of_variance(random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(Wiring.strictly_causal(SHAPE))
    state = state_of(crosscoder, random_inputs(crosscoder.wiring))
    state.variances = {site: (y - y.mean(0)).square().sum(1).mean() for site, y in state.targets.items()}
    state.reconstructions = {site: y.mean(0).expand(7, 16) for site, y in state.targets.items()}
    assert [float(loss) for loss in reconstruction_losses(state).values()] == pytest.approx([1, 1])
    state.reconstructions = state.targets
    assert [float(loss) for loss in reconstruction_losses(state).values()] == [0, 0]


def test_reconstruction_losses_keep_nothing_of_their_own_for_the_backward_pass(
    random_crosscoder: Any, random_inputs: Any
) -> None:
    """Targets and reconstructions are in memory anyway; a difference would come on top, when memory peaks."""
    crosscoder = random_crosscoder(Wiring.strictly_causal(SHAPE))
    state = state_of(crosscoder, random_inputs(crosscoder.wiring))
    known = {x.data_ptr() for x in (*state.targets.values(), *state.reconstructions.values())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        reconstruction_losses(state)
    assert {x.data_ptr() for x in kept if x.dim()} == known


@pytest.mark.parametrize(
    ("penalty", "formula"),
    [
        (L1OfNorms(0.5), lambda a, n: a @ n.sum(1)),
        (L2OfNorms(0.5), lambda a, n: a @ n.square().sum(1).sqrt()),
        (Tanh(0.5, c=3.0), lambda a, n: torch.tanh(3 * a * n.square().sum(1).sqrt()).sum()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_penalties_equal_their_dense_formula(
    penalty: Penalty, formula: Callable[[Tensor, Tensor], Tensor], random_crosscoder: Any, random_inputs: Any
) -> None:
    crosscoder = random_crosscoder(Wiring.strictly_causal(SHAPE))
    state = state_of(crosscoder, random_inputs(crosscoder.wiring))
    expected = sum(
        formula(acts_F, crosscoder.W_dec[group].norm(dim=2))
        for group in range(2)
        for acts_F in state.features.dense(group)
    )
    torch.testing.assert_close(penalty(state), 0.5 * expected / 7)


@pytest.mark.parametrize("family", ["strictly_causal", "weakly_causal", "acausal"])
def test_the_distance_penalty_equals_its_dense_formula(family: str, random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(getattr(Wiring, family)(SHAPE), activation=ReLU())
    state, expected = state_of(crosscoder, random_inputs(crosscoder.wiring)), torch.zeros((), dtype=torch.float64)
    for group, sites in enumerate(crosscoder.wiring.writes):
        for acts_F in state.features.dense(group):
            for site in sites:
                distance = site.layer - (0 if family == "acausal" else group)
                expected = expected + distance * acts_F @ crosscoder.decoder(group, site).norm(dim=1)
    assert float(expected.detach()) > 0
    torch.testing.assert_close(Distance(0.5)(state), 0.5 * expected / 7)


@pytest.mark.parametrize("wiring", [Wiring.per_layer(SHAPE), Wiring.model_diffing(SHAPE, layer=1)])
def test_the_distance_penalty_needs_later_layers(wiring: Wiring, random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(wiring)
    with pytest.raises(ValueError, match=f"needs features that write to later layers, not the wiring {wiring.name}"):
        Distance(0.5)(state_of(crosscoder, random_inputs(crosscoder.wiring)))


def test_the_preactivation_penalty_equals_its_dense_formula(random_crosscoder: Any, random_inputs: Any) -> None:
    """Rows 0 and 4 of seven are looked at, and stand for four each."""
    crosscoder = random_crosscoder(Wiring.strictly_causal(SHAPE), activation=JumpReLU())
    inputs = random_inputs(crosscoder.wiring)
    expected = sum(
        (crosscoder.threshold[group] - crosscoder.pre_activations(inputs, group)[[0, 4]]).relu().sum(0)
        @ crosscoder.W_dec[group].flatten(1).norm(dim=1)
        for group in range(2)
    )
    torch.testing.assert_close(PreActivation(0.5)(state_of(crosscoder, inputs)), 0.5 * 4 * expected / 7)


def test_the_auxiliary_loss_equals_its_dense_formula(random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(Wiring.per_layer(SHAPE))
    inputs = random_inputs(crosscoder.wiring)
    dead_GF = torch.zeros(2, 16, dtype=torch.bool)
    dead_GF[0, [1, 5, 6, 9]] = True  # group 1 has none
    state = state_of(crosscoder, inputs, dead_GF=dead_GF)
    pre_BN = crosscoder.pre_activations(inputs, 0)[[0, 4]][:, dead_GF[0]]
    acts_BN = pre_BN.relu() * (pre_BN >= pre_BN.topk(2, dim=1).values[:, -1:])
    site = Site(0, "mlp_out")
    error_BD = (state.targets[site] - state.reconstructions[site].detach())[[0, 4]]
    left_BD = error_BD - acts_BN @ crosscoder.decoder(0, site)[dead_GF[0]]
    expected = 0.5 * left_BD.square().sum() / error_BD.square().sum()
    actual = Auxiliary(0.5, k=2)(state)
    torch.testing.assert_close(actual, expected)
    for weight in (crosscoder.W_enc[0], crosscoder.b_enc[0], crosscoder.W_dec[0]):
        grads = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*grads)


def test_the_loss_of_the_strongest_features_equals_its_dense_formula(
    random_crosscoder: Any, random_inputs: Any
) -> None:
    crosscoder = random_crosscoder(Wiring.strictly_causal(SHAPE))
    state = state_of(crosscoder, random_inputs(crosscoder.wiring))
    expected = torch.zeros((), dtype=torch.float64)
    for site, target_BD in state.targets.items():
        y_BD = crosscoder.b_dec[crosscoder.wiring.write_sites.index(site)].expand(7, -1)
        for group, k in enumerate((3, 1)):
            acts_BF = state.features.dense(group)
            strength_BF = acts_BF * crosscoder.W_dec[group].flatten(1).norm(dim=1)
            kept_BF = acts_BF * (strength_BF >= strength_BF.topk(k, dim=1).values[:, -1:])
            if site in crosscoder.wiring.writes[group]:
                y_BD = y_BD + kept_BF @ crosscoder.decoder(group, site)
        expected = expected + 0.5 * (target_BD - y_BD).square().sum() / 7 / len(state.targets)
    actual = Strongest(0.5, k=(3, 1))(state)
    torch.testing.assert_close(actual, expected)
    for weight in (crosscoder.W_enc[1], crosscoder.b_enc[0], *crosscoder.W_dec):
        grads = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*grads)
    everything = Strongest(2.0, k=16)(state)
    torch.testing.assert_close(everything, 2 * torch.stack([*reconstruction_losses(state).values()]).mean())
    nothing = torch.stack(
        [(y - b).square().sum() / 7 for y, b in zip(state.targets.values(), crosscoder.b_dec, strict=True)]
    )
    torch.testing.assert_close(Strongest(1.0, k=0)(state), nothing.mean())
    with pytest.raises(ValueError, match="one for each of 2 groups, got \\(1, 2, 3\\)"):
        Strongest(k=(1, 2, 3))(state)
    with pytest.raises(ValueError, match="strongest k must be 0 or more, got -1"):
        Strongest(k=-1)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = settings(100, learning_rate=2.0, warmup_fraction=0.09, decay_fraction=0.5)
    rates = [config.peak_learning_rate(1) * config.learning_rate_factor(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:51] == [2.0] * 42
    assert rates[75] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.04)
    constant = settings(10, warmup_fraction=0.0, decay_fraction=0.0)
    assert {constant.learning_rate_factor(step) for step in range(10)} == {1.0}


def test_sparsity_penalties_ramp() -> None:
    config = settings(10, sparsity_warmup=0.5)
    assert [config.sparsity_weight_at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1, 1])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_tokens": 0}, "n_tokens must be 1 or more, got 0"),
        ({"n_tokens": 100, "batch_tokens": 4096}, "n_tokens=100 is less than one batch of 4096"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"warmup_fraction": -1.0}, "warmup_fraction must lie between 0 and 1, got -1.0"),
        ({"decay_fraction": 1.5}, "decay_fraction must lie between 0 and 1, got 1.5"),
        ({"reads": "dirty"}, "reads must be one of clean, propagated, subset, one, got 'dirty'"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingConfig(**{"n_tokens": 8192} | setting)


def broken(change: Callable[[dict[Site, Tensor]], object]) -> list[dict[Site, Tensor]]:
    batches = list(sparse_batches(2))
    change(batches[1])
    return batches


@pytest.mark.parametrize(
    ("batches", "scale_batches", "message"),
    [
        ([], 1, "no batches to train on: the iterator is empty"),
        (list(sparse_batches(1)), 1, "the batches ran out after 1 of 2 steps"),
        (broken(lambda b: b.pop(Site(1, "mlp_out"))), 2, "but the crosscoder needs mlp_out.1"),
        (broken(lambda b: b.pop(Site(1, "mlp_out"))), 1, "but the crosscoder needs mlp_out.1"),
        (broken(lambda b: b[Site(0, "mlp_out")].fill_(math.nan)), 2, "mlp_out.0 have mean norm nan"),
        (broken(lambda b: b[Site(0, "mlp_out")].fill_(math.nan)), 1, "the loss is nan at step 1"),
    ],
    ids=["empty", "short", "site at start", "site later", "nan at start", "nan later"],
)
def test_bad_batches_are_refused(
    batches: list[dict[Site, Tensor]], scale_batches: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SCALE_BATCHES", scale_batches)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(clt(TopK(3)), batches, settings(2))


def test_activations_of_published_crosscoders_are_not_trained() -> None:
    message = "with the activation {'name': 'topk', 'k': 3, 'relu': False}: it can only be read"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(clt(TopK(3, relu=False)), list(sparse_batches(2)), settings(2))


def test_dead_features_are_told_apart_from_silent_zeros() -> None:
    """JumpReLU training keeps zero-valued features in the table; they have not fired."""
    silent_GF = torch.zeros(1, 2, dtype=torch.int64)
    acts_GBF = torch.tensor([[[1.0, 2.0]]])
    features = Features.from_dense(acts_GBF).replace_activations(torch.tensor([0.0, 2.0]))
    assert trainer._count_silence(silent_GF, features, 1).tolist() == [[1, 0]]
