"""Training recovers a known sparse dictionary, is reproducible, and its losses equal their formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from replacement.activation import Activation, BatchTopK, JumpReLU, ReLU, TopK
from replacement.crosscoder import Crosscoder
from replacement.features import Features
from replacement.sites import ModelShape, Site
from replacement.training import L1OfNorms, L2OfNorms, Penalty, Progress, Tanh, TrainingConfig, train
from replacement.training.losses import auxiliary_loss, reconstruction_loss
from replacement.wiring import Wiring

SHAPE = ModelShape(n_layers=2, d_model=16, n_heads=1, d_head=16)
N_TRUE = 24


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
    config = TrainingConfig(n_steps=400, learning_rate=8e-3, warmup_steps=20, dead_after_tokens=10_000)
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
    train(crosscoder, sparse_batches(1), TrainingConfig(n_steps=1, learning_rate=1e-9), progress=log.append)
    assert log[0].unexplained < 0.2
    assert max(unexplained(crosscoder).values()) == pytest.approx(before, rel=1e-3)


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
    config = TrainingConfig(n_steps=200, learning_rate=8e-3, warmup_steps=20, penalty=penalty)
    crosscoder = train(clt(activation, tied=tied), sparse_batches(200), config, progress=log.append)
    assert max(unexplained(crosscoder).values()) < 0.35
    assert log[-1].l0 < log[0].l0 + 1e-9


def test_training_is_reproducible_bit_for_bit() -> None:
    config = TrainingConfig(n_steps=20, dead_after_tokens=500)
    first, second = (train(clt(TopK(3)), sparse_batches(20), config).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_undecomposed_positions_do_not_stop_training() -> None:
    crosscoder = Crosscoder(
        Wiring.strictly_causal(SHAPE), n_features=48, activation=TopK(3), undecomposed_positions=1, seed=0
    )
    log: list[Progress] = []
    train(crosscoder, sparse_batches(2), TrainingConfig(n_steps=2), progress=log.append)
    assert log[0].l0 > 3


def test_the_auxiliary_loss_revives_dead_features() -> None:
    """Features that start far below zero never fire without it."""
    n_dead = []
    for coefficient in (0.0, 1.0):
        crosscoder = clt(TopK(3))
        log: list[Progress] = []
        config = TrainingConfig(
            n_steps=150, learning_rate=2e-2, dead_after_tokens=1000, auxiliary_coefficient=coefficient, auxiliary_k=8
        )
        train(crosscoder, sparse_batches(150), config, progress=log.append)
        n_dead.append(log[-1].n_dead)
    assert n_dead[1] < n_dead[0]


def test_reconstruction_loss_is_the_sum_of_fractions() -> None:
    sites = [Site(0, "mlp_out"), Site(1, "mlp_out")]
    targets = {site: torch.randn(5, 4, generator=torch.Generator().manual_seed(site.layer)) for site in sites}
    variances = {site: (y - y.mean(0)).square().sum(1).mean() for site, y in targets.items()}
    means = {site: y.mean(0).expand(5, 4) for site, y in targets.items()}
    assert float(reconstruction_loss(targets, means, variances)) == pytest.approx(2, rel=1e-6)
    assert float(reconstruction_loss(targets, targets, variances)) == 0


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
    features = crosscoder.encode(random_inputs(crosscoder.wiring))
    expected = sum(
        formula(acts_F, crosscoder.W_dec[group].norm(dim=2)) for group in range(2) for acts_F in features.dense(group)
    )
    torch.testing.assert_close(penalty(crosscoder, features), 0.5 * expected / 7)


def test_auxiliary_loss_equals_its_dense_formula(random_crosscoder: Any, random_inputs: Any) -> None:
    crosscoder = random_crosscoder(Wiring.per_layer(SHAPE))
    inputs = random_inputs(crosscoder.wiring)
    errors = {site: torch.randn(7, 16, dtype=torch.float64) for site in crosscoder.wiring.write_sites}
    dead_GF = torch.zeros(2, 16, dtype=torch.bool)
    dead_GF[0, [1, 5, 6, 9]] = True  # group 1 has none
    pre_BN = crosscoder.pre_activations(inputs, 0)[:, dead_GF[0]]
    acts_BN = pre_BN.relu() * (pre_BN >= pre_BN.topk(2, dim=1).values[:, -1:])
    site = Site(0, "mlp_out")
    left_BD = errors[site] - acts_BN @ crosscoder.decoder(0, site)[dead_GF[0]]
    expected = left_BD.square().sum() / errors[site].square().sum()
    actual = auxiliary_loss(crosscoder, inputs, errors, dead_GF, k=2)
    torch.testing.assert_close(actual, expected)
    for weight in (crosscoder.W_enc[0], crosscoder.b_enc[0], crosscoder.W_dec[0]):
        grads = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*grads)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainingConfig(n_steps=100, learning_rate=2.0, warmup_steps=9, decay_fraction=0.5)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:51] == [2.0] * 42
    assert rates[75] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.04)
    constant = TrainingConfig(n_steps=10, warmup_steps=0, decay_fraction=0.0)
    assert {constant.learning_rate_at(step) for step in range(10)} == {constant.learning_rate}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_steps": 0}, "n_steps must be 1 or more, got 0"),
        ({"n_steps": 1, "learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"n_steps": 1, "warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"n_steps": 1, "decay_fraction": 1.5}, "decay_fraction must lie between 0 and 1, got 1.5"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingConfig(**setting)


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
def test_bad_batches_are_refused(batches: list[dict[Site, Tensor]], scale_batches: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(clt(TopK(3)), batches, TrainingConfig(n_steps=2, scale_batches=scale_batches))


def test_dead_features_are_told_apart_from_silent_zeros() -> None:
    """JumpReLU training keeps zero-valued features in the table; they have not fired."""
    from replacement.training.trainer import _count_silence

    silent_GF = torch.zeros(1, 2, dtype=torch.int64)
    acts_GBF = torch.tensor([[[1.0, 2.0]]])
    features = Features.from_dense(acts_GBF).replace_activations(torch.tensor([0.0, 2.0]))
    _count_silence(silent_GF, features)
    assert silent_GF.tolist() == [[1, 0]]
