"""The folder of a run: taken by a new run, or recognised by one that goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from replacement.training import snapshots
from replacement.training.parallel import Parallel, restarted
from replacement.training.run_config import RunConfig

SETTINGS_FILE = "run.json"


def open_folder(config: RunConfig, out: Path, parallel: Parallel, *, resume: bool) -> int | None:
    """Take the folder for a run; returns the step of its newest snapshot, or None for a start from nothing.

    Processes that `torchrun` started again after a failure resume without being told to.

    Raises:
        ValueError: the folder holds something else, holds a run and `resume` is not set, or a run of other settings.
    """
    resume = resume or restarted()
    path = out / SETTINGS_FILE
    settings = config.to_dict()
    begun = (out / "snapshots").exists() or (out / "crosscoder").exists()
    if path.exists() and begun:
        if not resume:
            raise ValueError(f"{out} already holds a run: choose another folder, or go on with it by --resume")
        _check_same(path, settings)
    elif not path.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use and holds no run: choose another folder")
    parallel.barrier()  # nobody writes before everybody has looked
    if parallel.is_first and not begun:  # a run that failed before its first checkpoint is begun anew
        out.mkdir(parents=True, exist_ok=True)
        scratch = out / f".{SETTINGS_FILE}.partial"
        scratch.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    facts = snapshots.latest(out / "snapshots") if resume else None
    parallel.barrier()
    return None if facts is None else int(facts["step"])


def _check_same(path: Path, settings: dict[str, object]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    given, found = (dict(_flat(value)) for value in (json.loads(json.dumps(settings)), before))
    for name in sorted(given.keys() | found.keys()):
        if given.get(name) != found.get(name):
            raise ValueError(
                f"{path.parent} holds a run with {name}={found.get(name)!r}, the settings say {given.get(name)!r}; "
                "a run is resumed with the settings it began with"
            )


def _flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for name, inner in value.items() for pair in _flat(inner, f"{prefix}.{name}" if prefix else name)]
