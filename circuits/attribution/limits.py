"""What a trace may cost: how many features are expanded and labelled by default, and a limit on memory. Imports no torch."""

from __future__ import annotations

import re

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
