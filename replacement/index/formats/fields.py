"""Facts of JSON objects that other tools wrote, checked one by one: every mistake names its file, place and key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object and where it is from; every method raises `ValueError` for a missing key and a value of another kind."""

    values: Mapping[str, Any]
    where: str
    """File and place, for messages."""

    @classmethod
    def of(cls, value: Any, where: str) -> Fields:
        """Of a value that has to be an object."""
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, given {value!r:.50}")
        return cls(value, where)

    def get(self, key: str) -> Any:
        """Any value."""
        if key not in self.values:
            raise ValueError(f"{self.where}: {key} is missing")
        return self.values[key]

    def has(self, key: str) -> bool:
        """Whether there is a value, and one that is not null."""
        return self.values.get(key) is not None

    def error(self, key: str, expected: str, value: Any) -> ValueError:
        """What is wrong with a value."""
        return ValueError(f"{self.where}: expected {key} to be {expected}, given {value!r:.50}")

    def whole(self, key: str) -> int:
        """A whole number from 0, or a text that is one."""
        value = self.get(key)
        if isinstance(value, str) and value.isdecimal() and len(value) < 19:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise self.error(key, "a whole number from 0", value)
        return value

    def number(self, key: str, *, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number."""
        return self._number(key, self.get(key), least, most)

    def numbers(self, key: str, *, least: float = -math.inf) -> list[float]:
        """A list of finite numbers."""
        return [self._number(key, value, least, math.inf) for value in self.list(key)]

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        values = self.list(key)
        for value in values:
            if not isinstance(value, str):
                raise self.error(key, "a list of texts", value)
        return values

    def text(self, key: str) -> str:
        """A text."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(key, "a text", value)
        return value

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        return [Fields.of(value, f"{self.where}, {key}[{place}]") for place, value in enumerate(self.list(key))]

    def list(self, key: str) -> list[Any]:
        """A list."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self.error(key, "a list", value)
        return value

    def pairs(self, texts: str, numbers: str) -> tuple[tuple[str, float], ...]:
        """Two lists of one length."""
        left, right = self.texts(texts), self.numbers(numbers)
        if len(left) != len(right):
            raise ValueError(f"{self.where}: {texts} has {len(left)} entries, {numbers} {len(right)}")
        return tuple(zip(left, right, strict=True))

    def _number(self, key: str, value: Any, least: float, most: float) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if not is_number or not least <= value <= most:
            span = (
                "" if least == -math.inf else " of at least 0" if most == math.inf else f" from {least:g} to {most:g}"
            )
            raise self.error(key, f"a finite number{span}", value)
        return float(value)
