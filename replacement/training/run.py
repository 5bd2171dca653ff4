"""A training run in a folder: data, steps, metrics, checkpoints, and going on exactly where it stopped.

    OUT/run.json            the settings
    OUT/inputs.json         fingerprints of the models and the data
    OUT/metrics.jsonl       one line per record (see `metrics_log`)
    OUT/snapshots/          state of the run (see `snapshots`)
    OUT/crosscoder/         the result, once the run is finished

The order of the data and every random choice are functions of (seed, step), so the state is the weights, the optimizer's
moments and the number of steps. A resumed run gives the weights of one that never stopped, bit for bit, on the same CPU
with the same number of threads and processes (GPU kernels may add in another order).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder import checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.data.activation_cache import ActivationCache
from replacement.data.activation_stream import ActivationStream
from replacement.data.documents import special_ids
from replacement.training import snapshots
from replacement.training.build import build_crosscoder, load_models, open_tokens
from replacement.training.evaluation import evaluate
from replacement.training.metrics_log import MetricsLog
from replacement.training.parallel import Parallel, connect
from replacement.training.reads import choose_reads, read_rows, replaced_sites
from replacement.training.run_config import RunConfig
from replacement.training.run_folder import RESULT, check_inputs, digest, is_finished, open_folder
from replacement.training.scaling import Batch, Statistics, measure, sites_of
from replacement.training.sharding import feature_dim, local_part, plan, whole
from replacement.training.stopping import StopRequest
from replacement.training.trainer import Progress, RowsRead, Trainer

LOG_EVERY = 10
"""Steps between two records of training metrics."""
SCALE_TOKENS = 16_384
"""Tokens that measure the scale, mean and variance of every site."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run stopped because it was asked to
    """The run was asked to stop, and can be resumed."""


def run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    feature_shards: int = 1,
    loggers: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Crosscoder:
    """Train a crosscoder as the settings say, save it in `OUT/crosscoder` and return it (processes that share the features,
    other than the first, return their part of it).

    >>> crosscoder = run(read_config("clt.toml"), "runs/clt")   # doctest: +SKIP

    Args:
        out: folder of the run.
        resume: go on from the newest checkpoint in it, or start where there is none. A finished run is only read: its
            settings are compared, its models and data are not loaded.
        device: `cpu`, or `cuda`.
        feature_shards: processes that share the features, in a run started by `torchrun`; the others share the rows.
        loggers: copies of the metrics, `tensorboard` or `wandb`.
        progress: called after each step.

    Raises:
        ValueError: settings that do not fit the model or the data, a folder in use, or a checkpoint of other settings,
            models or data.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written.
    """
    parallel = connect(feature_shards=feature_shards, device=device)
    out = Path(out)
    step = open_folder(config, out, parallel, resume=resume)
    if is_finished(out):
        return checkpoint.load(out / RESULT, device=device)
    going = _Run(config, out, parallel, device=device, step=step)
    last_step = going.trainer.steps_done
    log = MetricsLog(out, last_step=last_step, loggers=loggers, config=config.to_dict(), silent=not parallel.is_first)
    with log, StopRequest() as stop:
        going.go(log, stop, progress)
    return going.finish()


class _Run:
    """What one run holds while it goes on."""

    def __init__(self, config: RunConfig, out: Path, parallel: Parallel, *, device: str, step: int | None) -> None:
        self.config, self.out, self.parallel = config, out, parallel
        self.models = load_models(config.model, device=device)
        self.source = open_tokens(config.data, self.models.first)
        self.held_out_RT = self.source.held_out()
        n_rows = -(-SCALE_TOKENS // self.source.context)
        self.first_rows_RT = next(self.source.blocks(n_rows, seed=config.training.seed)).tokens_RT
        check_inputs(out, self._inputs(), parallel)
        with plan(parallel):
            crosscoder = build_crosscoder(config.crosscoder, self.models, self.held_out_RT, seed=config.training.seed)
        self.activation = crosscoder.activation
        self.reads = choose_reads(config.training, crosscoder, self.models)
        if config.data.cache and not self._shuffles:
            raise ValueError(
                "data.cache serves training on shuffled clean activations: set training.reads='clean', or no cache"
            )
        self.sites = sites_of(crosscoder)
        self.stream = self._open_stream(crosscoder.undecomposed_positions)
        part = local_part(crosscoder, parallel, seed=config.training.seed, device=device)
        self.trainer = Trainer(
            part,
            config.training,
            self._measure(part) if step is None else None,
            parallel=parallel,
            language_model=self.models.only,
        )
        if step is not None:
            state = self.trainer.state_tensors()
            snapshots.load(out / "snapshots", step, self._for_snapshot(state), parallel=parallel)
            self.trainer.restore(state, step)

    def _inputs(self) -> dict[str, str]:
        """Fingerprints of what the settings name without saying what it holds, by what a message calls it."""
        names, source = self.config.model, self.config.data.source
        called = [names] if isinstance(names, str) else names
        prints = {f"the model {name}": lm.fingerprint for name, lm in zip(called, self.models.all, strict=True)}
        return {**prints, f"the data {source}": digest(self.held_out_RT, self.first_rows_RT)}

    @property
    def _shuffles(self) -> bool:
        """Whether steps take shuffled tokens; otherwise whole rows, to run the model on them."""
        return self.reads == "clean" and not any(loss.needs_rows for loss in self.config.training.losses)

    def _read(self, tokens_RT: Tensor) -> dict[Site, Tensor]:
        with torch.no_grad():
            return self.models.read(tokens_RT, self.sites)

    def _open_stream(self, undecomposed_positions: int) -> ActivationStream:
        data, n_data = self.config.data, self.parallel.n_data
        if data.shards % n_data:
            raise ValueError(f"shards={data.shards} is not a multiple of the {n_data} processes that share the rows")
        share = data.shards // n_data
        first = share * self.parallel.data_rank
        return ActivationStream(
            self.source,
            self._cached() if data.cache else self._read,
            batch_tokens=self.config.training.batch_tokens,
            buffer_tokens=data.buffer_tokens,
            shards=data.shards,
            my_shards=range(first, first + share),
            seed=self.config.training.seed,
            excluded_ids=special_ids(self.models.first),
            undecomposed_positions=undecomposed_positions,
        )

    def _cached(self) -> ActivationCache:
        """The activations of all rows on disk, computed by the first process if they are not there yet."""
        folder, names = Path(self.config.data.cache or ""), self.models.fingerprint
        if self.parallel.is_first:
            ActivationCache.build(folder, self.source, self._read, self.sites, fingerprint=names)
        self.parallel.barrier()
        return ActivationCache.open(folder, self.source, fingerprint=names, sites=self.sites)

    def _measure(self, crosscoder: Crosscoder) -> Statistics:
        """Statistics of the first rows of the data, split over the processes like everything else."""
        mine_RT = self.first_rows_RT[self.parallel.data_rank :: self.parallel.n_data]

        def batches() -> Iterator[Batch]:
            for chunk_RT in mine_RT.split(32):
                kept_RT = self.stream.kept(chunk_RT)
                yield {site: x_RTD[kept_RT.to(x_RTD.device)] for site, x_RTD in self._read(chunk_RT).items()}

        return measure(crosscoder, batches(), parallel=self.parallel)

    def go(self, log: MetricsLog, stop: StopRequest, progress: Callable[[Progress], None] | None) -> None:
        """Train to the end, or until asked to stop."""
        trainer, training = self.trainer, self.config.training
        clock = _Clock(training.batch_tokens, trainer.steps_done)
        for step in self._steps(trainer.steps_done):
            report = step()
            if progress is not None:
                progress(report)
            at_checkpoint = report.step % self.config.checkpoint_every == 0 or report.step == training.n_steps
            if report.step % LOG_EVERY == 0 or at_checkpoint:
                log.write("train", report.step, self._training_record(report, clock.tokens_per_second(report.step)))
            if at_checkpoint:
                log.write("held_out", report.step, self._held_out_record())
            stopped = self.parallel.any(stop.requested)
            if at_checkpoint or stopped:
                self.save_snapshot()
                clock.skip()
            if stopped and report.step < training.n_steps:
                raise Interrupted(f"stopped after {report.step} of {training.n_steps} steps; go on with --resume")

    def _steps(self, done: int) -> Iterator[Callable[[], Progress]]:
        """The remaining steps, each as a function that does it."""
        trainer, training = self.trainer, self.config.training
        left = training.n_steps - done
        if self._shuffles:
            for batch in itertools.islice(self.stream.batches(start=done), left):
                yield partial(trainer.step, batch)
            return
        lm = self.models.first
        for tokens_RT, kept_RT in itertools.islice(self.stream.row_batches(start=done), left):
            tokens_RT, kept_RT = tokens_RT.to(lm.device), kept_RT.to(lm.device)
            replaced = replaced_sites(trainer.crosscoder, self.reads, seed=training.seed, step=trainer.steps_done)
            activations, inputs = read_rows(
                lm, trainer.crosscoder, trainer.statistics, tokens_RT, kept_RT, replaced=replaced
            )
            yield partial(trainer.step, activations, inputs=inputs, rows=RowsRead(tokens_RT, kept_RT))

    def _training_record(self, report: Progress, tokens_per_second: float) -> dict[str, Any]:
        crosscoder = self.trainer.crosscoder
        n_features = crosscoder.n_groups * crosscoder.n_features * self.parallel.n_feature_shards
        return {
            "tokens": report.step * self.config.training.batch_tokens,
            "loss": report.loss,
            "unexplained": {str(site): value for site, value in report.unexplained_by_site.items()},
            "l0": report.l0_by_group,
            "l0_total": report.l0,
            "dead_fraction": report.n_dead / n_features,
            "terms": report.terms,
            "learning_rate": self.trainer.learning_rate_at(report.step - 1),
            "gradient_norm": report.gradient_norm,
            "tokens_per_second": tokens_per_second,
        }

    def _held_out_record(self) -> dict[str, Any]:
        """What the first process measures while the others wait; empty there."""
        crosscoder: Crosscoder | None = self.trainer.crosscoder
        if self.parallel.n_feature_shards > 1:
            crosscoder = whole(self.trainer.crosscoder, self.activation, self.parallel)
        if crosscoder is None or not self.parallel.is_first:
            return {}
        kept_RT = self.stream.kept(self.held_out_RT)
        scales = self.trainer.statistics.scales
        return evaluate(crosscoder, self.models, self.held_out_RT, kept_RT, scales=scales)

    def save_snapshot(self) -> None:
        """Write the state of the run."""
        snapshots.save(
            self.out / "snapshots",
            self.trainer.steps_done,
            self._for_snapshot(self.trainer.state_tensors()),
            {"tokens": self.trainer.steps_done * self.config.training.batch_tokens},
            parallel=self.parallel,
        )

    def _for_snapshot(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state as torch's distributed checkpoints want it: which part of each tensor this process holds."""
        view = {}
        for name, tensor in state.items():
            kind, _, own_name = name.partition(".")
            dim = feature_dim(own_name, tensor) if kind in ("crosscoder", "exp_avg", "exp_avg_sq") else None
            view[name] = self.parallel.distributed(tensor, feature_dim=1 if kind == "silent" else dim)
        return view

    def finish(self) -> Crosscoder:
        """Save the result."""
        part = self.trainer.finished()
        crosscoder = whole(part, self.activation, self.parallel)
        if crosscoder is not None and self.parallel.is_first:
            checkpoint.save(crosscoder, self.out / RESULT, training=self.config.to_dict())
        self.parallel.barrier()
        return part if crosscoder is None else crosscoder


class _Clock:
    """Tokens per second since the last record, checkpoints not counted."""

    def __init__(self, batch_tokens: int, step: int) -> None:
        self._batch_tokens, self._step = batch_tokens, step
        self._since = time.perf_counter()

    def tokens_per_second(self, step: int) -> float:
        """Speed of the steps since the last call."""
        now = time.perf_counter()
        speed = (step - self._step) * self._batch_tokens / max(now - self._since, 1e-9)
        self._since, self._step = now, step
        return speed

    def skip(self) -> None:
        """Leave out the time that passed."""
        self._since = time.perf_counter()
