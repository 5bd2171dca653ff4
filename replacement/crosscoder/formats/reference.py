"""What a reference says besides a path: `PATH?read=mlp_in&write=mlp_out&layer=5`, for files that do not say it themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from replacement.crosscoder.sites import SITE_KINDS

_KEYS = ("read", "write", "layer")


@dataclass(frozen=True)
class Asked:
    """Sites that a reference names; false where it names none."""

    read: str | None = None
    """Kind of site that is read, such as `mlp_in`."""
    write: str | None = None
    """Kind of site that is written; the one that is read by default."""
    layers: tuple[int, ...] = ()
    """Layers of the groups, in order."""

    def __bool__(self) -> bool:
        return self != Asked()

    def __str__(self) -> str:
        """As it was written behind the path, with its question mark."""
        layers = ",".join(map(str, self.layers))
        named = {"read": self.read, "write": self.write, "layer": layers}
        return "?" + "&".join(f"{key}={value}" for key, value in named.items() if value)

    @classmethod
    def split(cls, path: Path) -> tuple[Path, Asked]:
        """A path without the query at its end, and what the query says.

        Raises:
            ValueError: another key than read, write and layer, or a value that is no kind of site or layer.
        """
        text, mark, query = str(path).partition("?")
        if not mark or path.exists():
            return path, cls()
        values = dict(parse_qsl(query, keep_blank_values=True))
        for key, value in values.items():
            if key not in _KEYS:
                raise ValueError(f"{path}: expected ?read=KIND&write=KIND&layer=N, got the key {key!r:.50}")
            if key != "layer" and value not in SITE_KINDS:
                raise ValueError(f"{path}: {key}: expected one of {', '.join(SITE_KINDS)}, got {value!r:.50}")
        numbers = values.get("layer", "")
        if "layer" in values and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", numbers, re.ASCII):
            raise ValueError(f"{path}: layer: expected a number, or several as in 5,9,12, got {numbers!r:.50}")
        layers = tuple(int(number) for number in numbers.split(",")) if numbers else ()
        return Path(text), cls(values.get("read"), values.get("write"), layers)

    def require(self, path: Path, **found: object) -> None:
        """Refuse, with a `ValueError` that says how to name it, what neither the file nor the reference says."""
        missing = [key for key, value in found.items() if value is None]
        if missing:
            raise ValueError(
                f"{path} does not say its {' and '.join(missing)}: name what is read and written and the layer behind the "
                f"path, as in {path.name}?read=mlp_in&write=mlp_out&layer=5 (kinds: {', '.join(SITE_KINDS)}; an SAE writes "
                f"what it reads)"
            )
