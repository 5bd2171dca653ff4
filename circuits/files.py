"""Writing files so that a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a `Path`, made if it is missing. Raises `ValueError` when files cannot be written into it."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: expected a folder that can be made and written to ({error.strerror})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: expected a folder that can be written to (permission denied)")
    return path


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path` through a temporary file beside it.

    Raises `ValueError` when that fails.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file name, given a folder")
    folder = check_folder(path.parent)
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=folder)
    except OSError as error:
        raise ValueError(f"{folder}: expected a folder that can be written to ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files private; give the file the permissions any new file would get.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise ValueError(f"{path}: could not be written ({error.strerror})") from error
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
