"""Small helpers the demo's training stages share."""

from __future__ import annotations

import json
from pathlib import Path

N_SNAPSHOTS = 10


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)


def snapshot_steps(n_steps: int, n_snapshots: int) -> list[int]:
    """0, and steps that double up to the last one.

    Raises:
        ValueError: too few steps.
    """
    steps = [0, *(round(n_steps / 2**halvings) for halvings in reversed(range(n_snapshots - 1)))]
    if len(set(steps)) < n_snapshots:
        raise ValueError(f"{n_steps} steps are too few for {n_snapshots} snapshots: expected {2 ** (n_snapshots - 2)}")
    return steps


def snapshot_folders(folder: Path, n_steps: int, n_snapshots: int) -> dict[int, Path]:
    """Where snapshots of a run are kept, by step."""
    return {step: folder / f"step-{step:06d}" for step in snapshot_steps(n_steps, n_snapshots)}
