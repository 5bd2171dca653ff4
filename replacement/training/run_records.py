"""What a run records: of its steps, and of its crosscoder on held-out rows. `metrics_log.py` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.topk import BatchTopK
from replacement.training.run_data import RunData
from replacement.training.scaling import calibrate
from replacement.training.sharding import whole
from replacement.training.trainer import Progress, Trainer
from replacement.validation.fidelity import measure_fidelity


def training_record(trainer: Trainer, data: RunData, report: Progress, tokens_per_second: float) -> dict[str, Any]:
    """What a record of a step says."""
    crosscoder = trainer.crosscoder
    n_features = crosscoder.n_groups * crosscoder.n_features * trainer.parallel.n_feature_shards
    return {
        "tokens": report.tokens,
        "loss": report.loss,
        "unexplained": {str(site): value for site, value in report.unexplained_by_site.items()},
        "l0": report.l0_by_group,
        "l0_total": report.l0,
        "dead_fraction": report.n_dead / n_features,
        "terms": report.terms,
        "learning_rate": trainer.learning_rate_at(report.step - 1),
        "gradient_norm": report.gradient_norm,
        "tokens_per_second": tokens_per_second,
        **data.alignment(data.stream.counts),
    }


def held_out_record(
    trainer: Trainer, data: RunData, activation: Activation, measuring: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Reconstruction of held-out rows and the output with the crosscoder spliced in, measured by the first process while
    the others wait; empty there. Thresholds of BatchTopK are calibrated before, in every process.

    Args:
        activation: of the whole crosscoder, of which the trainer may hold a part.
        measuring: called with the tokens done and in all.
    """
    if measuring is not None:
        measuring(0, 1)
    crosscoder: Crosscoder | None = trainer.crosscoder
    if trainer.parallel.n_feature_shards > 1:
        crosscoder = whole(trainer.crosscoder, activation, trainer.parallel)
    _calibrate(trainer, data, activation, crosscoder)
    if crosscoder is None or not trainer.parallel.is_first:
        return {}
    lm = data.models.first
    fidelity = measure_fidelity(
        lm,
        crosscoder,
        data.source.by_tokenizer(data.held_out_RT)[0].tokens_RT.to(lm.device),
        keep_RT=data.stream.kept(data.held_out_RT).to(lm.device),
        scales=trainer.statistics.scales,
        others=None if data.models.only else lambda rows: data.read(data.held_out_RT[rows], first_model=1),
        progress=measuring,
    )
    layout = data.source.layout
    sites = crosscoder.wiring.write_sites
    measured = (
        "kl",
        "cross_entropy",
        "cross_entropy_original",
        "cross_entropy_recovered",
        "agreement",
        "agreement_all",
    )
    return {
        "unexplained": {str(site): value for site, value in zip(sites, fidelity.unexplained, strict=True)},
        "l0": list(fidelity.l0),
        "l0_total": fidelity.total_l0,
        **{name: getattr(fidelity, name) for name in measured},
        **data.alignment(None if layout is None else layout.counts(data.held_out_RT)),
    }


def _calibrate(trainer: Trainer, data: RunData, activation: Activation, crosscoder: Crosscoder | None) -> None:
    """Set the thresholds of BatchTopK: the first process measures them on its whole crosscoder and tells the others."""
    own = trainer.crosscoder
    if not isinstance(activation, BatchTopK) or own.threshold is None:
        return
    measured = []
    if trainer.parallel.is_first:
        assert crosscoder is not None
        assert crosscoder.threshold is not None
        n_rows = int(data.stream.kept(data.first_rows_RT).sum())
        calibrate(crosscoder, trainer.statistics, data.first_batches(), n_rows=n_rows)
        measured = crosscoder.threshold.tolist()
    own.threshold.copy_(torch.tensor(json.loads(trainer.parallel.from_first(json.dumps(measured)))))
