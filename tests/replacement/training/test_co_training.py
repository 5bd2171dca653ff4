"""A language model trained with its crosscoder: against plain loops, dense autograd, and itself after a kill."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
import training_runs
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

import circuits
import replacement
from replacement import Crosscoder, LanguageModel, ReLU, Site, TopK, Wiring
from replacement.training.co_training import CoTrainer, begin_co_training, steps_of_both
from replacement.training.config import LanguageModelConfig, TrainingConfig
from replacement.training.metrics_log import read_metrics
from replacement.training.optimizers import warmup_and_cosine
from replacement.training.parallel import SINGLE, Parallel
from replacement.training.reads import RowsRead, replaced_sites
from replacement.training.run_config import run_config
from replacement.training.runs import Interrupted, run
from replacement.training.scaling import Statistics, measure

N_STEPS = 6
WEIGHTS = (Path("language_model") / "model.safetensors", Path("crosscoder") / "crosscoder.safetensors")


def rows_of(step: int) -> RowsRead:
    """Rows that begin with a special token, which no crosscoder is trained on."""
    tokens_RT = torch.stack([tiny.random_tokens(8, seed=10 * step + row) for row in range(4)])
    tokens_RT[:, 0] = 1
    return RowsRead(tokens_RT, tokens_RT != 1)


def statistics_of(lm: LanguageModel, crosscoder: Crosscoder) -> Statistics:
    sites = {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites}
    batch = {site: x_RTD.flatten(0, 1) for site, x_RTD in lm.read(rows_of(99).tokens_RT, sites).items()}
    return measure(crosscoder, [batch])


def co_trainer(lm: LanguageModel, *, activation: Any = None, n_steps: int = N_STEPS, **settings: Any) -> CoTrainer:
    """A trainer of a random CLT and the model."""
    crosscoder = tiny.crosscoder_for(lm, activation=activation or TopK(5), undecomposed_positions=1)
    config = TrainingConfig(n_tokens=32 * n_steps, batch_tokens=32, losses=[], learning_rate=1e-2)
    return CoTrainer(
        crosscoder,
        config,
        statistics_of(lm, crosscoder),
        settings=LanguageModelConfig(**settings),
        language_model=lm,
    )


@pytest.fixture
def load(model_folder: Callable[[str], Path]) -> Callable[..., LanguageModel]:
    """A tiny GPT-2 of the test's own, to be changed."""
    return lambda dtype=torch.float32: LanguageModel.from_pretrained(model_folder("gpt2"), dtype=dtype)


# The language model alone ---------------------------------------------------------------------------------------------


def loss_of(logits_RTV: Tensor, tokens_RT: Tensor) -> Tensor:
    return functional.cross_entropy(logits_RTV[:, :-1].flatten(0, 1), tokens_RT[:, 1:].flatten(), reduction="none")


def train_alone(parameters: list[Any], forward: Callable[[Tensor], Tensor]) -> None:
    """A language model without any crosscoder, in a loop of its own."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in range(N_STEPS):
        for group in optimizer.param_groups:
            share = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / N_STEPS))
            group["lr"] = 3e-3 * share
        tokens_RT = rows_of(step).tokens_RT
        losses_N = loss_of(forward(tokens_RT), tokens_RT)
        (losses_N.sum() / len(losses_N)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("replaced", [True, False])
def test_with_coefficients_of_0_the_language_model_is_the_one_trained_alone(
    load: Callable[..., LanguageModel], replaced: bool
) -> None:
    """Bit for bit, while the crosscoder learns."""
    lm, alone = load(), load()
    trainer = co_trainer(lm, learning_rate=3e-3)
    before = trainer.crosscoder.W_dec[0].detach().clone()
    for step in range(N_STEPS):
        trainer.step_on_rows(rows_of(step), replaced=trainer.crosscoder.wiring.write_sites if replaced else ())
    assert not torch.equal(before, trainer.crosscoder.W_dec[0])
    module = alone.parts.bridge.original_model.requires_grad_(True)
    fused = [p for name, p in module.named_parameters() if "qkv" not in name]  # the parts of these are trained
    train_alone(fused, lambda tokens: alone.run(tokens, {}))
    ours = dict(lm.parts.bridge.original_model.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in module.named_parameters())


def test_it_is_the_hugging_face_model_trained_alone(
    load: Callable[..., LanguageModel], model_folder: Callable[[str], Path]
) -> None:
    """In float64, where TransformerLens and transformers add up in another order."""
    trainer = co_trainer(load(torch.float64), learning_rate=3e-3)
    for step in range(N_STEPS):
        trainer.step_on_rows(rows_of(step), replaced=())
    model = transformers.GPT2LMHeadModel.from_pretrained(model_folder("gpt2"), dtype=torch.float64).eval()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_alone(list(model.parameters()), lambda tokens: model(tokens).logits)
    state = trainer.state_tensors()
    for name, parameter in model.named_parameters():
        assert float((parameter - start[name]).detach().abs().max()) > 1e-3, name
        torch.testing.assert_close(state[f"language_model.{name}"], parameter.detach(), rtol=0, atol=1e-9)


# The joint loss -------------------------------------------------------------------------------------------------------


def dense_hooks(crosscoder: Crosscoder, statistics: Statistics, replaced: Any, keep_RT: Tensor) -> tuple[Any, Any]:
    """A dense ReLU CLT as hooks; and what each layer read and made of it."""
    wiring, scales = crosscoder.wiring, statistics.scales
    inputs: dict[Site, Tensor] = {}
    made: dict[Site, Tensor] = {}

    def read(site: Site) -> Any:
        return lambda x_RTD: inputs.update({site: x_RTD})

    def write(site: Site) -> Any:
        def hook(y_RTD: Tensor) -> Tensor | None:
            total = crosscoder.decoder_bias(site)
            for group in range(wiring.n_groups):
                if site in wiring.writes[group]:
                    x_RTD = inputs[wiring.reads[group][0]] * scales[wiring.reads[group][0]]
                    acts_RTF = (x_RTD @ crosscoder.W_enc[group].T + crosscoder.b_enc[group]).relu()
                    total = total + acts_RTF @ crosscoder.decoder(group, site)
            made[site] = total
            return torch.where(keep_RT[..., None], total / scales[site], y_RTD) if site in replaced else None

        return hook

    hooks = {site: read(site) for site in wiring.read_sites} | {site: write(site) for site in wiring.write_sites}
    return hooks, made


@pytest.mark.parametrize("layers", [(), (1,), (0, 1, 2)])
def test_gradients_of_the_joint_loss_are_those_of_a_dense_one(
    load: Callable[..., LanguageModel], layers: tuple[int, ...]
) -> None:
    """Every weight of both models, against hooks of dense products and torch's own losses."""
    lm, rows = load(torch.float64), rows_of(0)
    coefficients = {"reconstruction": 0.3, "cross_entropy": 0.7, "kl": 1.3}
    trainer = co_trainer(lm, activation=ReLU(), **coefficients)
    crosscoder, keep_RT = trainer.crosscoder, rows.keep_RT
    replaced = tuple(Site(layer, "mlp_out") for layer in layers)
    parameters = {**trainer.weights, **dict(crosscoder.named_parameters())}
    gradients = []
    for ours in (True, False):
        with trainer._gradients(crosscoder_moves=True):
            if ours:
                terms = trainer._joint_terms(rows, replaced)[0]
                torch.stack(list(terms.values())).sum().backward()
            else:  # the statistics are now what the step has made of them
                hooks, made = dense_hooks(crosscoder, trainer.statistics, replaced, keep_RT)
                spliced_RTV, (logits_RTV, clean) = lm.run(rows.tokens_RT, hooks), clean_run(lm, crosscoder, rows)
                p, q = (torch.distributions.Categorical(logits=x[:, :-1]) for x in (logits_RTV, spliced_RTV))
                loss = loss_of(logits_RTV, rows.tokens_RT).mean()
                if replaced:
                    loss = loss + 0.7 * loss_of(spliced_RTV, rows.tokens_RT).mean()
                    loss = loss + 1.3 * torch.distributions.kl_divergence(p, q).mean()
                for site, y_RTD in made.items():
                    error = (y_RTD - clean[site] * trainer.statistics.scales[site])[keep_RT].square().sum(-1).mean()
                    loss = loss + 0.3 * error / trainer.statistics.variances[site]
                loss.backward()
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        for parameter in parameters.values():
            parameter.grad = None
    assert set(terms) == {"language_model", "spliced_reconstruction"} | (
        {"spliced_cross_entropy", "spliced_kl"} if replaced else set()
    )
    for name, expected in gradients[1].items():
        assert float(expected.abs().max()) > 0, name
        torch.testing.assert_close(
            gradients[0][name], expected, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def clean_run(lm: LanguageModel, crosscoder: Crosscoder, rows: RowsRead) -> tuple[Tensor, dict[Site, Tensor]]:
    seen: dict[Site, Tensor] = {}
    hooks = {site: lambda x, site=site: seen.update({site: x}) for site in crosscoder.wiring.write_sites}
    return lm.run(rows.tokens_RT, hooks), seen


def test_statistics_follow_as_running_means_of_the_unscaled_moments(load: Callable[..., LanguageModel]) -> None:
    lm = load()
    crosscoder = tiny.crosscoder_for(lm)
    site = crosscoder.wiring.write_sites[0]
    parts = []
    for size in (1.0, 3.0):
        generator = torch.Generator().manual_seed(int(size))
        batch = {
            s: size * torch.randn(50, crosscoder.wiring.width(s), generator=generator)
            for s in {*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites}
        }
        parts.append((measure(crosscoder, [batch]), batch[site].double()))
    (old, x), (new, y) = parts
    mixed = old.toward(new, 0.25)
    assert old.toward(new, 1.0).scales[site] == pytest.approx(new.scales[site])
    norm = 0.75 * x.norm(dim=1).mean() + 0.25 * y.norm(dim=1).mean()
    scale = math.sqrt(x.shape[1]) / float(norm)
    variance = 0.75 * x.var(dim=0, correction=0).sum() + 0.25 * y.var(dim=0, correction=0).sum()
    assert mixed.scales[site] == pytest.approx(scale)
    assert float(mixed.variances[site]) == pytest.approx(scale**2 * float(variance), rel=1e-5)
    torch.testing.assert_close(
        mixed.means[site].double(), scale * (0.75 * x.mean(0) + 0.25 * y.mean(0)), atol=1e-5, rtol=1e-4
    )


# Schedules ------------------------------------------------------------------------------------------------------------


@given(turns=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5)), n_steps=st.integers(0, 40))
def test_steps_of_both_count_the_turns(turns: tuple[int, int] | None, n_steps: int) -> None:
    """Against the turns written out."""
    cycle = [(1, 1)] if turns is None else [(1, 0)] * turns[0] + [(0, 1)] * turns[1]
    taken = (cycle * 41)[:n_steps]
    assert steps_of_both(turns, n_steps) == (sum(a for a, _ in taken), sum(b for _, b in taken))


@pytest.mark.parametrize(
    ("turns", "moving"), [(None, "bbbbbb"), ([1, 1], "mcmcmc"), ([2, 1], "mmcmmc"), ([4, 2], "mmmmcc")]
)
def test_what_moves_in_a_step(load: Callable[..., LanguageModel], turns: list[int] | None, moving: str) -> None:
    """Both, the language model (m) or the crosscoder (c); each at its own pace through its schedule."""
    lm = load()
    trainer = co_trainer(lm, turns=turns, kl=1.0, reconstruction=0.1)
    sites = trainer.crosscoder.wiring.write_sites
    for step, expected in enumerate(moving):
        parts = [trainer.weights.values(), list(trainer.crosscoder.parameters())]
        before = [[parameter.detach().clone() for parameter in part] for part in parts]
        scales = dict(trainer.statistics.scales)
        done = [moving[:step].count(kind) + moving[:step].count("b") for kind in "mc"]
        totals = [moving.count(kind) + moving.count("b") for kind in "mc"]
        assert trainer.model_learning_rate_at(step) == 3e-4 * warmup_and_cosine(
            done[0], n_steps=totals[0], warmup_steps=0
        )
        factor = trainer.config.learning_rate_factor(done[1] * len(moving) // totals[1])
        assert trainer.learning_rate_at(step) == 1e-2 * factor
        report = trainer.step_on_rows(rows_of(step), replaced=sites)
        assert (report.step, report.tokens) == (step + 1, 32 * (step + 1))
        moved = [
            sum(not torch.equal(old, new) for old, new in zip(olds, part, strict=True))
            for olds, part in zip(before, parts, strict=True)
        ]
        assert (moved[0] > 0, moved[1] > 0) == (expected in "bm", expected in "bc"), step
        assert (trainer.statistics.scales != scales) == (expected in "bm")
        begun = expected == "b" or "c" in moving[:step]
        assert ("spliced_kl" in report.terms) == (expected in "bm" and begun), step
        assert bool(report.unexplained_by_site) == (expected in "bc")
        assert math.isfinite(report.loss)
    assert not any(parameter.requires_grad for parameter in lm.parts.bridge.parameters())


def test_one_random_site_is_replaced_or_a_subset(load: Callable[..., LanguageModel]) -> None:
    crosscoder = tiny.crosscoder_for(load())
    chosen = [replaced_sites(crosscoder, "one", seed=0, step=step) for step in range(40)]
    assert {len(sites) for sites in chosen} == {1}
    assert {site for sites in chosen for site in sites} == set(crosscoder.wiring.write_sites)
    assert {len(replaced_sites(crosscoder, "subset", seed=0, step=step)) for step in range(40)} == {0, 1, 2, 3}


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.write_tokens(tmp_path_factory.mktemp("data") / "tokens.npy")


def value_of(folder: Path, tokens: Path, *, n_steps: int = 18, **settings: Any) -> dict[str, Any]:
    return training_runs.settings(folder, tokens, n_steps=n_steps) | {"language_model": settings}


@pytest.mark.parametrize("turns", [None, [2, 1]])
def test_a_killed_run_resumes_bit_for_bit(
    turns: list[int] | None, tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stopped in the middle of a turn, and killed without notice after that."""
    value = value_of(
        model_folder("gpt2"), tokens, kl=0.5, cross_entropy=0.1, reconstruction=0.1, start="random", turns=turns
    )
    run(run_config(value), tmp_path / "whole")
    out = tmp_path / "killed"
    with pytest.raises(Interrupted):
        run(run_config(value), out, progress=lambda p: os.kill(os.getpid(), signal.SIGTERM) if p.step == 7 else None)
    go_on = {"config": value, "out": str(out), "resume": True, "die_at": 12}
    killed = subprocess.run(
        training_runs.command([go_on], tmp_path), capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "crosscoder").exists()
    run(run_config(value), out, resume=True)
    for name in WEIGHTS:
        assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes(), name
    records = [[{**r, "tokens_per_second": 0} for r in read_metrics(folder)] for folder in (tmp_path / "whole", out)]
    assert records[0] == records[1]


def test_the_result_is_traced_like_any_other(tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    value = value_of(model_folder("gpt2"), tokens, n_steps=5, kl=1.0)
    crosscoder = run(run_config(value), tmp_path / "run")
    model = replacement.load(tmp_path / "run" / "language_model", crosscoder=tmp_path / "run")
    original = load_file(model_folder("gpt2") / "model.safetensors")
    trained = load_file(tmp_path / "run" / "language_model" / "model.safetensors")
    assert original.keys() == trained.keys()
    assert not any(torch.equal(original[name], trained[name]) for name in original)
    assert model.crosscoder.fingerprint == crosscoder.fingerprint
    held_out = read_metrics(tmp_path / "run", kind="held_out")[-1]
    assert held_out["kl"] > 0
    assert circuits.trace(model, tiny.random_tokens(), coverage=1.0).identity_error <= 1e-4
    with pytest.raises(ValueError, match="was trained on another model"):
        replacement.load(model_folder("gpt2"), crosscoder=tmp_path / "run")


def test_a_language_model_learns_from_nothing(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """From random weights, which depend on the seed alone, to less than the entropy of the vocabulary."""
    value = value_of(model_folder("gpt2"), tokens, n_steps=20, start="random", learning_rate=1e-2, kl=1.0)
    run(run_config(value), tmp_path / "run")
    first, *_, last = (r["cross_entropy_original"] for r in read_metrics(tmp_path / "run", kind="held_out"))
    assert first < math.log(tiny.VOCABULARY) + 0.3
    assert last < first


# What cannot work -----------------------------------------------------------------------------------------------------

TABLE: dict[str, Any] = {"kl": 1.0}
BAD_SETTINGS = {
    "two models": ({"model": ["a", "b"]}, TABLE, "language_model trains the model of the run: expected one, got 2"),
    "a cache": (
        {"data": {"cache": "x"}},
        TABLE,
        "language_model changes the activations in every step: expected no data.cache",
    ),
    "three turns": ({}, {"turns": [1, 2, 3]}, r"turns must be two numbers of steps, 1 or more: .*; got \[1, 2, 3\]"),
    "no turn": ({}, {"turns": [0, 2]}, r"turns must be two numbers of steps, 1 or more: .*; got \[0, 2\]"),
    "a start": ({}, {"start": "zero"}, "start must be one of trained, random, got 'zero'"),
    "a coefficient": ({}, {"kl": -1.0}, "kl must be 0 or more and finite, got -1.0"),
    "a rate": ({}, {"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
    "no table": ({}, 3, "language_model must be a table of settings, got 3"),
    "an unknown key": ({}, {"schedule": "fast"}, "unknown setting schedule: expected some of .*language_model.turns"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_work(name: str) -> None:
    changes, table, message = BAD_SETTINGS[name]
    value = {"model": "demo", "training": {"n_tokens": 4096}, "language_model": table, **changes}
    with pytest.raises(ValueError, match=message):
        run_config(value)


def test_a_wiring_that_is_not_spliced_is_refused(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    value = value_of(model_folder("gpt2"), tokens, kl=1.0)
    for wiring in ("acausal", "transcoder"):
        crosscoder = value["crosscoder"] | {"wiring": wiring}
        with pytest.raises(ValueError, match=rf"language_model\.kl needs a spliced model: .* not {wiring} and 'clean'"):
            run(run_config(value | {"crosscoder": crosscoder}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_and_copied_weights_are_refused(
    load: Callable[..., LanguageModel], model_folder: Callable[[str], Path]
) -> None:
    config = run_config({"training": {"n_tokens": 4096}, "language_model": TABLE})
    with pytest.raises(ValueError, match="language_model is trained in one process: expected no torchrun"):
        begin_co_training(config, load(), "subset", parallel=Parallel(mesh=Mock(spec=DeviceMesh)))
    neox = LanguageModel.from_pretrained(model_folder("neox"))
    with pytest.raises(
        ValueError, match=re.escape("GPTNeoXForCausalLM computes with a copy of its weights (gpt_neox.")
    ):
        begin_co_training(config, neox, "subset", parallel=SINGLE)


def test_a_loss_that_is_not_finite_is_told(load: Callable[..., LanguageModel]) -> None:
    lm = load()
    trainer = co_trainer(lm)
    trainer.weights["transformer.ln_f.weight"].data[0] = math.nan
    with pytest.raises(ValueError, match="the loss of the language model is not finite at step 0"):
        trainer.step_on_rows(rows_of(0), replaced=())


def test_wirings_that_read_what_they_write_follow_by_reconstruction(load: Callable[..., LanguageModel]) -> None:
    """Autoencoders of the stream: no splice, and the model is led to what they explain."""
    lm = load()
    crosscoder = tiny.crosscoder_for(lm, wiring=Wiring.autoencoder(lm))
    config = TrainingConfig(n_tokens=320, batch_tokens=32, losses=[], learning_rate=1e-2)
    settings = LanguageModelConfig(reconstruction=1.0)
    trainer = CoTrainer(crosscoder, config, statistics_of(lm, crosscoder), settings=settings, language_model=lm)
    reports = [trainer.step_on_rows(rows_of(0), replaced=()) for _ in range(8)]
    assert reports[-1].unexplained < reports[0].unexplained
