"""Scratch folders: where something new is written until it takes its place, beside that place.

The name of a scratch folder holds the host and the process id: the next write to the same place removes what a killed process
left behind.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

_NUMBERS = itertools.count()
"""Numbers of the scratch folders of this process; none is used twice, because another thread may still remove it."""


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, removed in the end, after those that killed processes left for the same name."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent, name)
    scratch = make_folder(parent, name)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_folder(parent: Path, name: str, suffix: str = "tmp") -> Path:
    """A new folder in `parent`, whose name says what it is for and which process made it."""
    while True:
        path = parent / f"{_prefix(name)}{os.getpid()}-{next(_NUMBERS)}.{suffix}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
            return path


def swap(scratch: Path, target: Path) -> None:
    """Rename `scratch` to `target`; a folder that holds files cannot be renamed over, so it steps aside first."""
    asides: list[Path] = []
    try:
        while True:
            try:
                os.rename(scratch, target)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            asides.append(make_folder(target.parent, target.name, "old"))
            with contextlib.suppress(FileNotFoundError):  # another writer moved it aside in this moment
                os.rename(target, asides[-1])
    except OSError:
        with contextlib.suppress(OSError, IndexError):
            os.rename(asides[-1], target)
        raise
    finally:
        for aside in asides:
            shutil.rmtree(aside, ignore_errors=True)


def _prefix(name: str) -> str:
    """Start of the names of scratch folders for a target: its own name, short enough for every file system, and a digest."""
    digest = zlib.crc32(os.fsencode(name))
    return f".{name[:32]}.{digest:08x}.{socket.gethostname()[:64]}-"


def _remove_leftovers(parent: Path, name: str) -> None:
    pattern = re.compile(re.escape(_prefix(name)) + r"(\d+)-\d+\.(tmp|old)")
    for entry in os.listdir(parent):
        match = pattern.fullmatch(entry)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not os.path.lexists(parent / name):
            with contextlib.suppress(OSError):  # another process has just done the same
                os.rename(parent / entry, parent / name)
        shutil.rmtree(parent / entry, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
