"""Columns of Hugging Face datasets: from the hub, from `save_to_disk`, or from `.parquet` files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HUB_PREFIX = "hf:"

Start = Callable[[], Iterable[Any]]
"""Starts the items afresh at every call."""


def hub_column(source: str, *, split: str, column: str) -> Start:
    """A column of the dataset `hf:NAME` or `hf:NAME:CONFIGURATION`, downloaded while it is read.

    Raises:
        ValueError: the dataset cannot be reached or has no such configuration, split or column.
    """
    name, _, configuration = source.removeprefix(HUB_PREFIX).partition(":")

    def load() -> Any:
        return _library(source).load_dataset(name, configuration or None, split=split, streaming=True)

    return _column(_loaded(load, source), column, source)


def saved_column(folder: Path, *, split: str, column: str) -> Start:
    """A column of a dataset saved with `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Raises:
        ValueError: the dataset is damaged or has no such split or column.
    """
    name = str(folder)
    dataset = _loaded(lambda: _library(name).load_from_disk(name), name)
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"{name} has no split {split!r}: it has {', '.join(dataset)}")
        dataset = dataset[split]
    return _column(dataset, column, name)


def parquet_column(paths: Sequence[Path], *, column: str) -> Start:
    """A column of `.parquet` files, one after the other.

    Raises:
        ValueError: a file is damaged or has no such column.
    """
    name, files = ", ".join(map(str, paths)), [str(path) for path in paths]

    def load() -> Any:
        return _library(name).load_dataset("parquet", data_files=files, split="train", streaming=True)

    return _column(_loaded(load, name), column, name)


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} is read with the `datasets` library: pip install datasets") from None
    return datasets


def _loaded(load: Callable[[], Any], name: str) -> Any:
    try:
        return load()
    except ValueError as error:
        if name in str(error):
            raise
        raise ValueError(f"cannot open the dataset {name}: {error}") from error
    except Exception as error:  # the library raises errors of many other kinds, of its own and of those it builds on
        raise ValueError(f"cannot open the dataset {name}: {error}") from error


def _column(dataset: Any, column: str, name: str) -> Start:
    known = dataset.column_names
    if known is not None and column not in known:
        raise ValueError(f"{name} has no column {column!r}: it has {', '.join(known)}; see text_field")

    def items() -> Iterator[Any]:
        for example in dataset:
            if column not in example:
                raise ValueError(f"{name} has no column {column!r}: it has {', '.join(example)}; see text_field")
            yield example[column]

    return items
