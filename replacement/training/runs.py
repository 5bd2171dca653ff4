"""A training run in a folder: data, steps, metrics, checkpoints, and going on exactly where it stopped.

    OUT/run.json            the settings, with what was chosen where they say nothing (see `defaults`)
    OUT/inputs.json         fingerprints of the models and the data
    OUT/metrics.jsonl       one line per record (see `metrics_log`)
    OUT/snapshots/          state of the run (see `snapshots`)
    OUT/crosscoder/         the result, once the run is finished
    OUT/language_model/     the language model, where it was trained, too (see `co_training`)
    OUT/.lock               held by the process that writes here (see `run_folder`)

The order of the data and every random choice are functions of (seed, step), so the state is the weights, the optimizer's
moments and the number of steps. A resumed run gives the weights of one that never stopped, bit for bit, on the same CPU
with the same number of threads and processes (GPU kernels may add in another order).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from replacement.crosscoder import checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.lorsa import Lorsa
from replacement.files import check_folder
from replacement.language_model.hugging_face import save_language_model
from replacement.threads import fit_threads
from replacement.training import run_folder, snapshots
from replacement.training.build import build_crosscoder, build_wiring, load_models, open_tokens
from replacement.training.co_training import CoTrainer, begin_co_training
from replacement.training.config import STARTS, RunConfig
from replacement.training.defaults import default_context, default_learning_rate, fill_batches
from replacement.training.head_start import start_at_heads
from replacement.training.metrics_log import MetricsLog
from replacement.training.pacing import Clock, stop_request
from replacement.training.parallel import Parallel, connect
from replacement.training.reads import RowsRead, choose_reads, replaced_sites, takes_shuffled_tokens
from replacement.training.run_data import RunData
from replacement.training.run_records import held_out_record, training_record
from replacement.training.sample_start import start_at_samples
from replacement.training.scaling import measure
from replacement.training.sharding import feature_dim, local_part, plan, whole
from replacement.training.trainer import Progress, Trainer

LOG_EVERY = 10
"""Steps between two records of training metrics."""


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
    measuring: Callable[[int, int], None] | None = None,
) -> Crosscoder:
    """Train a crosscoder as the settings say, save it in `OUT/crosscoder` and return it (processes that share the features,
    other than the first, return their part of it).

    >>> crosscoder = run(read_config("clt.toml"), "runs/clt")   # doctest: +SKIP

    Args:
        out: folder of the run; locked while the run lasts.
        resume: go on from the newest checkpoint in the folder, which must hold a run. A finished run is only read: its
            settings are compared, its models and data are not loaded. See `holds_run`.
        device: `cpu`, or `cuda`.
        feature_shards: processes that share the features, in a run started by `torchrun`; the others share the rows.
        loggers: copies of the metrics, `tensorboard` or `wandb`.
        progress: called after each step.
        measuring: called while held-out rows are measured, with the tokens done and in all.

    Raises:
        ValueError: settings that do not fit the model or the data, a model that cannot be replaced exactly, a folder in use
            or that cannot be written, nothing to resume, or a checkpoint of other settings, models or data.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written.
    """
    parallel = connect(feature_shards=feature_shards, device=device)
    out = Path(out)
    start = run_folder.find_start(config, out, resume=resume)  # mistakes are told before models are loaded
    if run_folder.is_finished(out):
        return checkpoint.load(out / run_folder.RESULT, device=device)
    parallel.barrier()  # the check below makes a folder and removes it, which no process must meet while it looks
    check_folder(out)
    run_folder.check_not_locked(out, parallel)
    n_threads = torch.get_num_threads()
    try:
        active = _Run(start.config, out, parallel, device=device, is_new=start.is_new)
        with run_folder.locked(out, parallel):
            step = run_folder.find_start(active.config, out, resume=resume).step
            run_folder.begin(active.config, out, active.inputs(), parallel)
            active.start(step)
            settings = active.config.to_dict()
            log = MetricsLog(out, last_step=step or 0, loggers=loggers, config=settings, silent=not parallel.is_first)
            with stop_request() as stop:
                active.go(log, stop, progress, measuring)
            return active.finish()
    finally:
        torch.set_num_threads(n_threads)


class _Run:
    """The parts of a run in progress; making it reads models and data, and writes nothing."""

    def __init__(self, config: RunConfig, out: Path, parallel: Parallel, *, device: str, is_new: bool) -> None:
        self.out, self.parallel, self.device = out, parallel, device
        self.models = load_models(config.model, wiring=config.crosscoder.wiring, device=device)
        fit_threads(max(shape.d_model for shape in self.models.shapes))
        self.reads = choose_reads(config.training, build_wiring(config.crosscoder, self.models.shapes), self.models)
        if config.language_model is not None:
            begin_co_training(config, self.models.first, self.reads, parallel=parallel)
        if is_new:
            source = open_tokens(config.data, self.models, default_context=default_context(config))
            config = fill_batches(config, source.context, whole_rows=not takes_shuffled_tokens(config, self.reads))
        else:
            source = open_tokens(config.data, self.models)
        self.names = [config.model] if isinstance(config.model, str) else config.model
        seed = config.training.seed
        self.data = RunData(self.models, source, names=self.names, seed=seed)
        with plan(parallel):
            self.fresh = build_crosscoder(config.crosscoder, self.models, self.data.held_out_RT, seed=seed)
        self.activation = self.fresh.activation
        self.begun_from = "" if config.crosscoder.start in STARTS else self.fresh.fingerprint
        self.config = self._with_choices(config) if is_new else config
        self.shuffles = takes_shuffled_tokens(self.config, self.reads)
        if config.data.cache and not self.shuffles:
            raise ValueError(
                "data.cache serves training on shuffled clean activations: set training.reads='clean', or no cache"
            )
        self.data.open_stream(self.config, self.fresh, parallel)

    def _with_choices(self, config: RunConfig) -> RunConfig:
        """The settings with what was chosen for this crosscoder, so that all is recorded."""
        n_features = self.fresh.n_features
        rate = config.training.learning_rate or default_learning_rate(config.training, n_features)
        return replace(
            config,
            crosscoder=replace(
                config.crosscoder, n_features=n_features, undecomposed_positions=self.fresh.undecomposed_positions
            ),
            training=replace(config.training, reads=self.reads, learning_rate=rate),
        )

    def inputs(self) -> dict[str, run_folder.Input]:
        """Fingerprints of what the settings name without saying what it holds, by what a message calls it."""
        config = self.config
        inputs = {
            f"the model {name}": run_folder.Input(lm.fingerprint, lm.has_fingerprint)
            for name, lm in zip(self.names, self.models.loaded, strict=True)
        }
        # Counterparts of several tokenizers are among these rows.
        data = run_folder.digest(self.data.held_out_RT, self.data.first_rows_RT)
        if (where := config.crosscoder.start) not in STARTS:
            inputs[f"the crosscoder {where}"] = run_folder.Input(self.begun_from, self.begun_from.__eq__)
        return {**inputs, f"the data {config.data.source}": run_folder.Input(data, data.__eq__)}

    def start(self, step: int | None) -> None:
        """Prepare the trainer: from the snapshot of a step, or afresh."""
        if self.config.data.cache:
            self.data.read_from_cache(Path(self.config.data.cache), self.parallel)
        training, parallel = self.config.training, self.parallel
        crosscoder = local_part(self.fresh, parallel, seed=training.seed, device=self.device)
        statistics = None
        if step is None:
            mine = self.data.first_batches(part=parallel.data_rank, n_parts=parallel.n_data)
            statistics = measure(crosscoder, mine, parallel=parallel)
        co_training = self.config.language_model
        make = Trainer if co_training is None else partial(CoTrainer, settings=co_training)
        self.trainer = make(crosscoder, training, statistics, parallel=parallel, language_model=self.models.only)
        where = self.config.crosscoder.start
        if statistics is not None and isinstance(crosscoder, Lorsa) and where == "heads":
            start_at_heads(crosscoder, self.models.first, statistics, seed=training.seed)
        if where not in ("random", "heads") and parallel.n_feature_shards > 1:
            raise ValueError(f"start={where!r} needs all features in one process: expected --feature-shards 1")
        if statistics is not None and where == "samples":
            start_at_samples(crosscoder, statistics, self.data.first_batches(), seed=training.seed)
        if step is not None:
            state = self.trainer.state_tensors()
            folder = self.out / run_folder.SNAPSHOTS
            snapshots.load(folder, step, self._for_snapshot(state), parallel=self.parallel)
            self.trainer.restore(state, step)

    def go(
        self,
        log: MetricsLog,
        stop: threading.Event,
        progress: Callable[[Progress], None] | None,
        measuring: Callable[[int, int], None] | None,
    ) -> None:
        """Train to the end, or until asked to stop."""
        trainer, training, every = self.trainer, self.config.training, self.config.checkpoint_every
        assert every is not None
        clock = Clock(training.step_tokens, trainer.steps_done)
        for step in self._steps(trainer.steps_done):
            report = step()
            if progress is not None:
                progress(report)
            at_checkpoint = report.step % every == 0 or report.step == training.n_steps
            if report.step % LOG_EVERY == 0 or at_checkpoint:
                record = training_record(trainer, self.data, report, clock.tokens_per_second(report.step))
                log.write("train", report.step, record)
            with clock.paused():
                if at_checkpoint:
                    record = held_out_record(trainer, self.data, self.activation, measuring)
                    log.write("held_out", report.step, record)
                if at_checkpoint or self.parallel.any(stop.is_set() or clock.wants_snapshot()):
                    clock.save(self.save_snapshot)
                    if self.parallel.any(stop.is_set()) and report.step < training.n_steps:
                        raise Interrupted(
                            f"stopped after {report.step} of {training.n_steps} steps; go on with --resume"
                        )

    def _steps(self, done: int) -> Iterator[Callable[[], Progress]]:
        """The remaining steps, each as a function that does it."""
        trainer, training = self.trainer, self.config.training
        left = training.n_steps - done
        if self.shuffles:
            for batch in itertools.islice(self.data.stream.batches(start=done), left):
                yield partial(trainer.step, batch)
            return
        lm = self.models.first
        for tokens_RT, kept_RT in itertools.islice(self.data.stream.row_batches(start=done), left):
            tokens_RT, kept_RT = tokens_RT.to(lm.device), kept_RT.to(lm.device)
            replaced = replaced_sites(trainer.crosscoder, self.reads, seed=training.seed, step=trainer.steps_done)
            yield partial(trainer.step_on_rows, RowsRead(tokens_RT, kept_RT), replaced=replaced)

    def save_snapshot(self) -> None:
        """Write the state of the run."""
        snapshots.save(
            self.out / run_folder.SNAPSHOTS,
            self.trainer.steps_done,
            self._for_snapshot(self.trainer.state_tensors()),
            {"tokens": self.trainer.steps_done * self.config.training.step_tokens},
            parallel=self.parallel,
        )

    def _for_snapshot(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state as torch's distributed checkpoints want it: which part of each tensor this process holds."""
        view = {}
        for name, tensor in state.items():
            kind, _, tensor_name = name.partition(".")
            dim = feature_dim(tensor_name, tensor) if kind in ("crosscoder", "exp_avg", "exp_avg_sq") else None
            view[name] = self.parallel.distributed(tensor, feature_dim=1 if kind == "silent" else dim)
        return view

    def finish(self) -> Crosscoder:
        """Save the result."""
        part = self.trainer.finished()
        if self.config.language_model is not None:
            save_language_model(self.models.first, self.out / run_folder.LANGUAGE_MODEL)
        crosscoder = whole(part, self.activation, self.parallel)
        if crosscoder is not None and self.parallel.is_first:
            checkpoint.save(crosscoder, self.out / run_folder.RESULT, training=self.config.to_dict())
        self.parallel.barrier()
        return part if crosscoder is None else crosscoder
