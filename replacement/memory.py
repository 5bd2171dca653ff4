"""How much memory this process holds, and how much it can still have. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


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
