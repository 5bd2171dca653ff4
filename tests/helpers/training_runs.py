"""Training runs in processes of their own, to be killed, resumed, and spread over two processes.

python training_runs.py SETTINGS.json       # {"runs": [{"config": {...}, "out": ..., "stop_at": ..., ...}]}
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SITES_AND_DATA: dict[str, Any] = {"shards": 4, "buffer_tokens": 2048, "held_out_rows": 8}


def settings(model: Path, tokens: Path, *, n_steps: int = 30, **changes: dict[str, Any]) -> dict[str, Any]:
    """A small CLT on a tiny model, 30 steps of 128 tokens; `changes` by section."""
    value: dict[str, Any] = {
        "model": str(model),
        "checkpoint_every": 5,
        "data": {"source": str(tokens), **SITES_AND_DATA},
        "crosscoder": {"n_features": 64, "activation": {"name": "topk", "k": 4}},
        "training": {"n_tokens": 128 * n_steps, "batch_tokens": 128, "dead_after_tokens": 600},
    }
    for section, change in changes.items():
        value[section] = value[section] | change
    return value


def write_tokens(path: Path, *, n_rows: int = 200, context: int = 16, vocabulary: int = 97) -> Path:
    """Random token rows that start with the beginning-of-sequence token of the tiny models."""
    rows_RT = np.random.default_rng(0).integers(3, vocabulary, (n_rows, context), dtype=np.int64)
    rows_RT[:, 0] = 1
    rows_RT[::3, 5] = 1  # a separator, left out: rows, and so processes, keep different numbers of tokens
    np.save(path, rows_RT)
    return path


def command(runs: list[dict[str, Any]], folder: Path, *, n_processes: int = 1) -> list[str]:
    """Command line that does these runs one after the other."""
    path = folder / f"runs-{len(list(folder.glob('runs-*.json')))}.json"
    path.write_text(json.dumps(runs), encoding="utf-8")
    script = [str(Path(__file__)), str(path)]
    if n_processes == 1:
        return [sys.executable, *script]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    return [*launcher, *script]


def execute(runs: list[dict[str, Any]], folder: Path, *, n_processes: int = 1, timeout: int = 400) -> None:
    """Do the runs and fail with their output if they fail."""
    done = subprocess.run(
        command(runs, folder, n_processes=n_processes),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def main() -> None:
    """Do the runs of a file; `stop_at` asks a run to stop after a step, as a scheduler would; `die_at` kills the last
    process after a step; `float64` makes this and all later runs of the file in float64."""
    from replacement.training.run_config import run_config
    from replacement.training.runs import Interrupted, run

    for options in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        stop_at, die_at = options.pop("stop_at", None), options.pop("die_at", None)
        if options.pop("float64", False):
            in_float64()

        def show(progress: Any, stop_at: int | None = stop_at, die_at: int | None = die_at) -> None:
            if progress.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            is_last = int(os.environ.get("RANK", "0")) + 1 == int(os.environ.get("WORLD_SIZE", "1"))
            if progress.step == die_at and is_last:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            run(run_config(options.pop("config")), options.pop("out"), progress=show, **options)
        except Interrupted:
            assert stop_at is not None


def in_float64() -> None:
    """Let models be loaded and crosscoders be made in float64 by default.

    In float32 another order of summation, which other processors and numbers of processes have, picks another feature once in
    a few hundred tokens, and from there on two runs differ by far more than rounding.
    """
    import torch

    from replacement import Crosscoder, LanguageModel

    for made in (LanguageModel.from_pretrained.__func__, Crosscoder.__init__):
        made.__kwdefaults__["dtype"] = torch.float64


if __name__ == "__main__":
    main()
