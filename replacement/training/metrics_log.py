"""The metrics of a run as lines of JSON, and copies for TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

LOGGERS = ("tensorboard", "wandb")


class MetricsLog:
    """Appends records to `metrics.jsonl`; a context manager.

    Args:
        folder: where `metrics.jsonl` lies.
        last_step: keep earlier records up to this step; a resumed run writes the later ones anew.
        loggers: copies to make: `tensorboard` (below the folder), `wandb`.
        config: settings of the run, shown by Weights & Biases.
        silent: write nothing, as in all processes of a run but the first.

    Raises:
        ValueError: an unknown logger, one whose package is not installed, or Weights & Biases without a login.
    """

    def __init__(
        self,
        folder: Path,
        *,
        last_step: int = 0,
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        silent: bool = False,
    ) -> None:
        self._file: TextIO | None = None
        self._copies: list[Callable[[int, dict[str, float]], object]] = []
        if silent:
            return
        path = folder / "metrics.jsonl"
        _keep_until(path, last_step)
        self._copies = [_open_logger(name, folder, dict(config or {})) for name in loggers]
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one record.

        Args:
            kind: `train` or `held_out`.
            step: steps done.
            values: JSON values; numbers, lists and dictionaries of numbers go to the copies as well.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for copy in self._copies:
            copy(step, {f"{kind}/{name}": value for name, value in _flat(values).items()})

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(folder: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a run, all or of one kind.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not the folder of a training run")
    records = list(_records(path))
    return [record for record in records if kind is None or record["kind"] == kind]


def _records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _keep_until(path: Path, last_step: int) -> None:
    """Drop records after a step; a run killed while writing may also have left half a line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > last_step:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text("".join(kept), encoding="utf-8")
    os.replace(scratch, path)


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, (int, float)):
            flat[name] = value
        elif isinstance(value, Mapping):
            flat |= {f"{name}/{key}": number for key, number in _flat(value).items()}
        elif isinstance(value, (list, tuple)):
            flat |= _flat({f"{name}/{place}": number for place, number in enumerate(value)})
    return flat


def _open_logger(name: str, folder: Path, config: dict[str, Any]) -> Callable[[int, dict[str, float]], object]:
    """A function of (step, flat values)."""
    if name not in LOGGERS:
        raise ValueError(f"unknown logger {name!r}: expected one of {', '.join(LOGGERS)}")
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def add(step: int, values: dict[str, float]) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            return add
        import wandb
    except ImportError as error:
        raise ValueError(f"the logger {name} needs a package that is not installed: pip install {name}") from error
    try:
        run = wandb.init(dir=str(folder), config=config, resume="allow")
    except wandb.Error as error:  # no login, no route to the server
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Weights & Biases does not start: {reason} (`wandb login` or WANDB_API_KEY logs in, WANDB_MODE=offline "
            "needs no login)"
        ) from error
    return lambda step, values: run.log(values, step=step)
