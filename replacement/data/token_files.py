"""Files of token ids and of text: which files a name means, and arrays mapped from disk. R rows, T tokens, N ids."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

TOKEN_SUFFIXES = (".npy", ".safetensors")
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SAVED_DATASET = ("state.json", "dataset_dict.json")  # one of them lies in what `Dataset.save_to_disk` writes


def is_saved_dataset(path: Path) -> bool:
    """Whether the folder was written by the `save_to_disk` of a Hugging Face dataset."""
    return any((path / name).is_file() for name in _SAVED_DATASET)


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
    unknown = [suffix for suffix in suffixes if suffix not in (*TOKEN_SUFFIXES, *TEXT_SUFFIXES)]
    if unknown:
        known = ", ".join((*TOKEN_SUFFIXES, *TEXT_SUFFIXES))
        raise ValueError(f"{name}: unknown kind of file {unknown[0]!r}: expected one of {known}")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise ValueError(f"{name} means {len(paths)} files: {folders[0]} can only be read on its own")
    if any(suffix in TOKEN_SUFFIXES for suffix in suffixes) and any(suffix in TEXT_SUFFIXES for suffix in suffixes):
        raise ValueError(f"{name} mixes files of kinds {', '.join(suffixes)}: expected either token ids or text")
    if ".parquet" in suffixes and len(suffixes) > 1:
        raise ValueError(f"{name} mixes files of kinds {', '.join(suffixes)}: expected .parquet files on their own")
    return paths


def _files(entry: str | Path) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        if is_saved_dataset(path):
            return [path]
        found = sorted(file for file in path.rglob("*") if file.suffix in (*TOKEN_SUFFIXES, *TEXT_SUFFIXES))
        if not found:
            known = ", ".join((*TOKEN_SUFFIXES, *TEXT_SUFFIXES))
            raise ValueError(f"the folder {entry} is no saved dataset and holds no {known} files")
        return found
    if path.exists():
        return [path]
    if glob.has_magic(str(entry)):
        found = sorted(Path(file) for file in glob.glob(str(entry), recursive=True) if Path(file).is_file())
        if not found:
            raise ValueError(f"no file matches {entry}")
        return found
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
    return map_npy(path) if path.suffix == ".npy" else map_safetensors(path, name)


def map_npy(path: Path) -> np.ndarray:
    """The array of a `.npy` file, mapped and not read.

    Raises:
        ValueError: the file is damaged or not of this format.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged or not a .npy file: {error}") from None


def map_safetensors(path: Path, name: str | None) -> np.ndarray:
    """A tensor of a `.safetensors` file, mapped and not read: the one named, or the first of integers.

    Raises:
        ValueError: the file is damaged or not of this format, or holds no such tensor.
    """
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
