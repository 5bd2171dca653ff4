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
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder import checkpoint
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.lorsa import Lorsa
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import BatchTopK
from replacement.data.activation_cache import ActivationCache
from replacement.data.activation_stream import ActivationStream
from replacement.data.documents import special_ids
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
from replacement.training.reads import RowsRead, choose_reads, replaced_sites
from replacement.training.sample_start import start_at_samples
from replacement.training.scaling import Batch, calibrate, measure, sites_of
from replacement.training.sharding import feature_dim, local_part, plan, whole
from replacement.training.trainer import Progress, Trainer
from replacement.validation.fidelity import measure_fidelity

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
            self.source = open_tokens(config.data, self.models, default_context=default_context(config))
            config = fill_batches(config, self.source.context, whole_rows=not self._shuffles(config))
        else:
            self.source = open_tokens(config.data, self.models)
        self.held_out_RT = self.source.held_out()
        n_rows = -(-SCALE_TOKENS // self.source.context)
        self.first_rows_RT = next(self.source.blocks(n_rows, seed=config.training.seed)).tokens_RT
        with plan(parallel):
            self.fresh = build_crosscoder(config.crosscoder, self.models, self.held_out_RT, seed=config.training.seed)
        self.activation = self.fresh.activation
        self.begun_from = "" if config.crosscoder.start in STARTS else self.fresh.fingerprint
        self.config = self._with_choices(config) if is_new else config
        if config.data.cache and not self._shuffles(config):
            raise ValueError(
                "data.cache serves training on shuffled clean activations: set training.reads='clean', or no cache"
            )
        self.sites = sites_of(self.fresh)
        self.stream = self._open_stream(self.fresh.undecomposed_positions)
        self._check_text()

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
        names = [config.model] if isinstance(config.model, str) else config.model
        inputs = {
            f"the model {name}": run_folder.Input(lm.fingerprint, lm.has_fingerprint)
            for name, lm in zip(names, self.models.loaded, strict=True)
        }
        data = run_folder.digest(self.held_out_RT, self.first_rows_RT)  # counterparts of several tokenizers included
        if (where := config.crosscoder.start) not in STARTS:
            inputs[f"the crosscoder {where}"] = run_folder.Input(self.begun_from, self.begun_from.__eq__)
        return {**inputs, f"the data {config.data.source}": run_folder.Input(data, data.__eq__)}

    def start(self, step: int | None) -> None:
        """Prepare the trainer: from the snapshot of a step, or afresh."""
        if self.config.data.cache:
            self.stream.read_activations = self._cached()
        training, parallel = self.config.training, self.parallel
        crosscoder = local_part(self.fresh, parallel, seed=training.seed, device=self.device)
        statistics = None
        if step is None:
            mine = self._first_batches(part=parallel.data_rank, n_parts=parallel.n_data)
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
            start_at_samples(crosscoder, statistics, self._first_batches(), seed=training.seed)
        if step is not None:
            state = self.trainer.state_tensors()
            folder = self.out / run_folder.SNAPSHOTS
            snapshots.load(folder, step, self._for_snapshot(state), parallel=self.parallel)
            self.trainer.restore(state, step)

    def _shuffles(self, config: RunConfig) -> bool:
        """Whether steps take shuffled tokens; otherwise whole rows, to run the model on them or to attend over them."""
        needs_rows = any(loss.needs_rows for loss in config.training.losses) or config.crosscoder.wiring == "lorsa"
        return self.reads == "clean" and not needs_rows and config.language_model is None
        return self.reads == "clean" and not needs_rows

    def _read(self, rows_RT: Tensor, *, first_model: int = 0) -> dict[Site, Tensor]:
        sites = [site for site in self.sites if site.model >= first_model]
        with torch.no_grad():
            return self.models.read(self.source.by_tokenizer(rows_RT), sites)

    def _open_stream(self, undecomposed_positions: int) -> ActivationStream:
        data, training, n_data = self.config.data, self.config.training, self.parallel.n_data
        assert data.shards is not None
        if data.shards % n_data:
            raise ValueError(
                f"shards={data.shards} is not a multiple of the {n_data} processes that share the rows: set data.shards and "
                "training.batch_tokens to multiples of it"
            )
        share = data.shards // n_data
        first = share * self.parallel.data_rank
        return ActivationStream(
            self.source,
            self._read,
            batch_tokens=training.step_tokens,
            buffer_tokens=data.buffer_tokens,
            shards=data.shards,
            my_shards=range(first, first + share),
            seed=training.seed,
            excluded_ids=special_ids(self.models.first),
            undecomposed_positions=undecomposed_positions,
        )

    def _check_text(self) -> None:
        """Refuse text of unknown words only: a crosscoder would learn a constant, or nothing at all."""
        kept_RT = self.stream.kept(self.first_rows_RT)
        for number, (tokens_RT, place_RT) in enumerate(self.source.by_tokenizer(self.first_rows_RT)):
            lm = self.models.all[self.models.tokenizers.index(number)]
            unknown = getattr(lm.tokenizer, "unk_token_id", None)
            counterpart_RT = tokens_RT if place_RT is None else tokens_RT.gather(1, place_RT.clamp(min=0))
            if not set(counterpart_RT[kept_RT].tolist()) - {unknown}:
                raise ValueError(
                    f"{self.source.name}: none of the first {tokens_RT.numel():,} tokens is a word that {lm.name} knows; all "
                    "are special, padding or unknown tokens: is the text in a language and spelling that the model was made "
                    "for?"
                )

    def _cached(self) -> ActivationCache:
        """The activations of all rows on disk, computed by the first process if they are not there yet."""
        folder, fingerprint = Path(self.config.data.cache or ""), self.models.fingerprint
        if self.parallel.is_first:
            ActivationCache.build(folder, self.source, self._read, self.sites, fingerprint=fingerprint)
        self.parallel.barrier()
        return ActivationCache.open(folder, self.source, fingerprint=fingerprint, sites=self.sites)

    def _first_batches(self, *, part: int = 0, n_parts: int = 1) -> Iterator[Batch]:
        """Activations of the first rows of the data, or a part of them."""
        for chunk_RT in self.first_rows_RT[part::n_parts].split(32):
            kept_RT = self.stream.kept(chunk_RT)
            yield {site: x_RTD[kept_RT.to(x_RTD.device)] for site, x_RTD in self._read(chunk_RT).items()}

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
                log.write("train", report.step, self._training_record(report, clock.tokens_per_second(report.step)))
            with clock.paused():
                if at_checkpoint:
                    log.write("held_out", report.step, self._held_out_record(measuring))
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
        if self._shuffles(self.config):
            for batch in itertools.islice(self.stream.batches(start=done), left):
                yield partial(trainer.step, batch)
            return
        lm = self.models.first
        for tokens_RT, kept_RT in itertools.islice(self.stream.row_batches(start=done), left):
            tokens_RT, kept_RT = tokens_RT.to(lm.device), kept_RT.to(lm.device)
            replaced = replaced_sites(trainer.crosscoder, self.reads, seed=training.seed, step=trainer.steps_done)
            yield partial(trainer.step_on_rows, RowsRead(tokens_RT, kept_RT), replaced=replaced)

    def _training_record(self, report: Progress, tokens_per_second: float) -> dict[str, Any]:
        crosscoder = self.trainer.crosscoder
        n_features = crosscoder.n_groups * crosscoder.n_features * self.parallel.n_feature_shards
        return {
            "tokens": report.tokens,
            "loss": report.loss,
            "unexplained": {str(site): value for site, value in report.unexplained_by_site.items()},
            "l0": report.l0_by_group,
            "l0_total": report.l0,
            "dead_fraction": report.n_dead / n_features,
            "terms": report.terms,
            "learning_rate": self.trainer.learning_rate_at(report.step - 1),
            "gradient_norm": report.gradient_norm,
            "tokens_per_second": tokens_per_second,
            **self._aligned(self.stream.counts),
        }

    def _aligned(self, counts: tuple[list[int], int] | None) -> dict[str, Any]:
        """Tokens of text that each tokenizer made, and which of them no other tokenizer ends at the same character."""
        if counts is None:
            return {}
        n_text, n_aligned = counts
        names = [self.config.model[self.models.tokenizers.index(number)] for number in range(len(n_text))]
        return {
            "text_tokens": dict(zip(names, n_text, strict=True)),
            "not_aligned": {name: n - n_aligned for name, n in zip(names, n_text, strict=True)},
        }

    def _held_out_record(self, measuring: Callable[[int, int], None] | None) -> dict[str, Any]:
        """Reconstruction of held-out rows and the output with the crosscoder spliced in, measured by the first process while
        the others wait; empty there. Thresholds of BatchTopK are calibrated before, in every process."""
        if measuring is not None:
            measuring(0, 1)
        crosscoder: Crosscoder | None = self.trainer.crosscoder
        if self.parallel.n_feature_shards > 1:
            crosscoder = whole(self.trainer.crosscoder, self.activation, self.parallel)
        self._calibrate(crosscoder)
        if crosscoder is None or not self.parallel.is_first:
            return {}
        lm = self.models.first
        fidelity = measure_fidelity(
            lm,
            crosscoder,
            self.source.by_tokenizer(self.held_out_RT)[0].tokens_RT.to(lm.device),
            keep_RT=self.stream.kept(self.held_out_RT).to(lm.device),
            scales=self.trainer.statistics.scales,
            others=None if self.models.only else lambda rows: self._read(self.held_out_RT[rows], first_model=1),
            progress=measuring,
        )
        layout = self.source.layout
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
            **self._aligned(None if layout is None else layout.counts(self.held_out_RT)),
        }

    def _calibrate(self, crosscoder: Crosscoder | None) -> None:
        """Set the thresholds of BatchTopK: the first process measures them on its whole crosscoder and tells the others."""
        own = self.trainer.crosscoder
        if not isinstance(self.activation, BatchTopK) or own.threshold is None:
            return
        measured = []
        if self.parallel.is_first:
            assert crosscoder is not None
            assert crosscoder.threshold is not None
            n_rows = int(self.stream.kept(self.first_rows_RT).sum())
            calibrate(crosscoder, self.trainer.statistics, self._first_batches(), n_rows=n_rows)
            measured = crosscoder.threshold.tolist()
        own.threshold.copy_(torch.tensor(json.loads(self.parallel.from_first(json.dumps(measured)))))

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
