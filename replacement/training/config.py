"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from replacement.training.losses import Penalty


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Settings of `train`; the batch size is that of the batches given.

    Raises:
        ValueError: a value outside its range.
    """

    n_steps: int
    """Optimizer steps; one batch each."""
    learning_rate: float = 2e-3
    """Peak Adam step size, for inputs and outputs of mean norm sqrt(D)."""
    warmup_steps: int = 100
    """Steps of linear rise from 0 to the peak."""
    decay_fraction: float = 0.5
    """Last share of the steps (0 to 1), over which the step size falls linearly to 0."""
    gradient_clip: float = 1.0
    """Largest gradient norm over all weights."""
    scale_batches: int = 4
    """Batches that measure the scale, mean and variance of every site; they are trained on as well."""
    penalty: Penalty | None = None
    """Sparsity penalty, for activations that do not fix the number of active features."""
    penalty_warmup: float = 0.5
    """First share of the steps (0 to 1), over which the penalty rises linearly from 0."""
    dead_after_tokens: int = 200_000
    """Tokens without firing after which a feature counts as dead."""
    auxiliary_k: int = 32
    """Dead features per group and token that the auxiliary loss trains to explain the error."""
    auxiliary_coefficient: float = 1 / 32
    """Weight of the auxiliary loss; 0 turns it off."""

    def __post_init__(self) -> None:
        for name in ("n_steps", "scale_batches", "dead_after_tokens", "auxiliary_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "auxiliary_coefficient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("decay_fraction", "penalty_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """Step size at a step, from 0: warm-up, plateau, linear decay that would reach 0 at step `n_steps`."""
        rise = (step + 1) / (self.warmup_steps + 1)
        decay_steps = self.decay_fraction * self.n_steps
        fall = (self.n_steps - step) / decay_steps if decay_steps else 1.0
        return self.learning_rate * min(1.0, rise, fall)

    def penalty_weight_at(self, step: int) -> float:
        """Share of the penalty in force at a step, from 0."""
        rising_steps = self.penalty_warmup * self.n_steps
        return min(1.0, (step + 1) / rising_steps) if rising_steps else 1.0
