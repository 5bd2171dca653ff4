"""Co-training: a language model is trained together with its crosscoder, so that it stays a model that its crosscoder explains.

A step of both minimises

    cross-entropy of the language model                                       (gradients to the language model)
    + reconstruction * variance left unexplained, per written site, summed    (to both)
    + cross_entropy * cross-entropy of the spliced model                      (to both)
    + kl * KL from the model's output to that of the spliced model            (to both)
    + the loss of `Trainer`, on activations taken as constants                (to the crosscoder)

so with all coefficients at 0 the language model is the one that would have been trained alone. `training.reads` names the sites
that a step replaces: all, a random subset, a random one. Scales and variances of the sites follow the language model as running
means. In turns (`language_model.turns`) only one of the two moves, and each goes through its schedule of step sizes at its own
pace; a crosscoder that has not moved yet has nothing to say, and no term is computed from it.

R rows, T tokens per row, K tokens kept, D site width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.hugging_face import (
    fingerprint_now,
    hugging_face_weights,
    randomise,
    trainable_weights,
)
from replacement.language_model.language_model import LanguageModel
from replacement.splicing.splice import Splice, run_and_read
from replacement.training.config import LanguageModelConfig, RunConfig, TrainingConfig
from replacement.training.model_losses import running_threshold_kept
from replacement.training.optimizers import decaying_adamw, make_moments, warmup_and_cosine
from replacement.training.parallel import SINGLE, Parallel
from replacement.training.reads import RowsRead, kept_rows, read_spliced
from replacement.training.scaling import Batch, Statistics, measure, sites_of
from replacement.training.trainer import Progress, Trainer
from replacement.validation.metrics import kl_divergence

FOLLOW = 0.1
"""Share by which scales and variances move to those of each batch while the language model moves."""


def begin_co_training(config: RunConfig, lm: LanguageModel, reads: str, *, parallel: Parallel) -> None:
    """Check that a run can train its language model, and give it the weights it begins with.

    Raises:
        ValueError: several processes, a spliced loss without a splice, or an architecture that cannot be trained in place.
    """
    settings = config.language_model
    assert settings is not None
    if parallel.mesh is not None:
        raise ValueError("language_model is trained in one process: expected no torchrun")
    if settings.needs_splice and reads == "clean":
        name = "kl" if settings.kl else "cross_entropy"
        raise ValueError(
            f"language_model.{name} needs a spliced model: expected a wiring that can be spliced and training.reads other than "
            f"'clean', not {config.crosscoder.wiring} and {reads!r}"
        )
    trainable_weights(lm)
    if settings.start == "random":
        randomise(lm, seed=config.training.seed)


class CoTrainer(Trainer):
    """Trains a crosscoder and its language model in place, one batch of whole rows per step."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        config: TrainingConfig,
        statistics: Statistics | None,
        *,
        settings: LanguageModelConfig,
        language_model: LanguageModel | None,
        parallel: Parallel = SINGLE,
    ) -> None:
        assert language_model is not None
        super().__init__(crosscoder, config, statistics, parallel=parallel, language_model=language_model)
        self.lm, self.settings = language_model, settings
        self.weights = trainable_weights(language_model)
        self.model_optimizer = decaying_adamw(
            self.weights.values(), learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        make_moments(self.model_optimizer)

    def moves(self, step: int) -> tuple[bool, bool]:
        """Whether the language model moves in a step, from 0, and whether the crosscoder does."""
        before, after = (steps_of_both(self.settings.turns, n) for n in (step, step + 1))
        return after[0] > before[0], after[1] > before[1]

    def learning_rate_at(self, step: int) -> float:
        """Adam step size of the crosscoder, which goes through its schedule at its own pace."""
        n_steps, turns = self.config.n_steps, self.settings.turns
        done, total = (steps_of_both(turns, n)[1] for n in (step, n_steps))
        return super().learning_rate_at(done * n_steps // max(1, total))

    def model_learning_rate_at(self, step: int) -> float:
        """AdamW step size of the language model at a step, from 0."""
        done, total = (steps_of_both(self.settings.turns, n)[0] for n in (step, self.config.n_steps))
        warmup = round(self.config.warmup_fraction * total)
        return self.settings.learning_rate * warmup_and_cosine(done, n_steps=total, warmup_steps=warmup)

    def step_on_rows(self, rows: RowsRead, *, replaced: tuple[Site, ...]) -> Progress:
        """One step of the language model, of the crosscoder, or of both from the same weights.

        Raises:
            ValueError: a loss is not finite.
        """
        step = self.steps_done
        model_moves, crosscoder_moves = self.moves(step)
        if not model_moves:
            return super().step_on_rows(rows, replaced=replaced)
        with self._gradients(crosscoder_moves), running_threshold_kept(self.crosscoder):
            terms, clean, inputs = self._joint_terms(rows, replaced)
            torch.stack(list(terms.values())).sum().backward()
        values = {name: float(term.detach()) for name, term in terms.items()}
        if not math.isfinite(sum(values.values())):
            raise ValueError(
                f"the loss of the language model is not finite at step {step} ({values}): lower language_model.learning_rate"
            )
        if crosscoder_moves:  # its gradients so far are those of the joint terms
            progress = self.step(_constants(clean), inputs=_constants(inputs), rows=rows)
        else:
            progress = self._without_crosscoder()
        self._update_model(step)
        return progress._replace(loss=progress.loss + sum(values.values()), terms=progress.terms | values)

    @contextmanager
    def _gradients(self, crosscoder_moves: bool) -> Iterator[None]:
        """Within it the language model's weights collect gradients, and the crosscoder's if it moves."""
        self.crosscoder.requires_grad_(crosscoder_moves)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
        self.crosscoder.requires_grad_(True)
        for weight in self.weights.values():
            weight.requires_grad_(False)

    def _joint_terms(self, rows: RowsRead, replaced: tuple[Site, ...]) -> tuple[dict[str, Tensor], Batch, Batch]:
        """Terms of the joint loss; the model's activations `[K, D]`, and those that the crosscoder reads."""
        settings = self.settings
        logits_RTV, seen = run_and_read(self.lm, rows.tokens_RT, sites_of(self.crosscoder))
        clean = kept_rows(self.crosscoder, seen, rows.keep_RT)
        inputs: Batch = clean
        self.statistics = self.statistics.toward(measure(self.crosscoder, [_constants(clean)]), FOLLOW)
        weights_RT = self._weights_of(rows.tokens_RT)
        terms = {"language_model": next_token_loss(logits_RTV, rows.tokens_RT, weights_RT)}
        if not self._has_begun():
            return terms, clean, inputs
        if replaced and settings.needs_splice:
            splice = Splice(
                self.lm,
                self.crosscoder,
                rows.tokens_RT,
                sites=replaced,
                scales=self.statistics.scales,
                keep_BT=rows.keep_RT,
            )
            spliced_RTV = splice.run()
            inputs = kept_rows(self.crosscoder, splice.inputs, rows.keep_RT)
            if settings.cross_entropy:
                loss = next_token_loss(spliced_RTV, rows.tokens_RT, weights_RT)
                terms["spliced_cross_entropy"] = settings.cross_entropy * loss
            if settings.kl:
                kl_RT = kl_divergence(logits_RTV, spliced_RTV, dtype=spliced_RTV.dtype)[:, :-1]
                terms["spliced_kl"] = settings.kl * _weighted_mean(kl_RT, weights_RT)
        elif replaced:
            inputs = read_spliced(self.lm, self.crosscoder, self.statistics, rows, replaced=replaced)
        if settings.reconstruction:
            terms["spliced_reconstruction"] = settings.reconstruction * self._unexplained(inputs, clean, rows)
        return terms, clean, inputs

    def _has_begun(self) -> bool:
        """Whether the crosscoder has moved, or moves in this step."""
        return steps_of_both(self.settings.turns, self.steps_done + 1)[1] > 0

    def _unexplained(self, reads: Batch, targets: Batch, rows: RowsRead) -> Tensor:
        """Variance left unexplained, summed over written sites; differentiable in the activations, too."""
        scales, variances = self.statistics.scales, self.statistics.variances
        wiring = self.crosscoder.wiring
        scaled = {site: reads[site] * scales[site] for site in wiring.read_sites}
        n_rows = int(rows.keep_RT.sum())
        reconstructions = self._reconstruct(scaled, n_rows, rows)[0]
        errors = [
            functional.mse_loss(y_KD, targets[site] * scales[site], reduction="sum") / (n_rows * variances[site])
            for site, y_KD in reconstructions.items()
        ]
        return torch.stack(errors).sum()

    def _weights_of(self, tokens_RT: Tensor) -> Tensor:
        """1 for the targets `[R, T - 1]` of the language model, which are all tokens after the first but padding."""
        tokenizer = self.lm.tokenizer
        padding = None if tokenizer is None else tokenizer.pad_token_id
        if padding is None or padding in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            return torch.ones_like(tokens_RT[:, 1:], dtype=self.lm.dtype)
        return (tokens_RT[:, 1:] != padding).to(self.lm.dtype)

    def _without_crosscoder(self) -> Progress:
        """What is told of a step in which the crosscoder is frozen."""
        self.steps_done += 1
        return Progress(
            step=self.steps_done,
            tokens=self.steps_done * self.config.step_tokens,
            loss=0.0,
            unexplained=math.nan,
            l0=0.0,
            n_dead=int((self.silent_GF >= self.config.dead_after_tokens).sum()),
            unexplained_by_site={},
            l0_by_group=[],
            terms={},
            gradient_norm=0.0,
        )

    def _update_model(self, step: int) -> None:
        for group in self.model_optimizer.param_groups:
            group["lr"] = self.model_learning_rate_at(step)
        nn.utils.clip_grad_norm_(self.weights.values(), self.config.gradient_clip)
        self.model_optimizer.step()
        self.model_optimizer.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """That of the crosscoder, the language model's weights and their moments."""
        tensors = super().state_tensors()
        tensors |= {f"language_model.{name}": tensor for name, tensor in hugging_face_weights(self.lm).items()}
        for name, weight in self.weights.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"language_model_{moment}.{name}"] = self.model_optimizer.state[weight][moment]
        return tensors

    def restore(self, state: Mapping[str, Tensor], steps_done: int) -> None:
        """Go on from a state; the optimizers have counted the steps in which their weights moved."""
        super().restore(state, steps_done)
        counts = steps_of_both(self.settings.turns, steps_done)
        for optimizer, count in zip((self.model_optimizer, self.optimizer), counts, strict=True):
            for moments in optimizer.state.values():
                moments["step"].fill_(count)

    def finished(self) -> Crosscoder:
        """A copy of the crosscoder as it is used, made for the language model as it is now."""
        crosscoder = super().finished()
        self.lm.fingerprint = crosscoder.model_fingerprint = fingerprint_now(self.lm)
        return crosscoder


def steps_of_both(turns: Sequence[int] | None, n_steps: int) -> tuple[int, int]:
    """How many of the first steps the language model moves in, and how many the crosscoder does.

    Args:
        turns: steps of the language model alone and of the crosscoder alone, in turn; both move in every step if None.
    """
    if turns is None:
        return n_steps, n_steps
    cycles, rest = divmod(n_steps, sum(turns))
    return cycles * turns[0] + min(rest, turns[0]), cycles * turns[1] + max(0, rest - turns[0])


def next_token_loss(logits_RTV: Tensor, tokens_RT: Tensor, weights_RT: Tensor) -> Tensor:
    """Weighted mean cross-entropy of every token after the first, in nats.

    Args:
        weights_RT: of the tokens after the first, `[R, T - 1]`.
    """
    losses_N = functional.cross_entropy(
        logits_RTV[:, :-1].to(weights_RT.dtype).flatten(0, 1), tokens_RT[:, 1:].flatten(), reduction="none"
    )
    return _weighted_mean(losses_N, weights_RT)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    values_N, weights_N = values.flatten(), weights.flatten()
    return (values_N * weights_N).sum() / weights_N.sum()


def _constants(batch: Batch) -> dict[Site, Tensor]:
    return {site: x_KD.detach() for site, x_KD in batch.items()}
