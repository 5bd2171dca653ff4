"""Reading JSON files, and writing files and folders so that a reader meets the old content or the whole new one, never a part.

Everything is first written into a scratch folder (`scratch_folders.py`), flushed to disk, and then renamed to its place. The
process's umask is never touched; the kernel applies it to the folders and files made here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from replacement.scratch_folders import make_folder, scratch_folder, swap

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: names the file that does not exist, cannot be read or is not JSON.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def sha256_of(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path, existing or not.

    Raises:
        ValueError: an empty text, something that is no path, or a name that no file can have.
    """
    if not isinstance(path, str | os.PathLike) or not str(path).strip():
        raise ValueError(f"expected the path of a file or folder, given {path!r:.50}")
    _kind(Path(path))
    return Path(path)


def read_text(path: str | os.PathLike[str], *, expected: str) -> str:
    """Text of a regular file in UTF-8, with or without a byte order mark.

    Args:
        expected: what the file should hold, for messages.

    Raises:
        ValueError: nothing is there, or something other than a regular file, or other bytes than UTF-8.
    """
    path = checked_path(path)
    if not path.is_file():
        found = f"is a {_kind(path.resolve())}" if path.exists() else "does not exist"
        raise ValueError(f"{path} {found}: expected {expected}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected {expected} in UTF-8, but it cannot be read so ({error})") from error


def check_file(path: str | os.PathLike[str]) -> Path:
    """Check, before the work is done, that `write_atomic` can write to `path`; leaves nothing behind.

    Raises:
        ValueError: something other than a regular file is there, or its folder takes no new files.
    """
    path = checked_path(path)
    _check_regular_file(path)
    check_folder(path.parent)
    return path


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Check, before the work is done, that files can be written into `folder`, existing or not; leaves nothing behind.

    Raises:
        ValueError: the path or a part of it is no folder, or takes no new files (permissions, full disk, `/proc`).
    """
    path = checked_path(folder)
    existing = _existing_folder(path)
    try:
        os.rmdir(make_folder(existing, path.name))
    except OSError as error:
        reason = _reason(error)
        raise ValueError(
            f"{path}: expected a folder that can be written to, but {existing} takes no new files ({reason})"
        ) from error
    return path


def write_atomic(path: str | os.PathLike[str], content: str | bytes | Iterable[str]) -> Path:
    """Write `content` (text as UTF-8, whole or in pieces that are written as they come) to `path`, replacing a regular file;
    makes missing folders.

    Raises:
        ValueError: names the path and the reason (see `check_file`; a full disk).
    """
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            for piece in [content] if isinstance(content, str) else content:
                file.write(piece.encode("utf-8", errors="replace"))
    return Path(path)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when the block ends without an error; makes missing folders.

    Raises:
        ValueError: names the path and the reason (see `check_file`; a full disk). Operating system errors inside the block
            are reported so, too.
    """
    path = checked_path(path)
    _check_regular_file(path)
    with _errors_named(path), _scratch_in(path.parent, path.name) as scratch:
        yield scratch / path.name
        _flush(scratch)
        _check_regular_file(path)  # it may have appeared meanwhile
        os.replace(scratch / path.name, path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, replaces: Collection[str] = (), keep_others: bool = False
) -> Iterator[Path]:
    """An empty folder to write to, which becomes `path` when the block ends without an error.

    An old folder is renamed aside, the new one takes its place, and the old one is removed. A process killed between these two
    renames leaves the old folder aside; the next write moves it back first.

    Args:
        replaces: names that an existing folder may hold, to be replaced as a whole; any other is refused.
        keep_others: instead, move what the block wrote into the existing folder, file by file, replacing files of these
            names and keeping all others.

    Raises:
        ValueError: names the path and the reason: something other than a folder is there, a folder with other content, no
            permission, a full disk. Operating system errors inside the block are reported so, too.
    """
    path = checked_path(path)
    merges = _kind(path) is not None and keep_others and path.is_dir()
    with _errors_named(path), _scratch_in(path if merges else path.parent, path.name) as scratch:
        _check_replaceable(path, replaces, keep_others)
        yield scratch
        _flush(scratch)
        _check_replaceable(path, replaces, keep_others)
        if keep_others and path.is_dir():
            _move_files(scratch, path)
        else:
            swap(scratch, path)
        _flush_folder(path.parent)


# What may be written where -------------------------------------------------------------------------------------------


def _kind(path: Path) -> str | None:
    """What lies at a path, without following a symbolic link; None for nothing."""
    try:
        return _KINDS.get(stat.S_IFMT(os.lstat(path).st_mode), "special file")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name that is too long or holds a null character
        raise ValueError(f"{str(path)[:200]!r}: cannot be a file name ({_reason(error)})") from error


def _check_regular_file(path: Path) -> None:
    kind = _kind(path)
    if kind == "folder":
        raise ValueError(f"{path}: expected a file name, given a folder")
    if kind not in (None, "file"):
        raise ValueError(f"{path}: expected a file name, given a {kind}, which is never replaced")


def _check_replaceable(path: Path, replaces: Collection[str], keep_others: bool) -> None:
    kind = _kind(path)
    if kind is None or (keep_others and path.is_dir()):  # a link to a folder stays what it is
        return
    if kind != "folder":
        raise ValueError(f"{path}: expected a folder, but it is a {kind}, which is never replaced")
    others: list[str] = []
    with _errors_named(path), contextlib.suppress(FileNotFoundError):  # another writer may have moved it aside just now
        others = sorted(set(os.listdir(path)) - set(replaces))
    if others:
        raise ValueError(f"{path}: holds {others[0]!r}, which would be lost; choose another folder")


def _existing_folder(path: Path) -> Path:
    """The folder at `path`, or the closest one above it that exists."""
    with _errors_named(path):  # the working directory may have been removed
        places = (path, *path.absolute().parents)
    existing = next(place for place in places if _kind(place) is not None)
    if not existing.is_dir():
        raise ValueError(f"{path}: expected a folder, but {existing} is a {_kind(existing)}")
    return existing


@contextlib.contextmanager
def _scratch_in(parent: Path, name: str) -> Iterator[Path]:
    """A scratch folder in `parent`, which is made where it is missing."""
    _existing_folder(parent)
    with scratch_folder(parent, name) as scratch:
        yield scratch


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        other = getattr(error, "filename", None)  # the block may also have read something
        culprit = f": {other}" if other and not Path(other).is_relative_to(path.parent) else ""
        raise ValueError(f"{path}: could not be written ({_reason(error)}{culprit})") from error


def _reason(error: Exception) -> str:
    """The operating system's words, also where safetensors wraps them."""
    wrapped = re.search(r"I/O error: (.+?) \(os error", str(error))
    return getattr(error, "strerror", None) or (wrapped[1] if wrapped else str(error))


# Taking the target's place -------------------------------------------------------------------------------------------


def _move_files(scratch: Path, target: Path) -> None:
    files = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
    for file in files:
        _check_regular_file(target / file)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / file, target / file)
    for folder in {(target / file).parent for file in files}:
        _flush_folder(folder)


def _flush(scratch: Path) -> None:
    """Bring all files to disk: a rename is only safe once what it names is there.

    Some writers make private files; all get the permissions that a file newly made here has.
    """
    mode = stat.S_IMODE(scratch.stat().st_mode) & 0o666
    for path in scratch.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
    _flush_folder(scratch)


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
