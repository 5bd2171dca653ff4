"""The tensors of a safetensors file as views of a map of it: nothing is read before it is used."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.sites import Site

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NO_RESERVE = 0x4000
"""MAP_NORESERVE of Linux, which Python has no name for; MADV_PAGEOUT neither."""
_PAGE_OUT = 21
_LARGEST_HEADER = 100_000_000


class MappedFile:
    """A private map of a file: what is read of it comes into memory, what is changed stays there and never reaches the file."""

    def __init__(self, file: int) -> None:
        if sys.platform == "linux":
            access = {"flags": mmap.MAP_PRIVATE | _NO_RESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        else:
            access = {"access": mmap.ACCESS_COPY}
        self.content = mmap.mmap(file, 0, **access)

    def __deepcopy__(self, memo: object) -> MappedFile:
        """A copy of a crosscoder reads the same file."""
        return self

    def release(self) -> None:
        """Let the system take back what was read and not changed; it is read again when it is needed."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # kernels before 5.4 do not know how
                self.content.madvise(_PAGE_OUT)


@dataclass(frozen=True)
class WeightsInFile:
    """Weights of a crosscoder that stay in their files: where they are, and how they are scaled when they are used."""

    files: Sequence[MappedFile]
    """Maps that the matrices are views of."""
    decoders: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    """Decoders `[F, D]` by (group, place), where a layout keeps the written sites apart; `W_dec` then has no memory."""
    input_scale: Mapping[Site, float] = field(default_factory=dict)
    """Encoders and skip matrices act on `scale * x`; 1 where absent."""
    output_scale: Mapping[Site, float] = field(default_factory=dict)
    """Decoders and skip matrices give `scale * y`; 1 where absent."""

    def __deepcopy__(self, memo: object) -> WeightsInFile:
        """A copy of a crosscoder reads the same files."""
        return self

    def release(self) -> None:
        """Let the system take back what was read; see `MappedFile.release`."""
        for mapped in self.files:
            mapped.release()


def map_tensors(path: Path) -> tuple[dict[str, Tensor], MappedFile]:
    """Every tensor of a file, without memory of its own, and the map that they are views of.

    The safetensors library maps files too, but reserves memory for all of it in case that it were changed, which a file larger
    than memory is refused. Here a change in place takes memory when it happens, and never reaches the file.

    Raises:
        ValueError: the file is missing, or its header is damaged or does not fit its size.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
            mapped = MappedFile(file.fileno())
        tensors, end = {}, 0
        for name, entry in sorted(_entries(header).items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the tensor {name} does not fill its place")
            flat = torch.frombuffer(mapped.content, dtype=dtype, count=math.prod(shape), offset=8 + length + begin)
            tensors[name], end = flat.view(shape), stop
        if 8 + length + end != size:
            raise ValueError(f"its header describes {8 + length + end} bytes, it has {size}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, struct.error) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    return tensors, mapped


def _entries(header: Any) -> dict[str, dict]:
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.Size, Callable[[], Tensor]]],
    dtype: torch.dtype,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write a safetensors file one tensor at a time, so that memory is needed for the largest alone.

    Args:
        tensors: name, shape and a function that gives the values, which are converted to `dtype`.
        dtypes: other dtypes, by name.
    """
    tensors = list(tensors)
    chosen = {name: (dtypes or {}).get(name, dtype) for name, _, _ in tensors}
    kinds = {known: kind for kind, known in _DTYPES.items()}
    header: dict[str, dict] = {}
    end = 0
    for name, shape, _ in tensors:
        begin, end = end, end + math.prod(shape) * chosen[name].itemsize
        header[name] = {"dtype": kinds[chosen[name]], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at multiples of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, _, values in tensors:
            file.write(values().detach().to("cpu", chosen[name]).contiguous().flatten().view(torch.uint8).numpy().data)
