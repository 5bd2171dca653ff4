"""The folder of a run: taken by a new run, recognised by one that goes on, and locked while a run lasts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from jaxtyping import Int
from torch import Tensor

from replacement.files import check_folder, read_json, write_atomic
from replacement.training import snapshots
from replacement.training.config import RunConfig
from replacement.training.parallel import Parallel, restarted
from replacement.training.run_config import run_config

SETTINGS_FILE = "run.json"
INPUTS_FILE = "inputs.json"
LOCK_FILE = ".lock"
SNAPSHOTS = "snapshots"
LANGUAGE_MODEL = "language_model"
"""Folder of the language model of a run that trains it, in Hugging Face layout."""
RESULT = "crosscoder"
"""Folder of the result, which appears whole when the run is finished."""


class Start(NamedTuple):
    """What a run goes on from."""

    config: RunConfig
    """Settings: those given, or those recorded by the run that goes on."""
    step: int | None
    """Step of the newest snapshot; None for a start from nothing."""
    is_new: bool
    """Whether the settings are those given, and what they leave out is to be filled in."""


class Input(NamedTuple):
    """A model or the data of a run."""

    fingerprint: str
    matches: Callable[[str], bool]
    """Whether a recorded fingerprint is its own, in the present form or an earlier one."""


def holds_run(out: str | Path) -> bool:
    """Whether a run in this folder has got as far as a checkpoint or its end, and can be resumed."""
    return is_finished(Path(out)) or snapshots.newest_step(Path(out) / SNAPSHOTS) is not None


def is_finished(out: Path) -> bool:
    """Whether the folder holds the result of a run."""
    return (out / RESULT).exists()


def find_start(config: RunConfig, out: Path, *, resume: bool) -> Start:
    """Where and with which settings a run begins or goes on; writes nothing.

    A run that ended before its first checkpoint is begun anew. Processes that `torchrun` started again after a failure
    resume without being told to.

    Raises:
        ValueError: the folder holds something else, holds a run and `resume` is not set, holds none although `resume` is
            set, or a run of other settings. Settings that are left out are no others.
    """
    settings = out / SETTINGS_FILE
    if not settings.exists():
        if resume:
            raise ValueError(f"{out} holds no run to resume: start one without --resume")
        if not out.is_dir():
            check_folder(out)
        elif {path.name for path in out.iterdir()} - {LOCK_FILE}:
            raise ValueError(f"{out} is in use and holds no run: choose another folder")
        return Start(config, None, is_new=True)
    begun = holds_run(out)
    if begun and not (resume or restarted()):
        raise ValueError(f"{out} already holds a run: choose another folder, or go on with it by --resume")
    if not (begun or resume):
        return Start(config, None, is_new=True)
    recorded = _recorded(settings, config.to_dict())
    return Start(recorded, snapshots.newest_step(out / SNAPSHOTS) if begun else None, is_new=False)


@contextlib.contextmanager
def locked(out: Path, parallel: Parallel) -> Iterator[None]:
    """Hold the folder of a run, in its first process; the kernel lets go of it when that process ends, however it ends.

    Raises:
        ValueError: another run holds it.
    """
    lock = FileLock(out / LOCK_FILE, timeout=0)
    is_held_by_another = False
    if parallel.is_first:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            is_held_by_another = True
    if parallel.any(is_held_by_another):
        raise ValueError(f"another process is training in {out}: wait until it ends, or choose another folder")
    try:
        yield
    finally:
        lock.release()


def check_not_locked(out: Path, parallel: Parallel) -> None:
    """Refuse at once a folder in which another process is training; writes nothing.

    Raises:
        ValueError: another run holds it.
    """
    if parallel.any((out / LOCK_FILE).exists()):
        with locked(out, parallel):
            pass


def begin(config: RunConfig, out: Path, inputs: Mapping[str, Input], parallel: Parallel) -> None:
    """Record the settings of a run and the fingerprints of its models and data, or compare them if it has begun before.

    Called by every process while the first one holds the lock. A run that began before fingerprints were recorded takes those
    of the process that goes on with it.

    Args:
        inputs: models and data by what messages call them, such as `the model demo`.

    Raises:
        ValueError: a model or the data has changed since the run began; says which.
    """
    path, begun = out / INPUTS_FILE, holds_run(out)
    parallel.barrier()  # nobody writes before everybody has looked
    if parallel.is_first:
        check_folder(out / SNAPSHOTS)
        _remove_leftovers(out)
        if not begun:
            _write(out / SETTINGS_FILE, config.to_dict())
        if not begun or not path.exists():
            _write(path, {name: given.fingerprint for name, given in inputs.items()})
    parallel.barrier()
    before = _read(path)
    for name, given in inputs.items():
        if not given.matches(str(before.get(name))):
            raise ValueError(
                f"{name} is not what it was when the run in {out} began (fingerprint {before.get(name)}, now "
                f"{given.fingerprint}); a run is resumed with the models and the data it began with"
            )


def digest(*rows: Int[Tensor, "_ T"]) -> str:
    """Fingerprint of some rows of token ids."""
    sha256 = hashlib.sha256()
    for rows_RT in rows:
        sha256.update(json.dumps(list(rows_RT.shape)).encode())
        sha256.update(rows_RT.numpy().astype("<i8").tobytes())
    return sha256.hexdigest()[:16]


def _remove_leftovers(out: Path) -> None:
    """Scratch files of processes that were killed; nobody else writes here while the lock is held."""
    for pattern in (f".{SETTINGS_FILE}.*", f".{INPUTS_FILE}.*", f"{SNAPSHOTS}/.step-*"):
        for scratch in out.glob(pattern):
            shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()


def _recorded(path: Path, settings: dict[str, Any]) -> RunConfig:
    """The settings of a run, which those given must not contradict."""
    value = _read(path)
    given, recorded = (dict(_flat(entry)) for entry in (json.loads(json.dumps(settings)), value))
    for name in sorted(given.keys() | recorded.keys()):
        if given.get(name) not in (None, recorded.get(name)):
            raise ValueError(
                f"{path.parent} holds a run with {name}={recorded.get(name)!r}, the settings say {given.get(name)!r}; "
                "a run is resumed with the settings it began with"
            )
    try:
        return run_config(value)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for name, inner in value.items() for pair in _flat(inner, f"{prefix}.{name}" if prefix else name)]


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")
