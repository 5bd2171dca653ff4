"""What `replacement train` shows: a progress bar on a terminal, and a summary at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from replacement.training.metrics_log import read_metrics
from replacement.training.parallel import is_first_process
from replacement.training.run import run
from replacement.training.run_config import RunConfig
from replacement.training.trainer import Progress


def train_with_bar(
    config: RunConfig, out: Path, *, resume: bool, device: str, feature_shards: int, loggers: Sequence[str]
) -> dict[str, Any]:
    """Run, with tokens per second, loss, L0 and time left on a terminal; returns the facts of the result."""
    training = config.training
    quiet = None if is_first_process() else True  # None: shown on a terminal only
    with tqdm(total=training.n_steps * training.batch_tokens, unit="tok", unit_scale=True, disable=quiet) as bar:

        def show(progress: Progress) -> None:
            done = progress.step * training.batch_tokens
            if bar.n == 0 and progress.step > 1:  # a resumed run: what was done before does not count for the speed
                bar.initial = bar.n = done - training.batch_tokens
            bar.set_postfix(
                {"loss": f"{progress.loss:.4f}", "L0": f"{progress.l0:.1f}", "dead": progress.n_dead}, refresh=False
            )
            bar.update(done - bar.n)

        run(
            config,
            out,
            resume=resume,
            device=device,
            feature_shards=feature_shards,
            loggers=loggers,
            progress=show,
        )
    held_out = read_metrics(out, kind="held_out")[-1]
    held_out.pop("kind")
    return {"crosscoder": str(out / "crosscoder"), **held_out}
