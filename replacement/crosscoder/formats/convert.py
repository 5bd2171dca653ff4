"""Write a crosscoder of one layout in another one, a tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from replacement.crosscoder.checks import float_dtype
from replacement.crosscoder.formats.layouts import open_published, writable
from replacement.crosscoder.formats.writing import check_holds
from replacement.crosscoder.lorsa import Lorsa
from replacement.files import atomic_folder


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "crosstrace",
    dtype: torch.dtype | None = None,
    model: Any = None,
) -> None:
    """Copy a crosscoder into another layout; the copy computes the same function.

    Memory is needed for one tensor at a time. The copy keeps the fingerprint: graphs traced with one go on with the other.

    Args:
        source: a crosscoder in any known layout, on this machine.
        target: a folder that does not exist yet, or is empty.
        to: name of a layout that can be written.
        dtype: of the copy; by default that of the source, or float32 where scales are folded into its weights.
        model: a language model, which the copy is tied to by name and fingerprint; what the source says by default.

    Raises:
        ValueError: `source` cannot be read, `to` is no layout that can be written, the layout has no place for something that
            the crosscoder has (named), the model is another one, or the target cannot be written.
    """
    layouts = writable()
    if to not in layouts:
        raise ValueError(f"to: expected one of {', '.join(layouts)}, got {to!r:.50}")
    published = open_published(Path(source))
    if dtype is None:
        scaled = published.input_scale or published.output_scale
        dtype = torch.float32 if scaled else published.stored_dtype
    float_dtype("the dtype of a copy", dtype)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    crosscoder = published.load(dtype=precise, device="cpu", lazy=True)
    if model is not None:
        crosscoder.wiring.check_fits(model)
        crosscoder.model_name, crosscoder.model_fingerprint = model.name, model.fingerprint
    check_holds(to, {"queries and keys": isinstance(crosscoder, Lorsa) and not layouts[to].holds_lorsa})
    write = layouts[to].write
    assert write is not None
    with atomic_folder(Path(target)) as scratch:
        write(crosscoder, scratch, dtype)
