"""The layouts there are, and which of them a folder or file has: told by content, not by name."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from replacement.crosscoder.formats import (
    circuit_tracer,
    clt_training,
    cross_layer_topk,
    gemma_scope,
    llama_scope,
    native,
    saelens,
    sparsify,
)
from replacement.crosscoder.formats.published import Layout, Published
from replacement.crosscoder.formats.reference import Asked
from replacement.crosscoder.formats.tensor_files import listed
from replacement.files import checked_path

_MOST_FILES = 200
"""Files of a folder that are looked at for a message."""


LAYOUTS = (
    *native.LAYOUTS,
    *circuit_tracer.LAYOUTS,
    *gemma_scope.LAYOUTS,
    *saelens.LAYOUTS,
    *llama_scope.LAYOUTS,
    *cross_layer_topk.LAYOUTS,
    *sparsify.LAYOUTS,
    *clt_training.LAYOUTS,
)
"""In the order in which they are tried."""


def writable() -> dict[str, Layout]:
    """The layouts that can be written, by name."""
    return {layout.name: layout for layout in LAYOUTS if layout.write is not None}


def open_published(path: Path) -> Published:
    """Find out the layout of a folder or file, and open it.

    Raises:
        ValueError: nothing is there, it has no known layout (the message says what was found), or whatever its reader says.
    """
    path, asked = Asked.split(checked_path(path))
    for layout in LAYOUTS:
        if not layout.detect(path):
            continue
        if layout.read_asked is not None:
            return layout.read_asked(path, asked)
        if asked:
            raise ValueError(f"{path} (layout {layout.name}) says itself what it reads and writes: leave out {asked}")
        return layout.read(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected the folder of a crosscoder, or hf:ORG/REPO on the hub")
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"{path} has no known layout ({known}): it holds {_contents(path)}")


def _contents(path: Path) -> str:
    """Files, and the tensors of the first of them, for a message."""
    files = (
        sorted(file for file, _ in zip(path.rglob("*"), range(_MOST_FILES), strict=False)) if path.is_dir() else [path]
    )
    names = listed(str(file.relative_to(path)) for file in files if file.is_file()) if path.is_dir() else path.name
    first = next((file for file in files if file.suffix == ".safetensors"), None)
    if first is None:
        return names
    try:
        with safe_open(first, framework="np") as tensors:
            return f"{names}; {first.name} holds the tensors {listed(tensors.keys())}"
    except (SafetensorError, OSError):
        return names
