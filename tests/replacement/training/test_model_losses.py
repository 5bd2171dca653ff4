"""Losses that look at the language model: output divergence and Jacobians, against dense autograd in fp64."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from replacement import BatchTopK, Crosscoder, JumpReLU, ReLU, Site, TopK, Wiring
from replacement.splicing.splice import read_rows
from replacement.training.config import TrainingConfig
from replacement.training.losses import StepState
from replacement.training.model_losses import JacobianMatching, OutputKL, directions
from replacement.training.reads import RowsRead
from replacement.training.run_config import run_config
from replacement.training.scaling import measure
from replacement.training.trainer import Trainer


def prompts() -> Tensor:
    """A batch of random prompts."""
    return torch.stack([tiny.random_tokens(length=6, seed=seed) for seed in range(3)])


def state_of(
    lm: Any,
    crosscoder: Crosscoder,
    *,
    scales: dict[Site, float] | None = None,
    keep: Tensor | None = None,
    **options: Any,
) -> StepState:
    """The state of a training step on whole rows, in scaled activations."""
    scales, wiring = scales or {}, crosscoder.wiring
    keep = torch.ones(3, 6, dtype=torch.bool) if keep is None else keep
    rows = read_rows(lm, prompts(), {*wiring.read_sites, *wiring.write_sites})[1]
    scaled = {site: x[keep.flatten()] * scales.get(site, 1.0) for site, x in rows.items()}
    inputs = {site: scaled[site] for site in wiring.read_sites}
    reconstructions, features = crosscoder(inputs)
    return StepState(
        crosscoder=crosscoder,
        inputs=inputs,
        targets={site: scaled[site] for site in wiring.write_sites},
        reconstructions=reconstructions,
        features=features,
        dead_GF=torch.zeros(crosscoder.n_groups, crosscoder.n_features, dtype=torch.bool),
        variances={},
        scales=scales,
        n_rows=int(keep.sum()),
        language_model=lm,
        tokens_RT=prompts(),
        keep_RT=keep,
        **options,
    )


def gradients(crosscoder: Crosscoder, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every weight; zeros where there is none."""
    crosscoder.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in crosscoder.named_parameters()
    }


def assert_same_gradients(crosscoder: Crosscoder, ours: Tensor, theirs: Tensor) -> None:
    """Equal values and equal gradients to every weight."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    expected = gradients(crosscoder, theirs)
    for name, gradient in gradients(crosscoder, ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


# Output ---------------------------------------------------------------------------------------------------------


def test_output_kl_and_its_gradient_equal_dense_hooks(language_model: Any) -> None:
    """Oracle: a dense skip transcoder written into one hook, with the scales by hand, and torch's own KL."""
    lm = language_model("gpt2", torch.float64)
    wiring = Wiring.transcoder(lm, layer=1)
    read, write = wiring.read_sites[0], wiring.write_sites[0]
    crosscoder = tiny.crosscoder_for(lm, wiring=wiring, activation=ReLU(), skip=True).train()
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[0, 4:] = False
    scales = {read: 2.0, write: 0.5}
    seen: dict[str, Tensor] = {}

    def replace(y: Tensor) -> Tensor:
        x = seen["x"] * scales[read]
        acts = (x @ crosscoder.W_enc[0].T + crosscoder.b_enc[0]).relu()
        y_hat = acts @ crosscoder.W_dec[0][:, 0] + crosscoder.b_dec[0] + x @ crosscoder.W_skip[0].T
        return torch.where(keep[:, :, None], y_hat / scales[write], y)

    spliced = lm.run(prompts(), {read: lambda x: seen.update(x=x), write: replace})
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (lm(prompts()), spliced))
    expected = 0.3 * torch.distributions.kl_divergence(p, q)[keep].mean()
    ours = OutputKL(0.3)(state_of(lm, crosscoder, scales=scales, keep=keep))
    assert float(ours.detach()) > 1e-3
    assert_same_gradients(crosscoder, ours, expected)


def test_the_gradient_of_output_kl_reaches_every_layer_through_the_model(language_model: Any) -> None:
    """Finite differences through the whole spliced model, along the gradient, for every weight of a CLT."""
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm, activation=ReLU()).train()
    loss = OutputKL(1.0)
    gradient = gradients(crosscoder, loss(state_of(lm, crosscoder)))
    with torch.no_grad():
        for name, parameter in crosscoder.named_parameters():
            step = 1e-5 * gradient[name] / gradient[name].norm()
            values = []
            for sign in (1, -1):
                parameter += sign * step
                values.append(float(loss(state_of(lm, crosscoder))))
                parameter -= sign * step
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(float(gradient[name].norm()), rel=1e-3)


def test_output_kl_needs_rows_of_one_model(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    state = state_of(lm, tiny.crosscoder_for(lm))
    state.tokens_RT = None
    with pytest.raises(ValueError, match="the loss output_kl needs the language model and whole rows of tokens"):
        OutputKL(1.0)(state)
    with pytest.raises(ValueError, match="spliced with reads='clean' only"):
        OutputKL(1.0)(state_of(lm, tiny.crosscoder_for(lm, wiring=Wiring.acausal(lm))))
    with pytest.raises(ValueError, match="the coefficient of output_kl must be 0 or more and finite, got -1"):
        OutputKL(-1.0)


# Jacobians ------------------------------------------------------------------------------------------------------


def row_jacobians(function: Any, x_BD: Tensor, *, create_graph: bool = False) -> Tensor:
    """`[B, D_out, D_in]`, one row at a time."""
    return torch.stack([jacobian(lambda x: function(x[None])[0], x, create_graph=create_graph) for x in x_BD])


def dense_group(crosscoder: Crosscoder, group: int, read: Site, write: Site, x_BD: Tensor) -> Tensor:
    """What one ReLU or JumpReLU group that reads one site writes, dense."""
    pre = x_BD @ crosscoder.encoder(group, read).T + crosscoder.b_enc[group]
    threshold = 0.0 if crosscoder.threshold is None else crosscoder.threshold[group].detach()
    y_BD = (pre * (pre > threshold)) @ crosscoder.decoder(group, write)
    return y_BD + x_BD @ crosscoder.skip_matrix(group, read, write).T if crosscoder.skip else y_BD


@pytest.mark.parametrize("read", ["mlp_in", "resid_mid"])
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(threshold=0.3, bandwidth=0.5)], ids=["relu", "jumprelu"])
def test_the_jacobian_loss_equals_autograd(language_model: Any, read: str, activation: Any) -> None:
    lm = language_model("gemma2", torch.float64)
    wiring = Wiring.strictly_causal(lm, read=read)
    crosscoder = tiny.crosscoder_for(lm, wiring=wiring, activation=activation, skip=True).train()
    scales = {site: 1.0 + site.layer for site in (*wiring.read_sites, *wiring.write_sites)}
    state = state_of(lm, crosscoder, scales=scales, step=5, seed=2)
    v_BD = directions(state, 32)
    expected = torch.zeros((), dtype=torch.float64)
    for layer in range(3):
        site, write = Site(layer, read), Site(layer, "mlp_out")
        x_BD = state.inputs[site]
        original = lm.parts.mlp_map(layer, read)
        ours = row_jacobians(lambda x, a=(layer, site, write): dense_group(crosscoder, *a, x), x_BD, create_graph=True)
        # Both scales are equal at one layer, so they cancel in the original's Jacobian.
        theirs = row_jacobians(original, x_BD / scales[site])
        target = torch.einsum("boi,bi->bo", theirs, v_BD)
        missed = target - torch.einsum("boi,bi->bo", ours, v_BD)
        expected = expected + missed.square().sum() / target.square().sum()
    loss = JacobianMatching(0.7)(state)
    assert float(loss.detach()) > 0.1
    assert_same_gradients(crosscoder, loss, 0.7 * expected)


def test_its_mean_over_directions_is_the_missed_share_of_the_jacobian(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    wiring = Wiring.transcoder(lm, layer=1, read="mlp_in")
    read, write = wiring.read_sites[0], wiring.write_sites[0]
    crosscoder = tiny.crosscoder_for(lm, wiring=wiring, activation=ReLU())
    x_BD = state_of(lm, crosscoder).inputs[read]
    theirs = row_jacobians(lm.parts.mlp_map(1, "mlp_in"), x_BD)
    ours = row_jacobians(lambda x: dense_group(crosscoder, 0, read, write, x), x_BD)
    share = float((theirs - ours).square().sum() / theirs.square().sum())
    state, losses = state_of(lm, crosscoder), []
    for state.step in range(200):
        with torch.no_grad():
            losses.append(float(JacobianMatching(1.0)(state)))
    assert sum(losses) / 200 == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_models_map_gives_its_own_mlp_output(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    stream = "resid_pre" if lm.shape.parallel else "resid_mid"
    for kind in ("mlp_in", stream):
        read, write = Site(1, kind), Site(1, "mlp_out")
        acts = lm.read(tiny.random_tokens(), [read, write])
        torch.testing.assert_close(lm.parts.mlp_map(1, kind)(acts[read]), acts[write], rtol=0, atol=1e-11)
    state = state_of(lm, tiny.crosscoder_for(lm, activation=ReLU()))
    assert 0.1 < float(JacobianMatching(1.0)(state).detach()) < 1e3
    with pytest.raises(
        ValueError, match=f"a function of mlp_in, mlp_normalized or {stream} at each position, not of attn_out"
    ):
        lm.parts.mlp_map(1, "attn_out")


def test_folding_scales_changes_nothing(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    wiring = Wiring.per_layer(lm)
    scales = {site: 0.5 + site.layer + site.point / 10 for site in (*wiring.read_sites, *wiring.write_sites)}
    scaled, folded = (tiny.crosscoder_for(lm, wiring=wiring, activation=TopK(5), skip=True) for _ in range(2))
    folded.fold_input_scale(
        {site: scales[site] for site in wiring.read_sites}, {site: scales[site] for site in wiring.write_sites}
    )
    ours = JacobianMatching(1.0)(state_of(lm, scaled, scales=scales))
    torch.testing.assert_close(ours, JacobianMatching(1.0)(state_of(lm, folded)), rtol=1e-9, atol=0)


def test_given_maps_take_the_place_of_the_models(language_model: Any) -> None:
    """A linear map that the skip matrix holds is matched exactly, though no feature writes anything."""
    lm = language_model("gpt2", torch.float64)
    read, write = Site(0, "attn_out"), Site(1, "resid_pre")
    wiring = Wiring("linear", ((read,),), ((write,),), {"attn_out": 32, "resid_pre": 32})
    crosscoder = tiny.crosscoder_for(lm, wiring=wiring, skip=True)
    with torch.no_grad():
        crosscoder.W_dec[0].zero_()
    state = state_of(lm, crosscoder)
    state.language_model = None
    matrix = crosscoder.W_skip[0].detach()
    assert float(JacobianMatching(1.0, maps={(read, write): lambda x: x @ matrix.T})(state).detach()) < 1e-25
    doubled = JacobianMatching(1.0, maps={(read, write): lambda x: 2 * x @ matrix.T})(state)
    assert float(doubled.detach()) == pytest.approx(0.25, rel=1e-9)


def test_directions_depend_on_seed_and_step_alone(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.crosscoder_for(lm)
    first = directions(state_of(lm, crosscoder, step=3, seed=1), 32)
    torch.manual_seed(123)
    torch.testing.assert_close(directions(state_of(lm, crosscoder, step=3, seed=1), 32), first, rtol=0, atol=0)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(18, dtype=torch.float64))
    assert bool((first[0] != first[1]).any())
    for other in ({"step": 4, "seed": 1}, {"step": 3, "seed": 2}):
        assert bool((directions(state_of(lm, crosscoder, **other), 32) != first).any())


@pytest.mark.parametrize("counts", [(18,), (10, 8), (1, 4, 0, 13)], ids=str)
def test_processes_with_different_numbers_of_rows_share_the_directions_of_the_batch(
    language_model: Any, counts: tuple[int, ...]
) -> None:
    lm = language_model("gpt2", torch.float64)
    whole = state_of(lm, tiny.crosscoder_for(lm), step=3, seed=1)
    parts, before = [], 0
    for count in counts:
        inputs = {site: x_BD[before : before + count] for site, x_BD in whole.inputs.items()}
        parts.append(directions(replace(whole, inputs=inputs, rows_before=before), 32))
        before += count
    assert [len(v_BD) for v_BD in parts] == list(counts)
    torch.testing.assert_close(torch.cat(parts), directions(whole, 32), rtol=0, atol=0)


def test_jacobians_that_are_not_known(language_model: Any) -> None:
    lm = language_model("gpt2", torch.float64)
    state = state_of(lm, tiny.crosscoder_for(lm, wiring=Wiring.autoencoder(lm, layers=1)))
    with pytest.raises(ValueError, match=re.escape("writes its output, not one that reads resid_post.1; or give maps")):
        JacobianMatching(1.0)(state)
    state = state_of(lm, tiny.crosscoder_for(lm))
    state.language_model = None
    with pytest.raises(ValueError, match="the loss jacobian needs the language model in every step, or maps"):
        JacobianMatching(1.0)(state)
    assert JacobianMatching(0.5).to_dict() == {"name": "jacobian", "coefficient": 0.5}


def test_it_unlearns_a_memorised_point() -> None:
    """`y = |x|` on four points, reconstructed exactly by features one of which fires on a single point, far too steeply.

    Reconstruction has nothing to object: its gradient is 0. The Jacobian term removes the memorised point.
    """
    read, write = Site(0, "mlp_in"), Site(0, "mlp_out")
    wiring = Wiring("toy", ((read,),), ((write,),), {"mlp_in": 1, "mlp_out": 1})
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
    crosscoder = Crosscoder(wiring, n_features=3, activation=ReLU(), dtype=torch.float64)
    with torch.no_grad():
        crosscoder.W_enc[0].copy_(torch.tensor([[-1.0], [0.5], [10.0]]))
        crosscoder.b_enc[0].copy_(torch.tensor([0.0, 0.5, -19.0]))
        crosscoder.W_dec[0][:, 0, 0] = torch.tensor([1.0, 1.0, 0.5])
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=0.03)
    loss = JacobianMatching(1.0, maps={(read, write): torch.abs})
    for step in range(150):
        reconstructions, features = crosscoder({read: x})
        missed = (reconstructions[write] - x.abs()).square().mean()
        state = StepState(
            crosscoder=crosscoder,
            inputs={read: x},
            targets={write: x.abs()},
            reconstructions=reconstructions,
            features=features,
            dead_GF=torch.zeros(1, 3, dtype=torch.bool),
            variances={},
            n_rows=4,
            step=step,
        )
        if step == 0:
            assert max(float(gradient.abs().max()) for gradient in gradients(crosscoder, missed).values()) < 1e-12
            missed = (crosscoder({read: x}).reconstructions[write] - x.abs()).square().mean()
        optimizer.zero_grad()
        (missed + loss(state)).backward()
        optimizer.step()
    slope = float((crosscoder.W_enc[0][2] * crosscoder.W_dec[0][2, 0]).detach().abs())
    assert slope < 0.5  # from 5
    assert float(missed.detach()) < 1e-2


@pytest.mark.parametrize("loss", [OutputKL(0.5), JacobianMatching(0.25)])
def test_configuration_files_know_them(loss: Any) -> None:
    config = run_config({"training": {"n_tokens": 4096, "losses": [loss.to_dict()]}})
    assert config.training.losses == [loss]


@pytest.mark.parametrize("loss", [OutputKL(3.0), JacobianMatching(1.0)])
def test_training_lowers_them_and_resumes_exactly(language_model: Any, loss: Any) -> None:
    lm = language_model("gpt2")
    keep = torch.ones(3, 6, dtype=torch.bool)
    rows = RowsRead(prompts(), keep)

    def trainer() -> Trainer:
        crosscoder = Crosscoder(Wiring.strictly_causal(lm), n_features=32, activation=BatchTopK(6), seed=0)
        config = TrainingConfig(n_tokens=60 * 18, batch_tokens=18, learning_rate=1e-2, losses=[loss])
        return Trainer(crosscoder, config, measure(crosscoder, [batch]), language_model=lm)

    batch = read_rows(lm, prompts(), [Site(layer, kind) for layer in range(3) for kind in ("resid_mid", "mlp_out")])[1]
    straight = trainer()
    values = [straight.step(batch, rows=rows).terms[loss.name] for _ in range(60)]
    assert values[-1] < 0.9 * values[0]
    resumed = trainer()
    first = [resumed.step(batch, rows=rows).terms[loss.name] for _ in range(30)]
    state = {name: value.clone() for name, value in resumed.state_tensors().items()}
    again = trainer()
    for name, value in again.state_tensors().items():
        value.copy_(state[name])
    again.restore(state, 30)
    assert first + [again.step(batch, rows=rows).terms[loss.name] for _ in range(30)] == values
