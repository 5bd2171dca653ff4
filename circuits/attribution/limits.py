"""What a trace may cost: how many features are expanded and labelled by default, and a limit on memory. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from replacement.number_checks import whole_number

MAX_NODES = 2000
"""Most features that a trace expands by default.

Traces of the demo model end by coverage far below it. On a model of 30 layers, where thousands of features each hold a small
share of the influence, it bounds time and file size.
"""
LABELLED = 100
"""Features that `trace` labels, the most influential ones: more than a picture shows, and about a tenth of the time that the
default number of expanded features takes on a model with a vocabulary of 50,000."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", re.IGNORECASE)


def memory_bytes(memory: str | int) -> int:
    """Number of bytes of a size such as `4GB`, `512 MiB` or a whole number of bytes.

    Raises:
        ValueError: another text, or a size that is not above 0.
    """
    if not isinstance(memory, str):
        return whole_number("memory", memory, least=1)
    match = _SIZE.fullmatch(memory.strip())
    if match is not None and (not match[3] or match[2]):
        base = _UNITS[match[2].lower()]
        size = int(float(match[1]) * (1024 ** list(_UNITS.values()).index(base) if match[3] else base))
        if 0 < size < 2**63:
            return size
    raise ValueError(f"memory: expected a size above 0 such as 4GB or 512MiB, given {memory[:40]!r}")


def size_text(n_bytes: int) -> str:
    """A number of bytes for people: `1.4 GB`."""
    unit = "GB" if n_bytes >= 10**9 else "MB"
    return f"{n_bytes / {'GB': 10**9, 'MB': 10**6}[unit]:.3g} {unit}"


def resident_memory() -> int:
    """Bytes that this process holds in memory now; 0 where the system does not say (not Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def available_memory() -> int | None:
    """Bytes that this process can still allocate: free memory of the machine, or of its control group where that has less.

    None where the system does not say.
    """
    found = [free for free in (_free_memory(), *_free_in_groups()) if free is not None]
    return max(0, min(found)) if found else None


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:  # macOS and Windows have no such names
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _free_in_groups(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Limit minus use of this process's control groups (version 2 and 1) and of their ancestors.

    A container may show its own group at the root instead, whatever the process's file says.
    """
    try:
        entries = [line.split(":", 2) for line in process.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        limit, use = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                allowed, used = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, use))
                yield int(allowed) - int(used) + _reclaimable(folder)
            except (OSError, ValueError):  # no such group here, or "max": no limit
                pass
            if folder == top:
                break


def _reclaimable(folder: Path) -> int:
    """Bytes of files in a group's cache that the kernel drops when memory is short."""
    for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name in ("total_inactive_file", "inactive_file"):
            return int(value)
    return 0
