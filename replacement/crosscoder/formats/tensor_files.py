"""Files of tensors, opened without reading them, and checked by name and shape as a layout takes what it knows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from replacement.crosscoder.checks import float_dtype
from replacement.crosscoder.formats.numpy_files import ArraysInFile
from replacement.crosscoder.mapped_file import MappedFile, map_tensors
from replacement.files import read_json, read_text

MOST_NAMED = 8
"""Names that a message lists."""


class TensorFile:
    """The tensors of one safetensors or NumPy (`.npz`) file, as views of a map of it.

    A layout takes the tensors it knows by name and shape; `finish` then refuses a file that holds others, because what is not
    understood may change the function.

    Raises:
        ValueError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: Mapping[str, Tensor]
        self.mapped: MappedFile
        if path.suffix == ".npz":
            self._tensors = arrays = ArraysInFile(path)
            self.mapped = arrays.mapped
        else:
            self._tensors, self.mapped = map_tensors(path)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of this shape; None stands for any size.

        Raises:
            ValueError: no such tensor, another shape, or no floats.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.path} lacks the tensor {name}: it holds {listed(self._tensors)}")
        tensor = self._tensors[name]
        given = list(tensor.shape)
        fits = len(given) == len(shape) and all(
            size in (None, actual) for size, actual in zip(shape, given, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{self.path}: the tensor {name} has the wrong shape: expected [{expected}], got {given}")
        float_dtype(f"{self.path}: the dtype of the tensor {name}", tensor.dtype)
        self._taken.add(name)
        return tensor

    def take_if_there(self, name: str, *shape: int | None) -> Tensor | None:
        """The same, or None where the file has no such tensor."""
        return self.take(name, *shape) if name in self._tensors else None

    def ignore(self, *names: str) -> None:
        """Leave out tensors that do not change the function."""
        self._taken.update(names)

    def finish(self) -> None:
        """Refuse, with a `ValueError`, a file with tensors that were not taken."""
        left = self._tensors.keys() - self._taken
        if left:
            raise ValueError(f"{self.path} holds tensors that its layout does not have: {listed(sorted(left))}")


def norm_scale(file: TensorFile, name: str, *shape: int, width: int) -> float:
    """`sqrt(D) / norm` for a mean norm of activations that a file holds.

    Raises:
        ValueError: no such tensor, or no finite number above 0.
    """
    norm = float(file.take(name, *shape))
    if not 0 < norm < math.inf:
        raise ValueError(f"{file.path}: the tensor {name} must be a finite number above 0, got {norm}")
    return math.sqrt(width) / norm


class Settings:
    """Entries of a configuration file, taken by name and kind; `finish` refuses those that were not taken.

    Args:
        values: the entries, where they are part of another file; read from `path` (JSON or YAML) otherwise.

    Raises:
        ValueError: the file is missing or no JSON or YAML object.
    """

    def __init__(self, path: Path, values: Any = None) -> None:
        self.path = path
        self._values = _read(path) if values is None else values
        if not isinstance(self._values, dict):
            raise ValueError(f"{path}: expected an object with settings, got {type(self._values).__name__}")
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        """Names of all entries."""
        return list(map(str, self._values))

    def take(self, name: str, kind: type | tuple[type, ...], *, default: Any = ...) -> Any:
        """An entry of this kind, or the default where there is none.

        Raises:
            ValueError: no such entry and no default, or a value of another kind.
        """
        self._taken.add(name)
        if name not in self._values:
            if default is ...:
                raise ValueError(f"{self.path} lacks the entry {name!r}: it holds {listed(map(str, self._values))}")
            return default
        value = self._values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{self.path}: the entry {name!r} must be of type {expected}, got {value!r:.80}")
        return value

    def ignore(self, *names: str) -> None:
        """Leave out entries that do not change the function."""
        self._taken.update(names)

    def finish(self) -> None:
        """Refuse, with a `ValueError`, a file with entries that were not taken: they may change the function."""
        left = self._values.keys() - self._taken
        if left:
            raise ValueError(f"{self.path} has entries that are not known: {listed(sorted(map(str, left)))}")


def numbered(folder: Path, prefix: str, suffix: str) -> list[Path]:
    """The files `{prefix}{number}{suffix}` of a folder, in order of their numbers, which must be 0, 1, 2 and so on.

    Raises:
        ValueError: no such file, or one is missing in between.
    """
    numbers = sorted(_numbers(folder, prefix, suffix))
    missing = sorted(set(range(numbers[-1] + 1 if numbers else 1)) - set(numbers))
    if missing:
        last = f", but {prefix}{numbers[-1]}{suffix} is there" if numbers else ""
        raise ValueError(f"{folder} lacks the file {prefix}{missing[0]}{suffix}{last}")
    return [folder / f"{prefix}{number}{suffix}" for number in numbers]


def layer_files(folder: Path) -> tuple[list[TensorFile], list[TensorFile]]:
    """The files `W_enc_{layer}` and `W_dec_{layer}` of a cross-layer transcoder, opened.

    Raises:
        ValueError: a layer that is missing in one of them.
    """
    encoders, decoders = (
        [TensorFile(path) for path in numbered(folder, prefix, ".safetensors")] for prefix in ("W_enc_", "W_dec_")
    )
    if len(decoders) != len(encoders):
        given = f"{len(decoders)} and {len(encoders)}"
        raise ValueError(f"{folder}: expected as many W_dec files as W_enc files, got {given}")
    return encoders, decoders


def mentions(path: Path, word: str) -> bool:
    """Whether there is a file with this word in its first 64 KiB, for telling layouts apart."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return word.encode() in file.read(65536)


def _numbers(folder: Path, prefix: str, suffix: str) -> Iterator[int]:
    for path in folder.glob(f"{prefix}*{suffix}"):
        middle = path.name[len(prefix) : len(path.name) - len(suffix)]
        if middle.isascii() and middle.isdigit() and len(middle) < 10:
            yield int(middle)


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (", ".join(names[:MOST_NAMED]) or "nothing") + more


def _read(path: Path) -> Any:
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path)
    try:
        return yaml.safe_load(read_text(path, expected="settings in YAML"))
    except (yaml.YAMLError, RecursionError) as error:  # nested thousands deep is no YAML of ours either
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
