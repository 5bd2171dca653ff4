"""The pass over text: batch by batch, saved now and then, shared by the processes of `torchrun`.

Batches are numbered and always hold the same rows. Of n processes each takes every n-th batch and saves what it has kept beside
the index, and goes on from there when it is started again. In the end the first process puts the parts together.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.data.token_sources import TokenSource, first_rows
from replacement.files import atomic_file
from replacement.index.firings import TOKENS_PER_PASS, Firings, crosscoder_of, firings_of
from replacement.index.keeping import Evidence, Window
from replacement.splicing.replacement_model import ReplacementModel

Progress = Callable[[int], None]
"""Called with the number of tokens that were read."""
SAVE_EVERY_S = 30.0
"""Seconds between two savings; more where saving itself takes long."""
_SHARE_OF_SAVING = 0.05
_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work is this process's."""

    rank: int = 0
    n_processes: int = 1

    @classmethod
    def of_this_process(cls) -> Share:
        """The share that `torchrun` gave this process; everything where it did not start it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the index."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.n_processes == 1:
            return
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_TIMEOUT)
        dist.barrier()

    def part_files(self, out: Path) -> list[Path]:
        """Files in which the processes save what they have kept."""
        n = self.n_processes
        return [out.with_name(f"{out.name}.part-{rank + 1}-of-{n}.npz") for rank in range(n)]

    def remove_parts(self, out: Path) -> None:
        """Remove these files, and those of runs with another number of processes."""
        for file in out.parent.glob(f"{glob.escape(out.name)}.part-*-of-*.npz"):
            file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Text:
    """Rows of text, and the crosscoder whose features are looked for in them."""

    model: ReplacementModel
    part: str
    source: TokenSource
    n_rows: int
    """Rows that examples are from; the source holds out others."""

    @property
    def crosscoder(self) -> Crosscoder:
        """The crosscoder."""
        return crosscoder_of(self.model, self.part)

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The rows in batches of one forward pass, each with the number of its first row."""
        first = 0
        for block_RT in first_rows(self.source.one_pass(), self.n_rows):
            for rows_RT in self._split(block_RT):
                yield first, rows_RT
                first += len(rows_RT)

    def first(self, n_rows: int) -> Iterator[Firings]:
        """Firings in the first rows, batch by batch."""
        blocks = first_rows(self.source.one_pass(), min(n_rows, self.n_rows))
        return (self.of(rows_RT) for block_RT in blocks for rows_RT in self._split(block_RT))

    def held_out(self) -> Iterator[Firings]:
        """Firings in the rows that are held out."""
        return map(self.of, self._split(self.source.held_out()))

    def firings(self, rows: list[np.ndarray]) -> Iterator[Firings]:
        """Firings in some rows."""
        return map(self.of, self._split(torch.from_numpy(np.array(rows)))) if rows else iter(())

    def of(self, rows_RT: Tensor) -> Firings:
        """Firings in the rows of one batch."""
        return firings_of(self.model, rows_RT, part=self.part)

    def _split(self, rows_RT: Tensor) -> tuple[Tensor, ...]:
        return rows_RT.split(max(1, TOKENS_PER_PASS // self.source.context))


def gather(
    text: Text,
    empty: Callable[[], Evidence],
    window: Window,
    *,
    file: Path,
    made_by: dict[str, Any],
    share: Share,
    progress: Progress,
) -> Evidence:
    """What this process's batches give, from where it was saved last; saved in the end.

    Args:
        empty: gives evidence without anything in it.
        window: tokens of an example.
        file: where it is saved.
        made_by: all that decides what is found; what was saved with anything else is not used.
    """
    evidence, n_done = _saved(file, made_by) or (empty(), 0)
    layers, n_features = np.array(text.crosscoder.wiring.layers), text.crosscoder.n_features
    saved_at, saving_s = time.monotonic(), 0.0
    for number, (first, rows_RT) in enumerate(text.batches()):
        if number >= n_done:
            if number % share.n_processes == share.rank:
                firings = text.of(rows_RT)
                feature_S = np.searchsorted(layers, firings.layer) * n_features + firings.index
                evidence.add(firings, feature_S, first_row=first, window=window)
            n_done = number + 1
            if time.monotonic() - saved_at > max(SAVE_EVERY_S, saving_s / _SHARE_OF_SAVING):
                begin = time.monotonic()
                _save(file, evidence, n_done, made_by)
                saved_at = time.monotonic()
                saving_s = saved_at - begin
        progress(rows_RT.numel())
    _save(file, evidence, n_done, made_by)
    return evidence


def together(files: list[Path], evidence: Evidence, made_by: dict[str, Any]) -> Evidence:
    """This process's evidence with that of all others."""
    for file in files[1:]:
        saved = _saved(file, made_by)
        if saved is None:
            raise ValueError(
                f"{file}: expected what another process of this run has kept, found none of these settings"
            )
        evidence.merge(saved[0])
    evidence.drop_rows()
    return evidence


def _save(file: Path, evidence: Evidence, n_done: int, made_by: dict[str, Any]) -> None:
    state = json.dumps({"made_by": made_by, "n_done": n_done})
    with atomic_file(file) as scratch, scratch.open("wb") as opened:
        np.savez(opened, state=np.array(state), **evidence.arrays())  # type: ignore[arg-type]


def _saved(file: Path, made_by: dict[str, Any]) -> tuple[Evidence, int] | None:
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            state = json.loads(str(arrays["state"]))
            if state["made_by"] != made_by:
                return None
            return Evidence.from_arrays(arrays), state["n_done"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it to start again") from None
