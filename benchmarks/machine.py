"""What every benchmark says of the machine, and how much memory a process took. Imports nothing that has to be installed."""

from __future__ import annotations

import os
import platform
import resource
import sys
from datetime import date
from pathlib import Path

_STATUS = Path("/proc/self/status")


def machine() -> str:
    """Date, processor and number of cores."""
    return f"{date.today()}, {processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    names = [row.split(":")[1].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Largest resident memory of this process so far, or since `reset_peak`."""
    if _STATUS.exists():
        return _kilobytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def allocated_bytes() -> int:
    """Resident memory that the process allocated: what it maps from files is left out. 0 where the system does not say."""
    return _kilobytes("RssAnon") if _STATUS.exists() else 0


def reset_peak() -> bool:
    """Let the peak begin anew; False where the kernel cannot (all but Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _kilobytes(name: str) -> int:
    rows = (row for row in _STATUS.read_text().splitlines() if row.startswith(f"{name}:"))
    return 1024 * next(int(row.split()[1]) for row in rows)
