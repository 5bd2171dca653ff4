"""The settings of a training run, each with its unit and checked where it is declared.

The docstring below a setting begins with a sentence that `replacement train --help` shows (see `settings_table`). Settings that
are left out are filled in when the run begins (see `defaults`), and recorded with it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from replacement.crosscoder.activation import Activation
from replacement.crosscoder.families import ADAPTERS
from replacement.crosscoder.topk import TopK
from replacement.training.dead_features import Auxiliary
from replacement.training.losses import Loss

MOST_HELD_OUT_ROWS = 1_000_000
"""They are held in memory, and the demo's corpus would go on generating them."""
READS = ("clean", "propagated", "subset", "one")
STARTS = ("random", "samples", "heads")
LANGUAGE_MODEL_STARTS = ("trained", "random")
ROW_FAMILIES = ("per_layer", "strictly_causal", "attention", "joint", "lorsa", *ADAPTERS)
"""Families whose steps take whole rows by default, if the model has several layers: they replace its layers together."""
N_STEPS, SMALLEST_BATCH, LARGEST_BATCH = 1000, 256, 4096
"""Steps that the default batch aims at, and its bounds in tokens."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the tokens come from, and how they become batches."""

    source: Annotated[str | list[str], "text"] = "demo"
    """Text files, token ids, a Hugging Face dataset (a folder or `hf:NAME`), or `demo`. Files are given by path, folder,
    pattern or list; `demo` is the corpus of the demo model; see `open_source`."""
    text_field: Annotated[str, "text"] = "text"
    """Column of a dataset that holds the text."""
    context: Annotated[int | None, "tokens"] = None
    """Tokens per row; by default the width of stored rows, or else an eighth of a batch, at most the model's context."""
    buffer_tokens: Annotated[int, "tokens"] = 131_072
    """Size of the shuffle buffer. Its memory is this times the widths of all sites."""
    shards: Annotated[int | None, "buffers"] = None
    """Independent shuffle buffers, each of which gives an equal part of every batch; by default 8, or what divides a batch.
    Data parallel runs need a divisor of it, and the batches do not depend on the number of processes."""
    held_out_rows: Annotated[int, "rows"] = 128
    """Rows set aside to measure on."""
    cache: Annotated[str | None, "folder"] = None
    """Folder that keeps the activations of stored token rows between runs, in bfloat16; by default they are computed
    anew."""

    def __post_init__(self) -> None:
        _check_above(self, 1, "buffer_tokens", "shards", "held_out_rows")
        _check_above(self, 2, "context", unit=" tokens")
        if self.held_out_rows > MOST_HELD_OUT_ROWS:
            raise ValueError(f"held_out_rows must be at most {MOST_HELD_OUT_ROWS:_}, got {self.held_out_rows}")
        for name in ("cache", "text_field"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{name} must be a name or left out, got {value!r}")


@dataclass(kw_only=True, slots=True)
class CrosscoderConfig:
    """Which crosscoder is trained."""

    wiring: Annotated[str, "name"] = "strictly_causal"
    """Family: `autoencoder`, `transcoder`, `per_layer`, `strictly_causal`, `weakly_causal`, `attention`, `joint`, `lorsa`,
    `acausal`, `model_diffing`, `adapter` or `cross_layer_adapter`."""
    read: Annotated[str | None, "site"] = None
    """Kind of site that is read; by default what suits the family. Families that read what they write also write it."""
    layers: Annotated[list[int] | None, "layers"] = None
    """Layers of an autoencoder, transcoder, adapter or acausal crosscoder, or one for each model of a model-diffing
    crosscoder; by default all, or the middle one."""
    n_features: Annotated[int | None, "features"] = None
    """Features per group F, the same in every group; by default 16 times the width of the residual stream."""
    activation: Annotated[Activation, "table"] = field(default_factory=lambda: TopK(16))
    """Table with `name` (`topk`, `batchtopk`, `jumprelu`, `relu`) and its parameters, such as `k`: one number, or a list with
    one for each group."""
    tied: Annotated[bool, "true or false"] = False
    """Whether all groups share one decoder per written site."""
    skip: Annotated[bool, "true or false"] = False
    """Whether linear maps lead from reads to writes beside the features."""
    start: Annotated[str, "name"] = "random"
    """Where features begin: at `random` directions, at tokens of the data (`samples`), at the model's own `heads` (of a lorsa),
    or as in a crosscoder's folder, which is then trained further. `samples`: as detectors of tokens; `heads`: with queries,
    keys and directions of values of the model's heads."""
    query_key_groups: Annotated[int | None, "groups"] = None
    """Groups of a lorsa's heads that share queries and keys; by default 4 times the heads of a layer."""
    query_key_width: Annotated[int | None, "channels"] = None
    """Channels of a lorsa's queries and keys; by default as many as the model's heads have."""
    undecomposed_positions: Annotated[int | None, "tokens"] = None
    """First positions of a prompt without features; by default 1 where prompts begin with a special token, else 0."""

    def __post_init__(self) -> None:
        _check_above(self, 1, "n_features", "query_key_groups", "query_key_width")
        _check_above(self, 0, "undecomposed_positions")
        if self.start not in STARTS and not Path(self.start).is_dir():
            raise ValueError(
                f"start must be one of {', '.join(STARTS)}, or the folder of a crosscoder, got {self.start!r}"
            )
        if self.start == "samples" and self.tied:
            raise ValueError("start='samples' needs decoders of each group's own, got tied=true")
        is_lorsa = self.wiring == "lorsa"
        for name in () if is_lorsa else ("query_key_groups", "query_key_width"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for the wiring lorsa, got the wiring {self.wiring}")
        if self.start == ("samples" if is_lorsa else "heads"):
            raise ValueError(f"start={self.start!r} is not for the wiring {self.wiring}")
        if is_lorsa and self.activation.name == "batchtopk":
            raise ValueError("the wiring lorsa takes the activation topk, jumprelu or relu, got batchtopk")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers must name one layer or more, counted from 0; got {self.layers}")


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Settings of the optimisation.

    Raises:
        ValueError: a value outside its range.
    """

    n_tokens: Annotated[int, "tokens"]
    """Tokens trained on. Padding and special tokens are not counted among shuffled tokens; they are where whole rows are read
    (`reads` other than `clean`, or a loss that needs whole rows), although no crosscoder is trained on them."""
    batch_tokens: Annotated[int | None, "tokens"] = None
    """Tokens per optimizer step, over all processes; by default for 1,000 steps, a power of two from 256 to 4,096. Where whole
    rows are read, their left-out tokens are included."""
    learning_rate: Annotated[float | None, "per step"] = None
    """Peak step size of Adam, for inputs and outputs of mean norm sqrt(D); by default `0.1 / sqrt(F)`, or up to twice
    that in runs of fewer than 4,000 steps."""
    warmup_fraction: Annotated[float, "share of steps"] = 0.02
    """First part of the run, over which the step size rises linearly from 0."""
    decay_fraction: Annotated[float, "share of steps"] = 0.5
    """Last part of the run, over which the step size falls linearly to 0."""
    gradient_clip: Annotated[float, "norm"] = 1.0
    """Largest gradient norm over all weights."""
    losses: Annotated[list[Loss], "tables"] = field(default_factory=lambda: [Auxiliary()])
    """Terms besides the reconstruction: tables with `name` (`l1`, `l2`, `tanh`, `distance`, `preactivation`, `auxiliary`,
    `strongest`, `jacobian`, `output_kl`), `coefficient` and other parameters."""
    sparsity_warmup: Annotated[float, "share of steps"] = 0.5
    """First part of the run, over which sparsity penalties rise linearly from 0."""
    dead_after_tokens: Annotated[int, "tokens"] = 200_000
    """Tokens without firing after which a feature counts as dead."""
    reads: Annotated[str | None, "name"] = None
    """What the crosscoder reads: `clean` activations, a stream `propagated` through its own earlier layers, or one in which
    each step replaces a random `subset` of layers, or a random `one`. By default `subset` for crosscoders that replace the
    MLPs of several layers (best overall, see the README), `clean` for others."""
    autocast: Annotated[bool, "true or false"] = False
    """Whether active features are chosen in bfloat16; their values and gradients stay in float32."""
    seed: Annotated[int, "number"] = 0
    """Seed of the initial weights, the order of the data and random subsets."""

    def __post_init__(self) -> None:
        _check_above(self, 1, "n_tokens", "batch_tokens", "dead_after_tokens")
        _check_above(self, 0, "seed")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2^32, got {self.seed}")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        for name in ("warmup_fraction", "decay_fraction", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.reads is not None and self.reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {self.reads!r}")
        names = [loss.name for loss in self.losses]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"losses names {repeated[0]} {names.count(repeated[0])} times: expected each loss at most once"
            )
        if self.n_tokens < self.step_tokens:
            raise ValueError(f"n_tokens={self.n_tokens} is less than one batch of {self.step_tokens}")

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step: `batch_tokens`, or its default where no run has filled it in."""
        return self.batch_tokens or self.default_batch_tokens

    @property
    def default_batch_tokens(self) -> int:
        """The power of two nearest to a thousandth of the budget, which gives a short run steps enough, from 256 to 4,096."""
        nearest = 2 ** round(math.log2(self.n_tokens / N_STEPS))
        return int(min(max(nearest, SMALLEST_BATCH), LARGEST_BATCH, self.n_tokens))

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.n_tokens // self.step_tokens

    def peak_learning_rate(self, n_features: int) -> float:
        """Peak step size for groups of F features; `0.1 / sqrt(F)` where no run has filled it in."""
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


@dataclass(kw_only=True, slots=True)
class LanguageModelConfig:
    """How the language model is trained together with the crosscoder, in a run that has this section; see `co_training`."""

    start: Annotated[str, "name"] = "trained"
    """Where its weights begin: as they are `trained`, or at `random`, which keeps its shape and tokenizer alone."""
    learning_rate: Annotated[float, "per step"] = 3e-4
    """Peak step size of AdamW; it rises over `training.warmup_fraction`, then falls along a cosine to a twentieth."""
    weight_decay: Annotated[float, "per step and step size"] = 0.1
    """Decay of its matrices, embeddings included; biases and norms have none."""
    reconstruction: Annotated[float, "coefficient"] = 0.0
    """Weight of the variance that the crosscoder leaves unexplained, with gradients to both."""
    cross_entropy: Annotated[float, "coefficient"] = 0.0
    """Weight of the cross-entropy of the spliced model, with gradients to both. The sites that `training.reads` names are
    replaced."""
    kl: Annotated[float, "coefficient"] = 0.0
    """Weight of the KL from the model's output to that of the spliced model, with gradients to both. The sites that
    `training.reads` names are replaced."""
    turns: Annotated[list[int] | None, "steps"] = None
    """Steps of the language model with the crosscoder frozen, and then of the crosscoder with the language model frozen, in
    turn; both move in every step where it is left out."""

    def __post_init__(self) -> None:
        if self.start not in LANGUAGE_MODEL_STARTS:
            raise ValueError(f"start must be one of {', '.join(LANGUAGE_MODEL_STARTS)}, got {self.start!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        for name in ("weight_decay", "reconstruction", "cross_entropy", "kl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if self.turns is not None and (len(self.turns) != 2 or min(self.turns) < 1):
            raise ValueError(
                f"turns must be two numbers of steps, 1 or more: the language model's and the crosscoder's; got {self.turns}"
            )

    @property
    def needs_splice(self) -> bool:
        """Whether its loss runs the spliced model."""
        return bool(self.cross_entropy or self.kl)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run: the sections `data`, `crosscoder` and `training`, `language_model` where that is trained,
    too, and two settings of no section."""

    model: Annotated[str | list[str], "text"] = "demo"
    """Hub name or Hugging Face folder of the language model, or `demo`; a list of several for model diffing, of the fine-tuned
    and the base model for an adapter."""
    data: DataConfig = field(default_factory=DataConfig)
    crosscoder: CrosscoderConfig = field(default_factory=CrosscoderConfig)
    training: TrainingConfig
    language_model: LanguageModelConfig | None = None
    checkpoint_every: Annotated[int | None, "steps"] = None
    """Steps between two measurements on held-out rows; by default a tenth of the run, or what keeps them below a twentieth of
    the work. Each comes with a snapshot, and there is one every two minutes: a killed run loses at most those."""

    def __post_init__(self) -> None:
        _check_above(self, 1, "checkpoint_every")
        if self.language_model is not None and not isinstance(self.model, str):
            raise ValueError(f"language_model trains the model of the run: expected one, got {len(self.model)}")
        if self.language_model is not None and self.data.cache:
            raise ValueError("language_model changes the activations in every step: expected no data.cache")
        batch_tokens, shards, context = self.training.batch_tokens, self.data.shards, self.data.context
        if batch_tokens and shards and batch_tokens % shards:
            raise ValueError(f"batch_tokens={batch_tokens} is not a multiple of shards={shards}")
        if batch_tokens and context and self.reads_rows:
            rows_per_batch(batch_tokens, context, shards)

    @property
    def reads_rows(self) -> bool:
        """Whether steps certainly take whole rows of tokens: as the settings say, or as crosscoders of several layers do."""
        reads = self.training.reads
        wiring = self.crosscoder.wiring
        several_layers = wiring == "lorsa" or (reads is None and wiring in ROW_FAMILIES)
        needed = self.language_model is not None or any(loss.needs_rows for loss in self.training.losses)
        return needed or several_layers or reads in READS[1:]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value; `run_config` reads it back."""
        value = asdict(self)
        value["crosscoder"]["activation"] = self.crosscoder.activation.to_dict()
        value["training"]["losses"] = [loss.to_dict() for loss in self.training.losses]
        return value


def rows_per_batch(batch_tokens: int, context: int, shards: int | None) -> int:
    """Whole rows in a batch.

    Raises:
        ValueError: none, or a number that the shards do not divide; says which settings would do.
    """
    n_rows = batch_tokens // context
    if n_rows and (shards is None or n_rows % shards == 0):
        return n_rows
    least = context * (shards or 1)
    remedies = [f"training.batch_tokens={max(least, batch_tokens // least * least)}"]
    if batch_tokens // (shards or 1) >= 2:
        remedies.append(f"data.context={batch_tokens // (shards or 1)} or a divisor of it")
    if n_rows and shards:
        remedies.append(f"data.shards={math.gcd(n_rows, shards)}")
    expected = "at least one" if shards is None else f"a multiple of shards={shards}"
    raise ValueError(
        f"batch_tokens={batch_tokens} hold {n_rows} rows of {context} tokens: expected {expected} for batches of whole rows; "
        f"set {', or '.join(remedies)}"
    )


def _check_above(config: object, least: int, *names: str, unit: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more{unit}, got {value}")
