"""What a new run sets where its settings say nothing, from the model, the data and the budget. T tokens per row.

A short run needs many small batches and large steps more than a long one: 1,000 steps of 1,024 tokens train better on a million
tokens than 250 of 4,096, in less time. Batches of whole rows need short rows then, because tokens of one row are much alike.
"""

from __future__ import annotations

import math
from dataclasses import replace

from replacement.data.open_tokens import MAX_CONTEXT
from replacement.training.config import RunConfig, TrainingConfig, rows_per_batch

SHARDS, FEWEST_ROWS = 8, 4
"""Shards of the shuffle buffer, and rows of a batch at the least."""
LONG_RUN = 4000
"""Steps of a run that has time enough for small steps."""
N_MEASUREMENTS, MEASURING_SHARE = 10, 1 / 20
"""Measurements on held-out rows in a run, and the share of its tokens that they may amount to."""


def default_context(config: RunConfig) -> int:
    """Tokens per row where the data have no width of their own: as many as leave a row for every shard, at most 512."""
    return max(2, min(MAX_CONTEXT, config.training.step_tokens // (config.data.shards or SHARDS)))


def default_learning_rate(training: TrainingConfig, n_features: int) -> float:
    """Peak step size for groups of F features: `0.1 / sqrt(F)` in runs of 4,000 steps or more, twice that in those of 1,000
    or fewer."""
    return 0.1 / math.sqrt(n_features) * min(2.0, max(1.0, math.sqrt(LONG_RUN / training.n_steps)))


def fill_batches(config: RunConfig, context: int, *, whole_rows: bool) -> RunConfig:
    """The settings with batch size, context, shards and intervals filled in where they are left out.

    Args:
        context: T of the data.
        whole_rows: whether steps take whole rows; otherwise shuffled tokens.

    Raises:
        ValueError: settings that do not fit each other; names the remedy.
    """
    data, training, unit = config.data, config.training, context if whole_rows else 1
    if training.batch_tokens:
        n_units = rows_per_batch(training.batch_tokens, unit, data.shards)
        batch_tokens = training.batch_tokens
    else:
        n_units = min(training.default_batch_tokens, data.buffer_tokens // 2) // unit
        divisor = data.shards or (SHARDS if n_units >= SHARDS else FEWEST_ROWS)
        n_units = divisor * max(-(-FEWEST_ROWS // divisor), n_units // divisor)
        batch_tokens = n_units * unit
    rows_in_buffer = max(1, data.buffer_tokens // context)
    shards = data.shards or next(n for n in (8, 4, 2, 1) if n_units % n == 0 and n <= rows_in_buffer)
    every = config.checkpoint_every
    if every is None:
        measured = data.held_out_rows * context / batch_tokens  # in steps
        n_steps = training.n_tokens // batch_tokens
        every = max(1, math.ceil(n_steps / N_MEASUREMENTS), math.ceil(measured / MEASURING_SHARE))
    return replace(
        config,
        data=replace(data, context=context, shards=shards),
        training=replace(training, batch_tokens=batch_tokens),
        checkpoint_every=every,
    )
