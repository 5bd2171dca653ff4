"""Settings of a training run: data, crosscoder and optimisation, each checked where it is declared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from replacement.crosscoder.activation import Activation, TopK
from replacement.training.losses import Auxiliary, Loss

READS = ("clean", "propagated", "subset")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the tokens come from, and how they become batches."""

    source: str | list[str] = "demo"
    """Text files (path, pattern or list), a Hugging Face dataset (a saved folder, or `hf:NAME` on the hub), token ids in
    `.npy` or `.safetensors` files, or `demo`, the corpus of the demo model; see `open_source`."""
    text_field: str = "text"
    """Column of a dataset that holds the text."""
    context: int | None = None
    """Tokens per row; by default the width of stored rows, and the model's context, at most 512, for text and flat ids."""
    buffer_tokens: int = 131_072
    """Tokens in the shuffle buffer; memory is this times the widths of all sites."""
    shards: int = 8
    """Independent shuffle buffers; each batch takes an equal part of every one. Data parallel runs need a divisor of it, and
    the batches do not depend on the number of processes."""
    held_out_rows: int = 128
    """Rows set aside to measure on."""
    cache: str | None = None
    """Folder that keeps the activations of stored token rows between runs, in bfloat16; None computes them anew."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "buffer_tokens", "shards", "held_out_rows")
        if self.context is not None and self.context < 2:
            raise ValueError(f"context must be 2 or more tokens, got {self.context}")


@dataclass(kw_only=True, slots=True)
class CrosscoderConfig:
    """Which crosscoder is trained."""

    wiring: str = "strictly_causal"
    """Family: `autoencoder`, `transcoder`, `per_layer`, `strictly_causal`, `weakly_causal`, `attention`, `acausal`,
    `model_diffing`."""
    read: str | None = None
    """Site kind that is read (and, for families that read what they write, written); the family's default if None."""
    layers: list[int] | None = None
    """Layers of an autoencoder, transcoder or model-diffing crosscoder."""
    n_features: int | None = None
    """Features per group F; 16 times the width of the residual stream if None."""
    activation: Activation = field(default_factory=lambda: TopK(16))
    """Table with `name` (`topk`, `batchtopk`, `jumprelu`, `relu`) and its parameters, such as `k`."""
    tied: bool = False
    """One decoder per written site, shared by all groups."""
    skip: bool = False
    """Linear maps from reads to writes."""
    undecomposed_positions: int | None = None
    """First positions of a prompt without features; 1 where prompts begin with a special token, else 0, if None."""

    def __post_init__(self) -> None:
        if self.n_features is not None:
            _at_least(self, 1, "n_features")


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Settings of the optimisation.

    Raises:
        ValueError: a value outside its range.
    """

    n_tokens: int
    """Tokens trained on. Padding and special tokens are not counted among shuffled tokens; they are where whole rows are read
    (`reads` other than `clean`, or a loss that needs whole rows), although no crosscoder is trained on them."""
    batch_tokens: int = 4096
    """Tokens per optimizer step, over all processes; where whole rows are read, left-out tokens of theirs included."""
    learning_rate: float | None = None
    """Peak Adam step size, for inputs and outputs of mean norm sqrt(D); `0.1 / sqrt(F)` if None."""
    warmup_fraction: float = 0.02
    """First share of the steps (0 to 1), over which the step size rises linearly from 0."""
    decay_fraction: float = 0.5
    """Last share of the steps (0 to 1), over which the step size falls linearly to 0."""
    gradient_clip: float = 1.0
    """Largest gradient norm over all weights."""
    losses: list[Loss] = field(default_factory=lambda: [Auxiliary()])
    """Terms besides the reconstruction: tables with `name` (`l1`, `l2`, `tanh`, `preactivation`, `auxiliary`, `jacobian`,
    `output_kl`), `coefficient` and other parameters."""
    sparsity_warmup: float = 0.5
    """First share of the steps (0 to 1), over which sparsity penalties rise linearly from 0."""
    dead_after_tokens: int = 200_000
    """Tokens without firing after which a feature counts as dead."""
    reads: str | None = None
    """What the crosscoder reads while training: `clean` activations, the stream `propagated` through its own earlier
    layers, or a random `subset` of layers replaced in each step. If None, `subset` for crosscoders that replace the MLPs of
    several layers (best overall, see the README), `clean` for others."""
    autocast: bool = False
    """Encode in bfloat16: the choice of active features; their values and gradients stay in float32."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and random subsets."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "n_tokens", "batch_tokens", "dead_after_tokens")
        for name in ("learning_rate", "gradient_clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_fraction", "decay_fraction", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.reads is not None and self.reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {self.reads!r}")
        names = [loss.name for loss in self.losses]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"losses names {twice[0]} {names.count(twice[0])} times: expected each loss at most once")
        if self.n_tokens < self.batch_tokens:
            raise ValueError(f"n_tokens={self.n_tokens} is less than one batch of {self.batch_tokens}")

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.n_tokens // self.batch_tokens

    def peak_learning_rate(self, n_features: int) -> float:
        """Peak step size for groups of F features."""
        return 0.1 / math.sqrt(n_features) if self.learning_rate is None else self.learning_rate

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak at a step, from 0: warm-up, plateau, linear decay that would reach 0 at step `n_steps`."""
        rise = (step + 1) / (self.warmup_fraction * self.n_steps + 1)
        decay_steps = self.decay_fraction * self.n_steps
        fall = (self.n_steps - step) / decay_steps if decay_steps else 1.0
        return min(1.0, rise, fall)

    def sparsity_weight_at(self, step: int) -> float:
        """Share of the sparsity penalties in force at a step, from 0."""
        rising_steps = self.sparsity_warmup * self.n_steps
        return min(1.0, (step + 1) / rising_steps) if rising_steps else 1.0


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be {least} or more, got {getattr(config, name)}")
