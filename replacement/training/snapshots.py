"""Snapshots of a training run: everything that decides its next step, in folders that appear whole or not at all.

`FOLDER/step-00000500/` holds `snapshot.json` and safetensors files in the layout of torch's distributed checkpoints, one per
process, so that a run may go on with another number of processes. The last two are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

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
    """
    target, partial = _path(folder, step), folder / f".{_path(folder, step).name}.partial"
    if parallel.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    # Tensors only: this writer makes no pickle.
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _one_process_is_meant():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=parallel.mesh is None)
    parallel.barrier()
    if parallel.is_first:
        (partial / FACTS_FILE).write_text(json.dumps({**facts, "step": step}, indent=1) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _reach_disk(file)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _reach_disk(folder)
        for old in _all(folder)[:-KEPT]:
            shutil.rmtree(old)
    parallel.barrier()


def latest(folder: Path) -> dict[str, Any] | None:
    """Facts of the newest snapshot, with its `step`; None if there is none.

    Raises:
        ValueError: its facts cannot be read.
    """
    found = _all(folder)
    if not found:
        return None
    path = found[-1] / FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; delete {found[-1]} to go on from the one before") from None
    return dict(facts)


def load(folder: Path, step: int, tensors: Mapping[str, Tensor], *, parallel: Parallel = SINGLE) -> None:
    """Fill tensors in place from the snapshot of a step.

    Raises:
        ValueError: the snapshot is damaged, or holds other tensors.
    """
    path = _path(folder, step)
    try:
        with _one_process_is_meant():
            dcp.load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(path)),
                no_dist=parallel.mesh is None,
            )
    except (dcp.CheckpointException, RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is damaged or of another run: {reason}; delete it to go on from the one before"
        ) from error


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _all(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def _reach_disk(path: Path) -> None:
    """A rename is only safe once what it names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without a process group torch warns that it saves for one process, which is what a run of one process wants."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
