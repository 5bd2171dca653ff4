"""A JSON file of result rows that grows run by run, so that a long series of runs can be stopped and taken up again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows written so far; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def find_row(path: Path, **key: object) -> dict[str, Any] | None:
    """The row whose entries equal `key`, or None if that run is not finished yet."""
    found = (row for row in read_rows(path) if all(row.get(name) == value for name, value in key.items()))
    return next(found, None)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; the file is replaced as a whole, so it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    lines = ",\n".join(json.dumps(each) for each in [*read_rows(path), dict(row)])
    scratch.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(scratch, path)


def kept_row(path: Path, key: Mapping[str, object], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The row whose entries equal `key`; where there is none, what `make` returns is added under that key."""
    row = find_row(path, **key)
    if row is None:
        row = {**key, **make()}
        append_row(path, row)
    return row


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """`mean +-standard deviation` over seeds (of the sample; 0 for one value), without values that are NaN."""
    given = [value for value in values if not math.isnan(value)]
    mean = fmean(given) if given else math.nan
    return f"{mean:{form}} +-{stdev(given) if len(given) > 1 else 0.0:{form}}"
