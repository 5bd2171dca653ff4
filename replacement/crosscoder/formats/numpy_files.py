"""The arrays of a NumPy `.npz` file as tensors: those stored as they are, as views of a map of the file.

An `.npz` is a zip file of `.npy` files. `numpy.savez` stores them uncompressed, so that an array lies in one piece in the file;
`numpy.savez_compressed` does not: such an array is read into memory when it is asked for. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replacement.crosscoder.mapped_file import MappedFile
from replacement.memory import available_memory, size_text

_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64, "<i4": torch.int32, "<i8": torch.int64}
_LONGEST_HEADER = 10_000
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""In front of a member's content in a zip file; the last two numbers are the lengths of its name and of extra fields."""


class ArraysInFile(Mapping[str, Tensor]):
    """The arrays of an `.npz` file by name, each made when it is asked for.

    Raises:
        ValueError: the file is missing or damaged, or an array is no plain little-endian number array, or is compressed and
            larger than the free memory.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        self.path = path
        try:
            with path.open("rb") as file:
                self.mapped = MappedFile(file.fileno())
            with zipfile.ZipFile(path) as archive:
                self._members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path} is damaged or not a NumPy file: {error}") from None

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __getitem__(self, name: str) -> Tensor:
        member = self._members[name]
        try:
            if member.compress_type == zipfile.ZIP_STORED:
                return self._view(member)
            return self._decompressed(member)
        except (zipfile.BadZipFile, OSError, ValueError, KeyError, RuntimeError, EOFError, struct.error) as error:
            raise ValueError(f"{self.path}: cannot read the array {name}: {error}") from None

    def _view(self, member: zipfile.ZipInfo) -> Tensor:
        content, begin = self.mapped.content, member.header_offset
        *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(content, begin)
        begin += _LOCAL_HEADER.size + name_length + extra_length
        header = io.BytesIO(content[begin : begin + min(member.file_size, _LONGEST_HEADER)])
        shape, is_fortran, dtype = _described(header)
        size, begin = math.prod(shape), begin + header.tell()
        if header.tell() + size * dtype.itemsize != member.file_size:
            raise ValueError(
                f"its header describes {header.tell() + size * dtype.itemsize} bytes of {member.file_size}"
            )
        flat = torch.frombuffer(content, dtype=dtype, count=size, offset=begin) if size else torch.empty(0, dtype=dtype)
        return flat.view(shape[::-1]).permute(*reversed(range(len(shape)))) if is_fortran else flat.view(shape)

    def _decompressed(self, member: zipfile.ZipInfo) -> Tensor:
        available = available_memory()
        if available is not None and member.file_size > available:
            raise ValueError(
                f"it is compressed, so that it must be read into memory whole: {size_text(member.file_size)}, "
                f"{size_text(available)} are free; write the file with numpy.savez, which leaves arrays readable in place"
            )
        with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.str not in _DTYPES:
            raise ValueError(f"expected an array of {', '.join(_DTYPES)}, got {array.dtype.str}")
        return torch.from_numpy(array)


def _described(header: io.BytesIO) -> tuple[tuple[int, ...], bool, torch.dtype]:
    """Shape, whether columns come first, and dtype of an `.npy` file, which is left behind its header."""
    version = np.lib.format.read_magic(header)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its header has version {version}, expected one of {', '.join(map(str, readers))}")
    shape, is_fortran, dtype = readers[version](header)
    if dtype.str not in _DTYPES:
        raise ValueError(f"expected an array of {', '.join(_DTYPES)}, got {dtype.str}")
    return shape, is_fortran, _DTYPES[dtype.str]
