"""Files of token ids and of text: which files a name means, and arrays of ids mapped from disk as rows."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from replacement.files import checked_path

TOKEN_SUFFIXES = (".npy", ".safetensors")
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SUFFIXES = (*TOKEN_SUFFIXES, *TEXT_SUFFIXES)
_SAVED_DATASET = ("state.json", "dataset_dict.json")  # one of them lies in what `Dataset.save_to_disk` writes


def resolve(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a path, folder, pattern or list of them means, in order; a saved dataset is its folder.

    Raises:
        ValueError: something that does not exist or holds no such files, or files of kinds that cannot be mixed.
    """
    entries = [source] if isinstance(source, str | Path) else list(source)
    if not entries:
        raise ValueError("the list of token files is empty")
    paths = [path for entry in entries for path in _files(entry)]
    name = ", ".join(map(str, entries))
    suffixes = sorted({path.suffix for path in paths if not path.is_dir()})
    unknown = [suffix for suffix in suffixes if suffix not in _SUFFIXES]
    if unknown:
        raise ValueError(f"{name}: unknown kind of file {unknown[0]!r}: expected one of {', '.join(_SUFFIXES)}")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise ValueError(f"{name} means {len(paths)} files: {folders[0]} can only be read on its own")
    n_kinds = len({suffix in TOKEN_SUFFIXES for suffix in suffixes})
    if n_kinds > 1 or (".parquet" in suffixes and len(suffixes) > 1):
        expected = "either token ids or text" if n_kinds > 1 else ".parquet files on their own"
        raise ValueError(f"{name} mixes files of kinds {', '.join(suffixes)}: expected {expected}")
    return paths


def _files(entry: str | Path) -> list[Path]:
    path = checked_path(entry)
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED_DATASET):
            return [path]
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"the folder {entry} is no saved dataset and holds no {', '.join(_SUFFIXES)} files")
        return files
    if path.exists():
        return [path]
    if glob.has_magic(str(entry)):
        files = sorted(file for file in map(Path, glob.glob(str(entry), recursive=True)) if file.is_file())
        if not files:
            raise ValueError(f"no file matches {entry}")
        return files
    raise ValueError(
        f"{entry} does not exist: expected a file or folder of tokens or text, 'demo', or 'hf:NAME' for a dataset of the "
        "Hugging Face hub"
    )


def map_ids(path: Path, name: str | None) -> np.ndarray:
    """The array of a file of token ids, mapped and not read.

    Args:
        name: tensor in a `.safetensors` file; by default its first of integers.

    Raises:
        ValueError: the file is damaged or not of its format, or holds no such tensor.
    """
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is damaged or not a .npy file: {error}") from None
    try:
        # On the CPU safetensors maps tensors from the file; pages are read as they are touched.
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if name is not None and name not in names:
                raise ValueError(f"{path} has no tensor {name!r}: it holds {', '.join(names)}")
            tensors = [file.get_tensor(entry) for entry in names if name is None or entry == name]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    integers = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.dtype != torch.bool]
    if not integers:
        raise ValueError(f"{path} holds no integer tensor: expected token ids")
    return integers[0].numpy()


def as_rows(array: np.ndarray, context: int | None, name: str) -> np.ndarray:
    """Rows `[R, T]`: 2-D ids as they are, flat ids `[N]` cut into rows of `context` tokens.

    Raises:
        ValueError: not integers, another number of dimensions, rows of another length, or less than one row.
    """
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected integer token ids, got {array.dtype}")
    if array.ndim == 2:
        if context is not None and array.shape[1] != context:
            raise ValueError(f"{name} holds rows of {array.shape[1]} tokens, expected {context} (the context)")
        return array
    if array.ndim != 1:
        raise ValueError(f"{name}: expected flat ids [N] or rows [R, T], got shape {list(array.shape)}")
    if context is None:
        raise ValueError(f"{name} holds flat ids: give the context, the tokens per row")
    if context < 1:
        raise ValueError(f"{name}: the context must be 1 token or more, got {context}")
    if len(array) < context:
        raise ValueError(f"{name} holds {len(array)} tokens, fewer than one row of {context}")
    n_rows = len(array) // context
    return array[: n_rows * context].reshape(n_rows, context)


class JoinedRows:
    """The rows of several arrays `[R, T]` of one width, one array after the other, each row read from where it lies.

    Attributes:
        shape: rows R of all arrays together, tokens per row T.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), int(parts[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        """Rows by a slice or by their numbers, as int64."""
        index_R = np.arange(*which.indices(len(self))) if isinstance(which, slice) else which
        part_R = np.searchsorted(self._ends, index_R, side="right")
        rows_RT = np.empty((len(index_R), self.shape[1]), dtype=np.int64)
        for number in np.unique(part_R):
            in_part_R, part = part_R == number, self._parts[number]
            rows_RT[in_part_R] = part[index_R[in_part_R] - (self._ends[number] - len(part))]
        return rows_RT
