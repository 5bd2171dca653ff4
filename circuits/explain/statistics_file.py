"""Rows of statistics written to a file as they come, and summed up on the way."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from circuits.explain.moments import MomentsOfMany
from circuits.explain.statistics import TEXTS

Row = Mapping[str, Any]
ROWS_AT_ONCE = 1000
"""Rows of a group of a Parquet file, which are kept until it is written."""


class Summary:
    """Count, mean, spread, smallest and largest number of every column; NaN does not count."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._moments = names, MomentsOfMany(1)
        self._least, self._most = np.full(len(names), np.inf), np.full(len(names), -np.inf)

    def add(self, row: Row) -> None:
        """Take a row."""
        values = np.array([row[name] for name in self._names], dtype=np.float64)
        known = np.flatnonzero(~np.isnan(values))
        self._moments.add(known, values[known, None])
        self._least, self._most = np.fmin(self._least, values), np.fmax(self._most, values)

    def facts(self) -> dict[str, dict[str, Any]]:
        """By column: `count`, `mean`, `spread` (standard deviation), `smallest` and `largest`."""
        moments = self._moments.result()
        return {
            self._names[column]: {
                "count": int(moments.counts[row]),
                "mean": float(moments.mean[row, 0]),
                "spread": float(moments.spread(row)[0]),
                "smallest": float(self._least[column]),
                "largest": float(self._most[column]),
            }
            for row, column in enumerate(moments.keys.tolist())
        }


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither CSV nor Parquet, and Parquet where it cannot be written.

    Raises:
        ValueError: another suffix, or pyarrow is missing.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"out: expected a file that ends in .csv or .parquet, given {path}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError("out: Parquet needs pyarrow, which is not installed: install it, or write .csv") from None


@contextmanager
def row_writer(path: Path, columns: Mapping[str, tuple[str, str]], *, suffix: str) -> Iterator[Callable[[Row], None]]:
    """Writes rows of the columns of `TEXTS` and these (unit and text of each), as CSV or Parquet by the suffix."""
    if suffix == ".parquet":
        with _parquet_writer(path, columns) as write:
            yield write
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*TEXTS, *columns])
        # NaN, which does not equal itself, is an empty cell.
        yield lambda row: writer.writerow("" if value != value else value for value in row.values())


@contextmanager
def _parquet_writer(path: Path, columns: Mapping[str, tuple[str, str]]) -> Iterator[Callable[[Row], None]]:
    import pyarrow
    from pyarrow import parquet

    fields = [pyarrow.field(name, pyarrow.string()) for name in TEXTS]
    for name, (unit, text) in columns.items():
        kind = pyarrow.int64() if unit == "count" else pyarrow.float64()
        fields.append(pyarrow.field(name, kind, metadata={"unit": unit, "description": text}))
    schema, waiting = pyarrow.schema(fields), list[Row]()
    with parquet.ParquetWriter(path, schema) as file:

        def write(row: Row) -> None:
            waiting.append({name: None if value != value else value for name, value in row.items()})
            if len(waiting) == ROWS_AT_ONCE:
                flush()

        def flush() -> None:
            if waiting:
                file.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        yield write
        flush()
