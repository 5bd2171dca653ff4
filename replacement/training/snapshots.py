"""Snapshots of a training run: everything that decides its next step, in folders that appear whole or not at all.

`FOLDER/step-00000500/` holds safetensors files in the layout of torch's distributed checkpoints, one per process, so that a
run may go on with another number of processes, and `snapshot.json` with their digests. The last two snapshots are kept.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from replacement.files import atomic_folder, read_json, sha256_of
from replacement.training.parallel import SINGLE, Parallel

FACTS_FILE = "snapshot.json"
KEPT = 2
"""Snapshots kept; the one before the last survives damage to the last."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, parallel: Parallel = SINGLE
) -> None:
    """Write the snapshot of a step; called by every process of the run.

    Args:
        folder: holds all snapshots of a run.
        tensors: plain tensors, or DTensors where every process holds a part.
        facts: JSON values.

    Raises:
        ValueError: the snapshot cannot be written (disk full, no permission); nothing of it is left.
    """
    target = _path(folder, step)
    with contextlib.ExitStack() as stack:
        scratch = None
        if parallel.is_first:
            shutil.rmtree(target, ignore_errors=True)
            scratch = stack.enter_context(atomic_folder(target))
        scratch = Path(parallel.from_first(str(scratch)))
        # Tensors only: this writer makes no pickle.
        writer = HuggingFaceStorageWriter(str(scratch), save_distributed=True)
        try:
            with _one_process_is_meant():
                dcp.save(dict(tensors), storage_writer=writer, no_dist=parallel.mesh is None)
        except dcp.CheckpointException as error:
            raise OSError(errno.EIO, _reason(error)) from None
        if parallel.is_first:
            digests = {file.name: sha256_of(file) for file in sorted(scratch.iterdir())}
            content = json.dumps({**facts, "step": step, "sha256": digests}, indent=1) + "\n"
            (scratch / FACTS_FILE).write_text(content, encoding="utf-8")
    if parallel.is_first:
        for old in _all(folder)[:-KEPT]:
            shutil.rmtree(old)
    parallel.barrier()


def newest_step(folder: Path) -> int | None:
    """Step of the newest snapshot; None if there is none.

    Raises:
        ValueError: its facts cannot be read.
    """
    snapshots = _all(folder)
    return None if not snapshots else int(_facts(snapshots[-1])["step"])


def load(folder: Path, step: int, tensors: Mapping[str, Tensor], *, parallel: Parallel = SINGLE) -> None:
    """Fill tensors in place from the snapshot of a step.

    Raises:
        ValueError: the snapshot is damaged, or holds other tensors.
    """
    path = _path(folder, step)
    # Snapshots of earlier versions have no digests.
    for name, expected in _facts(path).get("sha256", {}).items() if parallel.is_first else ():
        if not (path / name).is_file() or sha256_of(path / name) != expected:
            raise _damaged(path, f"{name} is not what was written")
    try:
        with _one_process_is_meant():
            reader = HuggingFaceStorageReader(str(path))
            dcp.load(dict(tensors), storage_reader=reader, no_dist=parallel.mesh is None)
    except dcp.CheckpointException as error:
        raise _damaged(path, _reason(error)) from None
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = read_json(path / FACTS_FILE)
    except ValueError as error:
        raise _damaged(path, f"{FACTS_FILE} cannot be read: {error}") from None
    if not isinstance(facts, dict) or facts.get("step") != int(path.name.removeprefix("step-")):
        raise _damaged(path, f"{FACTS_FILE} does not name its step")
    if not isinstance(facts.get("sha256", {}), dict):
        raise _damaged(path, f"{FACTS_FILE} holds no digests")
    return facts


def _damaged(path: Path, reason: str) -> ValueError:
    short = " ".join(reason.split())[:300]
    return ValueError(f"{path} is damaged or of another run: {short}; delete it to go on from the one before")


def _reason(error: dcp.CheckpointException) -> str:
    """What went wrong in the first process that failed, without its traceback."""
    cause = next(iter(error.failures.values()))[0]
    return getattr(cause, "strerror", None) or str(cause)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _all(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if re.fullmatch(r"step-\d{8,}", path.name))


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without a process group torch warns that it saves for one process, which is what a run of one process wants."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
