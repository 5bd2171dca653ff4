"""Low-rank sparse attention is trained by the one trainer: on whole rows, resumed exactly, from the model's heads if asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training_runs

from replacement import LanguageModel, Lorsa, ReLU, Site, Wiring
from replacement.crosscoder.jumprelu import to_jumprelu
from replacement.training.build import Models, build_crosscoder
from replacement.training.config import CrosscoderConfig, TrainingConfig
from replacement.training.dead_features import Auxiliary, PreActivation
from replacement.training.head_start import query_keys_like, start_at_heads
from replacement.training.losses import StepState
from replacement.training.metrics_log import read_metrics
from replacement.training.reads import RowsRead
from replacement.training.run_config import run_config
from replacement.training.runs import Interrupted, run
from replacement.training.scaling import measure
from replacement.training.trainer import Trainer

WEIGHTS = Path("crosscoder") / "crosscoder.safetensors"
LORSA = {"wiring": "lorsa", "query_key_groups": 8}
HEADS_LIKE = ["gpt2", "llama", "qwen3", "gemma2", "neox", "granite"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.write_tokens(tmp_path_factory.mktemp("data") / "tokens.npy")


def rows_of(lm: LanguageModel, crosscoder: Lorsa, *, seed: int = 0) -> tuple[dict[Site, torch.Tensor], RowsRead]:
    """A batch of whole rows in the model's own scale: reads of all tokens, targets of those that count."""
    tokens_RT = torch.stack([tiny.random_tokens(8, seed=seed + n) for n in range(6)])
    keep_RT = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)) < 0.7
    read = lm.read(tokens_RT, [*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites])
    batch = {site: x.flatten(0, 1) if site.kind == "attn_in" else x[keep_RT] for site, x in read.items()}
    return batch, RowsRead(tokens_RT, keep_RT)


def kept_alone(batch: dict[Site, torch.Tensor], rows: RowsRead) -> dict[Site, torch.Tensor]:
    """The same batch at the tokens that count alone."""
    keep_R = rows.keep_RT.flatten()
    return {site: x[keep_R] if site.kind == "attn_in" else x for site, x in batch.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"reads": "clean"}, "crosscoder": {"start": "heads", "query_key_groups": 4}},
        {"crosscoder": {"activation": {"name": "jumprelu"}}},
    ],
    ids=["subset", "clean, from heads", "jumprelu"],
)
def test_a_stopped_run_resumes_bit_for_bit(
    changes: dict[str, Any], tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    value = training_runs.settings(model_folder("llama"), tokens, n_steps=16, crosscoder=LORSA)
    for section, change in changes.items():
        value[section] = value[section] | change
    config = run_config(value)
    whole = run(config, tmp_path / "whole")
    assert isinstance(whole, Lorsa)

    def stop(progress: Any) -> None:
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run(config, tmp_path / "stopped", progress=stop)
    run(config, tmp_path / "stopped", resume=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "stopped" / WEIGHTS).read_bytes()
    held_out = [record for record in read_metrics(tmp_path / "whole") if record["kind"] == "held_out"]
    mean = [sum(record["unexplained"].values()) / 3 for record in held_out]
    assert mean[-1] < mean[0] < 1


@pytest.mark.parametrize("name", ["auxiliary", "preactivation"])
def test_losses_of_silent_heads_look_at_one_prompt_in_four(language_model: Any, name: str) -> None:
    """Against dense formulas on the prompts 0 and 4, with the tokens that do not count left out."""
    lm = language_model("gpt2", torch.float64)
    crosscoder = tiny.lorsa_for(lm, activation=ReLU())
    batch, rows = rows_of(lm, crosscoder)
    outputs, features = crosscoder(batch, positions=rows.positions(), keep=rows.keep_RT.flatten())
    dead_GF = torch.rand(3, 48, generator=torch.Generator().manual_seed(5)) < 0.5
    state = StepState(
        crosscoder=crosscoder,
        inputs={site: batch[site] for site in crosscoder.wiring.read_sites},
        targets={site: batch[site] for site in crosscoder.wiring.write_sites},
        reconstructions=outputs,
        features=features,
        dead_GF=dead_GF,
        variances=dict.fromkeys(outputs, torch.tensor(1.0)),
        n_rows=features.n_rows,
        keep_RT=rows.keep_RT,
        tokens_RT=rows.tokens_RT,
    )
    loss = {"auxiliary": Auxiliary(coefficient=1.0, k=2), "preactivation": PreActivation(coefficient=1.0)}[name]
    of_batch_RT = rows.keep_RT & torch.tensor([True, False, False, False, True, False])[:, None]
    in_batch = of_batch_RT[rows.keep_RT]
    terms = []
    for layer in range(3):
        pre_RF = crosscoder.pre_activations(batch, layer, positions=rows.positions())[of_batch_RT.flatten()]
        if name == "preactivation":
            terms.append((pre_RF.neg().relu() @ crosscoder.W_dec[layer][:, 0].norm(dim=1)).sum() * 4 / features.n_rows)
            continue
        dead_RF = pre_RF.masked_fill(~dead_GF[layer], -torch.inf)
        best_RF = torch.where(dead_RF >= dead_RF.topk(2, dim=1).values[:, -1:], dead_RF.relu(), 0.0)
        site = Site(layer, "attn_out")
        error_RD = (batch[site] - outputs[site].detach())[in_batch]
        left_RD = error_RD - best_RF @ crosscoder.W_dec[layer][:, 0]
        terms.append(left_RD.square().sum() / error_RD.square().sum() / 3)
    value, expected = loss(state), torch.stack(terms).sum()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    gradients = [
        torch.autograd.grad(x, [*crosscoder.W_Q, *crosscoder.W_enc], retain_graph=True) for x in (value, expected)
    ]
    for given, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-8, atol=1e-12)


def test_a_step_is_trained_on_the_tokens_that_count(language_model: Any) -> None:
    lm = language_model("gpt2")
    config = TrainingConfig(n_tokens=4000, batch_tokens=48, losses=[], learning_rate=0.01)
    crosscoder = Lorsa(Wiring.lorsa(lm), query_keys=query_keys_like(lm, n_groups=4, width=8), n_features=48, seed=0)
    batch, rows = rows_of(lm, crosscoder)
    trainer = Trainer(crosscoder, config, measure(crosscoder, [kept_alone(batch, rows)]), language_model=lm)
    first = trainer.step(batch, rows=rows)
    for _ in range(60):
        last = trainer.step(batch, rows=rows)
    assert last.unexplained < 0.3 * first.unexplained
    finished = trainer.finished()  # scales folded in: the same function of the model's own activations
    with torch.no_grad():
        outputs, features = finished(batch, positions=rows.positions(), keep=rows.keep_RT.flatten())
    assert features.n_rows == int(rows.keep_RT.sum())
    unexplained = [
        float((batch[site] - y).square().sum() / (batch[site] - batch[site].mean(0)).square().sum())
        for site, y in outputs.items()
    ]
    assert sum(unexplained) / 3 == pytest.approx(trainer.step(batch, rows=rows).unexplained, rel=0.1)
    with pytest.raises(ValueError, match="a lorsa crosscoder is trained on whole rows of tokens: give them"):
        trainer.step(batch)


@pytest.mark.parametrize("architecture", HEADS_LIKE)
def test_a_start_at_heads_has_the_patterns_of_the_model(language_model: Any, architecture: str) -> None:
    lm = language_model(architecture, torch.float64)
    shape = lm.shape
    sizes = query_keys_like(lm, n_groups=2 * shape.n_heads, width=shape.d_head)
    crosscoder = Lorsa(Wiring.lorsa(lm), query_keys=sizes, n_features=48, dtype=lm.dtype, seed=0)
    tokens = tiny.random_tokens(4)  # no longer than any window
    read = lm.read(tokens, [*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites])
    trainer = Trainer(crosscoder, TrainingConfig(n_tokens=4000), measure(crosscoder, [read]), language_model=lm)
    start_at_heads(crosscoder, lm, trainer.statistics, seed=0)
    means = {site: trainer.statistics.means[site][None] for site in crosscoder.wiring.read_sites}
    assert float(crosscoder.pre_activations(means, 1).detach().abs().max()) < 1e-10
    finished = trainer.finished()
    # Transformers rotates in float32; scores of Gemma 2 have a soft-cap, which sparse heads cannot have.
    tolerance = 0.2 if architecture == "gemma2" else 1e-6
    for layer, pattern_BHTT in enumerate(lm.read_patterns(tokens)):
        pattern_BQTT = finished.patterns(read, layer)
        torch.testing.assert_close(pattern_BQTT, pattern_BHTT.repeat(1, 2, 1, 1), rtol=0, atol=tolerance)
        values_XD = lm.parts.bridge.blocks[layer].attn.W_V.detach().transpose(1, 2).flatten(0, 1)
        solved = torch.linalg.lstsq(values_XD.T, finished.W_enc[layer].detach().T).solution
        torch.testing.assert_close(values_XD.T @ solved, finished.W_enc[layer].detach().T, rtol=0, atol=1e-8)


def test_bad_input(language_model: Any, model_folder: Callable[[str], Path], tokens: Path, tmp_path: Path) -> None:
    lm = language_model("gpt2")
    rows = torch.zeros(2, 4, dtype=torch.int64)

    def build(model: LanguageModel = lm, **settings: Any) -> Any:
        config = CrosscoderConfig(wiring="lorsa", **settings)
        return build_crosscoder(config, Models((model,)), rows, seed=0)

    assert build(n_features=64).query_keys.to_dict() == {
        "n_groups": 16,
        "width": 8,
        "rotary": None,
        "norm_epsilon": None,
    }
    with pytest.raises(ValueError, match="64 heads cannot share 7 query-key groups equally: expected a multiple of 7"):
        build(n_features=64, query_key_groups=7)
    with pytest.raises(ValueError, match="queries and keys have 4 channels, 8 are to be rotated"):
        build(language_model("llama"), n_features=64, query_key_width=4)
    with pytest.raises(ValueError, match="the wiring lorsa reads attn_in; read='resid_pre' does not apply"):
        build(read="resid_pre")
    with pytest.raises(ValueError, match="query_key_groups is for the wiring lorsa, got the wiring attention"):
        CrosscoderConfig(wiring="attention", query_key_groups=4)
    with pytest.raises(ValueError, match="start='heads' is not for the wiring attention"):
        CrosscoderConfig(wiring="attention", start="heads")
    with pytest.raises(ValueError, match="start='samples' is not for the wiring lorsa"):
        build(start="samples")
    value = training_runs.settings(model_folder("gpt2"), tokens, crosscoder=LORSA)
    value["crosscoder"]["activation"] = {"name": "batchtopk", "k": 4}
    with pytest.raises(ValueError, match="the wiring lorsa takes the activation topk, jumprelu or relu, got batchtopk"):
        run_config(value)
    with pytest.raises(ValueError, match="cannot measure thresholds of a lorsa crosscoder: its rows are whole prompts"):
        to_jumprelu(tiny.lorsa_for(lm), [{Site(layer, "attn_in"): torch.zeros(4, 32) for layer in range(3)}])
    for architecture, width, why in (
        ("olmo2", 8, "their norms act on several heads at once, or on queries or keys alone"),
        ("gpt2", 6, "they have 8 channels, not 6"),
    ):
        start = LORSA | {"start": "heads", "query_key_width": width}
        value = training_runs.settings(model_folder(architecture), tokens, crosscoder=start)
        with pytest.raises(
            ValueError, match=rf"cannot begin with queries and keys of layer 0 \(start='heads'\): {why}"
        ):
            run(run_config(value), tmp_path / architecture)
        assert not (tmp_path / architecture).exists()


def test_heads_are_not_shared_between_processes(
    tokens: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = training_runs.settings(model_folder("gpt2"), tokens, crosscoder=LORSA)
    options = {"config": config, "out": str(tmp_path / "out"), "feature_shards": 2}
    with pytest.raises(
        AssertionError, match="the heads of a lorsa crosscoder cannot be shared: expected --feature-shards 1"
    ):
        training_runs.execute([options], tmp_path, n_processes=2)
