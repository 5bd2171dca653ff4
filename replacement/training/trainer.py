"""Optimizer steps of a crosscoder on batches of activations. B rows, D site width, F features per group, G groups.

A step is: scale, encode, decode, losses, backward, clip, Adam. What decides the next step is `Trainer.state_tensors` and the
number of steps done, nothing else: no random state is kept, and every random choice is a function of (seed, step).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import LanguageModel
from replacement.training.config import TrainingConfig
from replacement.training.losses import StepState, reconstruction_losses
from replacement.training.optimizers import make_moments
from replacement.training.parallel import SINGLE, Parallel
from replacement.training.reads import RowsRead, read_rows
from replacement.training.scaling import (
    Batch,
    Statistics,
    calibrate,
    fold,
    measure,
    scale_sites,
    scaled,
    sites_of,
    start,
)

SCALE_BATCHES = 4
"""First batches that measure the scale, mean and variance of every site; they are trained on as well."""


class Progress(NamedTuple):
    """What one step did."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained on so far."""
    loss: float
    """Loss of this batch, all terms."""
    unexplained: float
    """Fraction of variance unexplained in this batch, averaged over written sites."""
    l0: float
    """Active features per row, summed over groups."""
    n_dead: int
    """Features that have not fired within `dead_after_tokens`."""
    unexplained_by_site: dict[Site, float]
    """Fraction of variance unexplained per written site."""
    l0_by_group: list[float]
    """Active features per row of each group."""
    terms: dict[str, float]
    """Value of every other loss, coefficient included."""
    gradient_norm: float
    """Norm of the gradient before clipping."""


class Trainer:
    """Trains a crosscoder in place, one batch per step.

    The crosscoder lives in scaled activations until `finished` returns a copy of it for the model's own.

    Args:
        crosscoder: a fresh one (decoder zero), or a trained one to go on with.
        statistics: scale, mean and variance of every site, from `scaling.measure`; None for a run that is about to be
            restored.
        parallel: this process's place in the run.
        language_model: the original model, for losses that need it.

    Raises:
        ValueError: an activation function that only published crosscoders have.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        config: TrainingConfig,
        statistics: Statistics | None,
        *,
        parallel: Parallel = SINGLE,
        language_model: LanguageModel | None = None,
    ) -> None:
        if not crosscoder.activation.is_trainable:
            raise ValueError(
                f"cannot train a crosscoder with the activation {crosscoder.activation.to_dict()}: it can only be read"
            )
        if statistics is None:
            statistics = Statistics.blank(crosscoder)
        else:
            start(crosscoder, statistics)
        self.crosscoder, self.config, self.statistics = crosscoder.train(), config, statistics
        self.parallel, self.language_model = parallel, language_model
        self.steps_done = 0
        self._peak = config.peak_learning_rate(crosscoder.n_features * parallel.n_feature_shards)
        on_cpu_or_cuda = crosscoder.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(crosscoder.parameters(), lr=self._peak, fused=on_cpu_or_cuda)
        shape = (crosscoder.n_groups, crosscoder.n_features)
        self.silent_GF = torch.zeros(shape, dtype=torch.int64, device=crosscoder.device)
        """Tokens since each feature fired."""
        shared = {id(p) for p in (*crosscoder.b_dec, *(crosscoder.W_skip if crosscoder.skip else ()))}
        self._replicated = [p for p in crosscoder.parameters() if id(p) in shared]
        self._sharded = [p for p in crosscoder.parameters() if id(p) not in shared]

    def step(self, batch: Batch, *, rows: RowsRead | None = None, inputs: Batch | None = None) -> Progress:
        """One optimizer step on this process's share of a batch.

        Args:
            batch: `{site: [B, D]}`, unscaled, for every read and written site; `[R T, D]` at sites that are read by a
                crosscoder whose rows are whole prompts.
            rows: the tokens behind the batch, for losses that need them.
            inputs: what the crosscoder reads instead of the batch's own activations, such as a propagated stream.

        Raises:
            ValueError: a site is missing, or the loss is not finite.
        """
        # Targets and reconstructions are let go before the gradients are made: that is when memory peaks.
        loss, progress = self._loss(batch, rows, inputs)
        if not math.isfinite(progress.loss):
            raise ValueError(
                f"the loss is {progress.loss} at step {self.steps_done}: lower the learning rate or check the activations"
            )
        return progress._replace(gradient_norm=self._update(loss))

    def step_on_rows(self, rows: RowsRead, *, replaced: tuple[Site, ...]) -> Progress:
        """One optimizer step on whole rows of tokens, read from the language model with some sites replaced."""
        lm, crosscoder = self.language_model, self.crosscoder
        assert lm is not None
        batch, inputs = read_rows(lm, crosscoder, self.statistics, rows, replaced=replaced)
        return self.step(batch, inputs=inputs, rows=rows)

    def _loss(self, batch: Batch, rows: RowsRead | None, inputs: Batch | None) -> tuple[Tensor, Progress]:
        state, losses = self._forward(batch, rows, inputs)
        return torch.stack(list(losses.values())).sum(), self._report(state, self._values(losses))

    def _values(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Each term over all processes; a sum over features has a part in every process that shares them."""
        local = torch.stack([value.detach() for value in losses.values()])
        is_part = {loss.name for loss in self.config.losses if loss.sums_over_features}
        over_features = self.parallel.sum_over_features(local)
        mask = torch.tensor([name in is_part for name in losses], device=local.device)
        return dict(
            zip(losses, self.parallel.sum_over_data(torch.where(mask, over_features, local)).tolist(), strict=True)
        )

    def _forward(
        self, batch: Batch, rows: RowsRead | None, inputs: Batch | None
    ) -> tuple[StepState, dict[str, Tensor]]:
        crosscoder, config = self.crosscoder, self.config
        whole = scaled(crosscoder, batch, self.statistics)
        reads = (
            whole
            if inputs is None
            else whole | scale_sites(crosscoder, inputs, self.statistics, crosscoder.wiring.read_sites)
        )
        n_rows = len(whole[crosscoder.wiring.write_sites[0]])
        counts = self.parallel.counts_over_data(n_rows)
        reconstructions, features = self._reconstruct(reads, n_rows, rows)
        self.silent_GF = self.parallel.least_over_data(_count_silence(self.silent_GF, features, config.step_tokens))
        state = StepState(
            crosscoder=crosscoder,
            inputs={site: reads[site] for site in crosscoder.wiring.read_sites},
            targets={site: whole[site] for site in crosscoder.wiring.write_sites},
            reconstructions=reconstructions,
            features=features,
            dead_GF=self.silent_GF >= config.dead_after_tokens,
            variances=self.statistics.variances,
            scales=self.statistics.scales,
            n_rows=sum(counts),
            rows_before=sum(counts[: self.parallel.data_rank]),
            step=self.steps_done,
            seed=config.seed,
            parallel=self.parallel,
            language_model=self.language_model,
            tokens_RT=None if rows is None else rows.tokens_RT,
            keep_RT=None if rows is None else rows.keep_RT,
        )
        losses = {str(site): loss for site, loss in reconstruction_losses(state).items()}
        for loss in config.losses:
            weight = config.sparsity_weight_at(self.steps_done) if loss.ramps else 1.0
            losses[loss.name] = weight * loss(state)
        return state, losses

    def _reconstruct(
        self, reads: Mapping[Site, Tensor], n_rows: int, rows: RowsRead | None
    ) -> tuple[dict[Site, Tensor], Features]:
        crosscoder, keep_R = self.crosscoder, None
        if crosscoder.reads_prompts:
            if rows is None:
                raise ValueError(f"a {crosscoder.wiring.name} crosscoder is trained on whole rows of tokens: give them")
            positions_R, keep_R = rows.positions(), rows.keep_RT.flatten()
        else:  # rows are shuffled tokens, none of them among the first positions of a prompt
            positions_R = torch.full((n_rows,), crosscoder.undecomposed_positions, device=crosscoder.device)
        with torch.autocast(crosscoder.device.type, torch.bfloat16, enabled=self.config.autocast):
            features = crosscoder.encode(reads, positions=positions_R, keep=keep_R)
        features = features if keep_R is None else features.of_rows(keep_R)
        reconstructions, skipped = crosscoder.decode(features), crosscoder.skip_contribution(reads)
        for site, y_BD in skipped.items():
            reconstructions[site] = reconstructions[site] + y_BD
        return reconstructions, features

    def learning_rate_at(self, step: int) -> float:
        """Adam step size at a step, from 0."""
        return self._peak * self.config.learning_rate_factor(step)

    def _update(self, loss: Tensor) -> float:
        """Take the step; the norm of the gradient before clipping."""
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.learning_rate_at(self.steps_done)
        loss.backward()
        self.parallel.sum_gradients(self.crosscoder.parameters())
        norm = self.parallel.clip_gradients(self._sharded, self._replicated, self.config.gradient_clip)
        self.optimizer.step()
        if self.crosscoder.activation.learns_threshold and self.crosscoder.threshold is not None:
            # Below 0 a feature would fire with negative activations, and penalties would pay for it.
            self.crosscoder.threshold.data.clamp_(min=0)
        self.optimizer.zero_grad()  # now, so that no gradients lie about during the next forward pass
        self.steps_done += 1
        return float(norm)

    def _report(self, state: StepState, values: dict[str, float]) -> Progress:
        features, parallel = state.features, self.parallel
        counts_G = torch.bincount(features.group[features.activation.detach() > 0], minlength=features.n_groups)
        counts_G = parallel.sum_over_features(parallel.sum_over_data(counts_G))
        l0_by_group = [count / state.n_rows for count in counts_G.tolist()]
        by_site = {site: values.pop(str(site)) for site in state.reconstructions}
        return Progress(
            step=self.steps_done + 1,
            tokens=(self.steps_done + 1) * self.config.step_tokens,
            loss=sum(by_site.values()) + sum(values.values()),
            unexplained=sum(by_site.values()) / len(by_site),
            l0=sum(l0_by_group),
            n_dead=int(parallel.sum_over_features(state.dead_GF.sum())),
            unexplained_by_site=by_site,
            l0_by_group=l0_by_group,
            terms=values,
            gradient_norm=math.nan,  # not known before the step is taken
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that decides the next step besides `steps_done`: weights, moments, silence, statistics."""
        make_moments(self.optimizer)
        tensors = {f"crosscoder.{name}": value.detach() for name, value in self.crosscoder.state_dict().items()}
        for name, parameter in self.crosscoder.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return tensors | {"silent": self.silent_GF} | self.statistics.to_tensors()

    def restore(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Go on from a state: the dictionary of `state_tensors`, filled in place with the values of another run."""
        self.steps_done = steps_done
        self.statistics = Statistics.from_tensors(state, sites_of(self.crosscoder))
        for parameter in self.crosscoder.parameters():
            self.optimizer.state[parameter]["step"].fill_(steps_done)

    def finished(self) -> Crosscoder:
        """A copy of the crosscoder with the scales folded in, in evaluation mode."""
        crosscoder = copy.deepcopy(self.crosscoder)
        crosscoder.zero_grad(set_to_none=True)
        fold(crosscoder, self.statistics.scales)
        return crosscoder.eval()


def train(
    crosscoder: Crosscoder,
    batches: Iterable[Batch],
    config: TrainingConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Crosscoder:
    """Train a crosscoder on an iterator of batches and return it, with the scales folded in, in evaluation mode.

    For runs with checkpoints, metrics and data of their own see `training.runs`. Equal weights, batches and settings give
    equal results.

    Args:
        batches: shuffled tokens, `{site: [B, D]}` for every read and written site; one is used per step.
        progress: called after each step.

    Raises:
        ValueError: no batches or too few, a batch without a site, or a loss that is not finite.
    """
    stream = iter(batches)
    first = list(itertools.islice(stream, min(SCALE_BATCHES, config.n_steps)))
    trainer = Trainer(crosscoder, config, measure(crosscoder, first))
    for batch in itertools.islice(itertools.chain(first, stream), config.n_steps):
        report = trainer.step(batch)
        if progress is not None:
            progress(report)
    if trainer.steps_done < config.n_steps:
        raise ValueError(f"the batches ran out after {trainer.steps_done} of {config.n_steps} steps")
    n_rows = sum(len(next(iter(batch.values()))) for batch in first)
    calibrate(crosscoder, trainer.statistics, first, n_rows=n_rows)
    return trainer.finished()


def _count_silence(silent_GF: Tensor, features: Features, n_rows: int) -> Tensor:
    """Tokens since each feature fired, after `n_rows` more; JumpReLU training also lists features of value 0."""
    silent_GF = silent_GF + n_rows
    fired_S = features.activation.detach() > 0
    silent_GF[features.group[fired_S], features.index[fired_S]] = 0
    return silent_GF
