"""The metrics of a run as lines of JSON, and copies for TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from replacement.files import write_atomic

METRICS_FILE = "metrics.jsonl"
LOGGERS = ("tensorboard", "wandb")


class MetricsLog:
    """Appends records to `metrics.jsonl`.

    Args:
        folder: where `metrics.jsonl` lies.
        last_step: keep earlier records up to this step; a resumed run writes the later ones anew.
        loggers: copies to make: `tensorboard` (below the folder), `wandb`.
        config: settings of the run, shown by Weights & Biases.
        silent: write nothing, as in all processes of a run but the first.

    Raises:
        ValueError: a damaged file, an unknown logger, one whose package is not installed, or Weights & Biases without a login.
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
        self._path = None if silent else folder / METRICS_FILE
        self._copies: list[Callable[[int, dict[str, float]], object]] = []
        if self._path is None:
            return
        if self._path.exists():
            kept = (record for record in _records(self._path, may_end_early=True) if record["step"] <= last_step)
            write_atomic(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._copies = [_open_logger(name, folder, dict(config or {})) for name in loggers]

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one record.

        Args:
            kind: `train` or `held_out`.
            step: steps done.
            values: JSON values; numbers, lists and dictionaries of numbers go to the copies as well.

        Raises:
            ValueError: the file cannot be written, as on a full disk.
        """
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise ValueError(f"{self._path}: could not be written ({error.strerror})") from error
        for copy in self._copies:
            copy(step, {f"{kind}/{name}": value for name, value in _flat(values).items()})


def read_metrics(folder: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a run, all or of one kind.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not the folder of a training run")
    return [record for record in _records(path) if kind is None or record["kind"] == kind]


def _records(path: Path, *, may_end_early: bool = False) -> list[dict[str, Any]]:
    """All records; the last line of a run killed while writing it may be half a record, which is left out on demand."""
    lines, records = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            is_record = isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record
        except ValueError:
            is_record = False
        if is_record:
            records.append(record)
        elif not (may_end_early and number == len(lines)):
            raise ValueError(f"{path} is damaged: line {number} is no record of a run; delete the line to go on")
    return records


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
