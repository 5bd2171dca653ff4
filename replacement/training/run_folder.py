"""The folder of a run: taken by a new run, or recognised by one that goes on. R rows, T tokens per row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from replacement.training import snapshots
from replacement.training.parallel import Parallel, restarted
from replacement.training.run_config import RunConfig

SETTINGS_FILE = "run.json"
INPUTS_FILE = "inputs.json"
RESULT = "crosscoder"
"""Folder of the result, which appears whole when the run is finished."""


def open_folder(config: RunConfig, out: Path, parallel: Parallel, *, resume: bool) -> int | None:
    """Take the folder for a run; returns the step of its newest snapshot, or None for a start from nothing.

    Processes that `torchrun` started again after a failure resume without being told to.

    Raises:
        ValueError: the folder holds something else, holds a run and `resume` is not set, or a run of other settings.
    """
    resume = resume or restarted()
    path = out / SETTINGS_FILE
    settings = config.to_dict()
    begun = _is_begun(out)
    if path.exists() and begun:
        if not resume:
            raise ValueError(f"{out} already holds a run: choose another folder, or go on with it by --resume")
        _check_same(path, settings)
    elif not path.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use and holds no run: choose another folder")
    parallel.barrier()  # nobody writes before everybody has looked
    if parallel.is_first and not begun:  # a run that failed before its first checkpoint is begun anew
        out.mkdir(parents=True, exist_ok=True)
        _write(path, settings)
    facts = snapshots.latest(out / "snapshots") if resume else None
    parallel.barrier()
    return None if facts is None else int(facts["step"])


def is_finished(out: Path) -> bool:
    """Whether the folder holds the result of a run."""
    return (out / RESULT).exists()


def check_inputs(out: Path, inputs: Mapping[str, str], parallel: Parallel) -> None:
    """Record the fingerprints of a run's models and data when it begins, and compare them when it goes on.

    A run that began before fingerprints were recorded takes those of the process that goes on with it.

    Args:
        inputs: fingerprints by what they belong to, such as `the model demo`.

    Raises:
        ValueError: a model or the data has changed since the run began; says which.
    """
    path = out / INPUTS_FILE
    is_known = path.exists() and _is_begun(out)
    parallel.barrier()  # nobody writes before everybody has looked
    if parallel.is_first and not is_known:
        _write(path, dict(inputs))
    parallel.barrier()
    before = _read(path)
    for name, fingerprint in inputs.items():
        if before.get(name) != fingerprint:
            raise ValueError(
                f"{name} is not what it was when the run in {out} began (fingerprint {before.get(name)}, now "
                f"{fingerprint}); a run is resumed with the models and the data it began with"
            )


def digest(*rows: Int[Tensor, "_ T"]) -> str:
    """Fingerprint of some rows of token ids."""
    sha256 = hashlib.sha256()
    for rows_RT in rows:
        sha256.update(json.dumps(list(rows_RT.shape)).encode())
        sha256.update(rows_RT.numpy().astype("<i8").tobytes())
    return sha256.hexdigest()[:16]


def _is_begun(out: Path) -> bool:
    return (out / "snapshots").exists() or is_finished(out)


def _check_same(path: Path, settings: dict[str, object]) -> None:
    before = _read(path)
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


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


def _write(path: Path, value: dict[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
