"""The file of global circuits: one `.safetensors` of columns, with metadata and a digest in its header, as graphs have."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from circuits.graph.storage import digest
from replacement.files import atomic_file, check_file, checked_path

FORMAT, SCHEMA = "crosstrace.global", "1"
EXPECTED = "expected a file of global circuits, such as `circuits global` writes"


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Path:
    """Write columns and metadata atomically.

    Raises:
        ValueError: a place that cannot be written.
    """
    path = check_file(path)
    header = {"format": FORMAT, "schema": SCHEMA, "metadata": json.dumps(metadata, allow_nan=False)}
    with atomic_file(path) as scratch:
        save_file(dict(tensors), scratch, metadata={**header, "digest": digest(tensors, header)})
    return path


def load(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns and metadata.

    Raises:
        ValueError: names the file that is not there, holds something else, is damaged or of a newer version.
    """
    path = checked_path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {EXPECTED}, got {'a folder or device' if path.exists() else 'no such file'}")
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            kind, version = header.get("format"), header.get("schema")
            if (kind, version) == (FORMAT, SCHEMA):
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {EXPECTED}, got one that is damaged or foreign ({error})") from None
    if kind != FORMAT:
        raise ValueError(f"{path}: {EXPECTED}, got another kind of safetensors file ({kind})")
    if version != SCHEMA:
        raise ValueError(f"{path}: {EXPECTED} of version {SCHEMA}, got version {version}: a newer crosstrace is needed")
    if header.get("digest") != digest(tensors, header):
        raise ValueError(f"{path}: {EXPECTED}, got a damaged one: its content is not that of its digest")
    return tensors, json.loads(header["metadata"])
