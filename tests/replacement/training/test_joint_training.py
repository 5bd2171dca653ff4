"""A joint trainer takes the steps of two trainers where the parts do not meet, and resumes where they do."""

from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training_runs
from torch import Tensor

from replacement import Crosscoder, LanguageModel, ReplacementModel, Site, TopK, Wiring, checkpoint
from replacement.crosscoder.joint import split
from replacement.training import Strongest, TrainingConfig
from replacement.training.metrics_log import read_metrics
from replacement.training.run_config import run_config
from replacement.training.runs import Interrupted, run
from replacement.training.scaling import measure, scaled, sites_of
from replacement.training.trainer import Progress, Trainer
from replacement.validation.fidelity import measure_fidelity

K = (5, 3, 2, 4, 6, 3)


def parts_for(lm: LanguageModel) -> tuple[Crosscoder, list[Crosscoder]]:
    """A fresh joint crosscoder, and copies of its parts with the same initial weights."""
    joint = Crosscoder(Wiring.joint(lm), n_features=24, activation=TopK(K), dtype=torch.float64, seed=0)
    return joint, [copy.deepcopy(part) for part in split(joint)]


def batches_of(lm: LanguageModel, crosscoder: Crosscoder, n: int) -> list[dict[Site, Tensor]]:
    """Activations of random prompts."""
    tokens = [torch.stack([tiny.random_tokens(seed=8 * step + row) for row in range(8)]) for step in range(n)]
    read = (lm.read(rows, sites_of(crosscoder)) for rows in tokens)
    return [{site: x.flatten(0, 1) for site, x in acts.items()} for acts in read]


def config(n_steps: int, **options: Any) -> TrainingConfig:
    """Settings for batches of 80 tokens."""
    return TrainingConfig(
        **{"n_tokens": 80 * n_steps, "batch_tokens": 80, "gradient_clip": 1e9, "losses": []} | options
    )


@pytest.mark.parametrize("losses", [[], [Strongest(1.0)]], ids=["reconstruction", "strongest"])
def test_with_clean_reads_the_parts_are_trained_as_if_alone(language_model: Any, losses: list[Any]) -> None:
    """Losses that are means over sites weigh half in a joint trainer, whose parts have half of the sites each."""
    lm = language_model("gpt2", torch.float64)
    joint, parts = parts_for(lm)
    batches = batches_of(lm, joint, 6)
    halves = [type(loss)(loss.coefficient / 2) for loss in losses]
    trainers = [Trainer(joint, config(6, losses=losses), measure(joint, batches[:2]))]
    for part in parts:
        settings = config(6, losses=halves)
        trainers.append(Trainer(part, settings, measure(part, batches[:2])))
    for batch in batches:
        whole, *reports = [trainer.step(batch) for trainer in trainers]
        assert whole.loss == pytest.approx(sum(report.loss for report in reports), rel=1e-12)
        assert whole.gradient_norm == pytest.approx(math.hypot(*(r.gradient_norm for r in reports)), rel=1e-10)
        assert whole.l0_by_group == reports[0].l0_by_group + reports[1].l0_by_group
    for trained, part in zip(split(trainers[0].finished()), trainers[1:], strict=True):
        expected = part.finished().state_dict()
        for name, value in trained.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_step_is_that_of_dense_autograd(language_model: Any) -> None:
    """Gradients of all weights of both parts, and the weights after a clipped step of Adam."""
    lm = language_model("gpt2", torch.float64)
    joint, _ = parts_for(lm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight_FWD in joint.W_dec:
            weight_FWD.normal_(generator=generator, std=0.1)
    (batch,) = batches_of(lm, joint, 1)
    statistics = measure(joint, [batch])
    settings = config(1, gradient_clip=0.5, learning_rate=1e-2, warmup_fraction=0.0, decay_fraction=0.0)
    trainer = Trainer(joint, settings, statistics)
    dense = copy.deepcopy(trainer.crosscoder)
    rows = scaled(dense, batch, statistics)
    sums: dict[Site, Tensor] = dict(zip(dense.wiring.write_sites, dense.b_dec, strict=True))
    for group, ((read,), writes) in enumerate(zip(dense.wiring.reads, dense.wiring.writes, strict=True)):
        pre_BF = rows[read] @ dense.encoder(group, read).T + dense.b_enc[group]
        floor_B1 = pre_BF.topk(K[group], dim=1).values[:, -1:]
        acts_BF = torch.where(pre_BF >= floor_B1, pre_BF.relu(), 0.0)
        for site in writes:
            sums[site] = sums[site] + acts_BF @ dense.decoder(group, site)
    errors = ((y_BD - rows[site]).square().sum() / statistics.variances[site] for site, y_BD in sums.items())
    (torch.stack(list(errors)).sum() / 80).backward()
    parameters = list(dense.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.Adam(parameters, lr=1e-2).step()
    report = trainer.step(batch)
    assert report.gradient_norm == pytest.approx(float(norm), rel=1e-9)
    assert report.gradient_norm > 0.5
    for (name, value), expected in zip(trainer.crosscoder.named_parameters(), parameters, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("reads", ["clean", "propagated"])
def test_a_joint_run_resumes_bit_for_bit_and_is_measured_whole(
    reads: str, model_folder: Callable[[str], Path], language_model: Any, tmp_path: Path
) -> None:
    tokens = training_runs.write_tokens(tmp_path / "tokens.npy")
    crosscoder = {"wiring": "joint", "n_features": 32, "activation": {"name": "topk", "k": list(K)}}
    folder = model_folder("gpt2")
    value = training_runs.settings(folder, tokens, n_steps=20, crosscoder=crosscoder, training={"reads": reads})

    def stop(progress: Progress) -> None:
        if progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    run(run_config(value), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(run_config(value), tmp_path / "stopped", progress=stop)
    joint = run(run_config(value), tmp_path / "stopped", resume=True)
    weights = Path("crosscoder") / "crosscoder.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "stopped" / weights).read_bytes()
    assert split(joint)[1].activation == TopK(K[3:])
    *_, record = read_metrics(tmp_path / "whole", kind="held_out")
    assert len(record["unexplained"]) == len(record["l0"]) == 6
    # What is measured is the output with both parts in place.
    lm = language_model("gpt2")
    saved = checkpoint.load(tmp_path / "whole" / "crosscoder")
    rows = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    both = measure_fidelity(lm, list(ReplacementModel(lm, saved).crosscoders.values()), rows)
    assert measure_fidelity(lm, saved, rows).kl == pytest.approx(both.kl, rel=1e-6)


def test_a_joint_run_reads_subsets_by_default(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    tokens = training_runs.write_tokens(tmp_path / "tokens.npy")
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=2, crosscoder={"wiring": "joint"})
    run(run_config(value), tmp_path / "run")
    assert '"reads": "subset"' in (tmp_path / "run" / "run.json").read_text()
    value["crosscoder"]["activation"] = {"name": "topk", "k": [1, 2, 3]}
    with pytest.raises(ValueError, match="topk has k for 3 groups, the wiring has 6"):
        run(run_config(value), tmp_path / "other")


def test_a_run_goes_on_from_the_crosscoder_in_a_folder(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Steps of no size give it back, others move it; and it must be what the settings describe."""
    tokens = training_runs.write_tokens(tmp_path / "tokens.npy")
    value = training_runs.settings(model_folder("gpt2"), tokens, n_steps=4, crosscoder={"wiring": "joint"})
    first = run(run_config(value), tmp_path / "first")
    value["crosscoder"]["start"] = str(tmp_path / "first")
    found = {}
    for rate in (1e-30, 1e-3):
        value["training"]["learning_rate"] = rate
        found[rate] = run(run_config(value), tmp_path / f"rate {rate}")
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(found[1e-30].state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    assert float((found[1e-3].W_enc[0] - first.W_enc[0]).detach().abs().max()) > 1e-4
    value["crosscoder"]["n_features"] = 32
    with pytest.raises(
        ValueError, match=r"start: the crosscoder in .*first has another n_features than the settings say"
    ):
        run(run_config(value), tmp_path / "other")
