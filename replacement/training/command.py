"""What `replacement train` does around a run: a progress bar on a terminal, and a summary of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from replacement.console import pairs
from replacement.files import read_json
from replacement.training import run_folder
from replacement.training.config import RunConfig
from replacement.training.metrics_log import read_metrics
from replacement.training.parallel import is_first_process
from replacement.training.run_config import run_config
from replacement.training.runs import run
from replacement.training.trainer import Progress


def run_with_bar(config: RunConfig, out: Path, **options: Any) -> dict[str, Any]:
    """Run with a bar that shows the stage, speed, loss, L0 and the time left on a terminal; returns the facts of the result.

    Args:
        options: those of `run`, except `progress` and `measuring`.
    """
    quiet = None if is_first_process() else True  # None: shown on a terminal only
    with tqdm(total=config.training.n_tokens, desc="load", unit="tok", unit_scale=True, disable=quiet) as bar:

        def show(progress: Progress) -> None:
            if bar.n == 0 and progress.step > 1:  # a resumed run: what was done before does not count for the speed
                bar.initial = bar.n = progress.tokens - progress.tokens // progress.step
            bar.set_description("train", refresh=False)
            bar.set_postfix(
                {"loss": f"{progress.loss:.4f}", "L0": f"{progress.l0:.1f}", "dead": progress.n_dead}, refresh=False
            )
            bar.update(progress.tokens - bar.n)

        def measuring(n_done: int, n_tokens: int) -> None:
            bar.set_description(f"measure held-out rows, {n_done / n_tokens:.0%}")

        run(config, out, progress=show, measuring=measuring, **options)
        bar.set_description("done")
    held_out = read_metrics(out, kind="held_out")
    if not held_out:
        raise ValueError(f"{out}: the metrics of the run hold no measurement on held-out rows, its last one is lost")
    return {"crosscoder": str(out / run_folder.RESULT), **{k: v for k, v in held_out[-1].items() if k != "kind"}}


def summary(facts: dict[str, Any]) -> Table:
    """Facts of a run's result, for the terminal."""
    config = run_config(read_json(Path(facts["crosscoder"]).parent / run_folder.SETTINGS_FILE))
    unexplained, training = list(facts["unexplained"].values()), config.training
    k = getattr(config.crosscoder.activation, "k", None)
    kept = f" (k over all groups: {sum(k) if isinstance(k, tuple) else k * len(facts['l0'])})" if k else ""
    rows = {
        "active features per token, all groups": f"{facts['l0_total']:.1f}{kept}",
        "variance unexplained, mean over sites": f"{sum(unexplained) / len(unexplained):.4f}",
    }
    if facts["kl"] is not None:
        rows |= {
            "KL with the crosscoder spliced in": f"{facts['kl']:.4f} nats",
            "cross-entropy recovered": f"{facts['cross_entropy_recovered']:.4f}",
            "top-1 agreement, all tokens": f"{facts['agreement_all']:.4f}",
        }
    steps = f"{training.n_steps:,} of {training.step_tokens:,} tokens in rows of {config.data.context}"
    rate = "" if training.learning_rate is None else f", peak step size {training.learning_rate:.2g}"
    return pairs([*rows.items(), ("steps", steps + rate), ("saved in", facts["crosscoder"])])
