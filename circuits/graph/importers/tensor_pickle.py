"""What `torch.save` wrote, read without torch and without running anything of the file.

Such a file is a zip archive with `data.pkl`, a pickle, and the numbers of each storage in an entry of its own. A pickle is a
program that may call whatever it can name. Here names are looked up in `_NAMES` alone, and any other is refused before
it is called. The table holds texts, and classes that only keep what they are given: tensors as a description of where
their numbers lie, objects of configuration classes as dictionaries of their attributes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_DAMAGED = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error)
"""What reading a damaged archive raises, besides `OSError` and `ValueError`."""


class _Tuple(tuple):
    """A named tuple, a device or a size: the arguments that it is made of."""

    __slots__ = ()

    def __new__(cls, *items: Any) -> _Tuple:
        return super().__new__(cls, items)

    def __setstate__(self, state: object) -> None:
        # Every class of `_NAMES` has this method. Without it, a pickle could change the attributes of the class itself.
        raise pickle.UnpicklingError("a tuple has no state")


class _Attributes(dict):
    """An object of a class that is not loaded: its attributes."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # attributes, and those in slots
            self.update(part or {})


class _Storage:
    """Numbers in an entry of the archive."""

    __slots__ = ("count", "key", "type_name")

    def __init__(self, type_name: str, key: str, count: int) -> None:
        self.type_name, self.key, self.count = type_name, key, count

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a storage has no state")


class _Tensor:
    """A strided view of a storage; `TensorFile` reads its numbers."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a tensor has no state")


_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("collections", "OrderedDict"): dict,
    ("torch", "Size"): _Tuple,
    ("torch", "device"): _Tuple,
    ("circuit_tracer.attribution.targets", "LogitTarget"): _Tuple,
    ("circuit_tracer.utils.tl_nnsight_mapping", "UnifiedConfig"): _Attributes,
    **{
        (module, "HookedTransformerConfig"): _Attributes
        for module in (
            "transformer_lens.HookedTransformerConfig",
            "transformer_lens.config.HookedTransformerConfig",
        )
    },
    **{("torch", name): name for name in (*_DTYPES, "float64", "float32", "float16", "bfloat16")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, but only tensors and plain values are read")
        return _NAMES[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", str(type_name), str(key), _, int(count)) if type_name in _DTYPES and count >= 0:
                return _Storage(type_name, key, count)
        raise pickle.UnpicklingError("it refers to something other than a storage of numbers")


def _check_size(program: bytes) -> None:
    """Refuse a short pickle that would take a lot of memory: for texts longer than itself, or a memo with huge numbers."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument >= len(program):
            raise pickle.UnpicklingError(f"it remembers a value as number {argument}")


class TensorFile:
    """The value in a file of `torch.save`, and the numbers of its tensors."""

    def __init__(self, path: Path) -> None:
        """Read all but the tensors' numbers.

        Raises:
            ValueError: the file is damaged, no file of `torch.save`, or holds anything but tensors and plain values.
        """
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except _DAMAGED as error:
            raise ValueError(f"damaged or cut off ({error})") from error
        folders = [name.removesuffix("data.pkl") for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(folders) != 1:
            raise ValueError("expected an archive with data.pkl, as torch.save makes it, given another")
        self._folder = folders[0]
        if self._folder + "byteorder" in names and self._read("byteorder") != b"little":
            raise ValueError("expected numbers in little-endian order, given others")
        pickled = self._read("data.pkl")
        try:
            _check_size(pickled)
            self.value = _Unpickler(io.BytesIO(pickled)).load()
        except (pickle.UnpicklingError, ValueError, AttributeError, TypeError, LookupError, EOFError) as error:
            raise ValueError(f"refused or damaged: {error or type(error).__name__}") from error

    def array(self, tensor: object, name: str) -> np.ndarray:
        """The numbers of a tensor; bfloat16 as float32.

        Raises:
            ValueError: what `name` stands for is no tensor, or does not lie in its storage.
        """
        match tensor:
            case _Tensor(storage=_Storage() as storage, offset=int(offset), size=tuple(size), stride=tuple(stride)):
                pass
            case _:
                raise ValueError(f"expected {name} to be a tensor, given {type(tensor).__name__.strip('_').lower()}")
        fits = len(size) == len(stride) and all(
            isinstance(number, int) and number >= 0 for number in (offset, *size, *stride)
        )
        n_numbers = math.prod(size) if fits else 0
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if n_numbers else 0
        if not fits or n_numbers > storage.count or last >= max(storage.count, 1):
            raise ValueError(f"expected {name} to lie in its storage of {storage.count} numbers")
        content, dtype = self._read(f"data/{storage.key}"), np.dtype(_DTYPES[storage.type_name])
        if len(content) != storage.count * dtype.itemsize:
            raise ValueError(f"expected {storage.count * dtype.itemsize} bytes for {name}, given {len(content)}")
        if not n_numbers:
            return np.zeros(size, dtype)
        flat, steps = np.frombuffer(content, dtype)[offset:], [step * dtype.itemsize for step in stride]
        view = np.lib.stride_tricks.as_strided(flat, size, steps, writeable=False)
        if storage.type_name == "BFloat16Storage":  # the upper half of a float32
            return np.left_shift(view, 16, dtype=np.uint32, out=np.empty(size, np.uint32)).view(np.float32)
        return view

    def _read(self, name: str) -> bytes:
        try:
            with zipfile.ZipFile(self._path) as archive:
                entry = archive.getinfo(self._folder + name)
                if entry.compress_type != zipfile.ZIP_STORED:  # a small file could unfold into a huge one
                    raise ValueError(f"expected {name} without compression, as torch.save writes it")
                return archive.read(entry)
        except KeyError:
            raise ValueError(f"expected an archive with {name}, given one without") from None
        except _DAMAGED as error:
            raise ValueError(f"damaged or cut off ({error})") from error
