"""Features of all parts and layers under one number, and by name. Imports no torch and no models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuits.graph.text import parse_feature_name

PARTS = ("mlp", "attention")


@dataclass(frozen=True, slots=True)
class FeatureNumbers:
    """Features of all parts numbered by part, layer and index.

    Attributes:
        parts: for each part (`mlp`, then `attention` where there is one) the layers that have features, and their number.
    """

    parts: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def n_features(self) -> int:
        """Features of all parts and layers, F."""
        return sum(len(layers) * n_features for layers, n_features in self.parts)

    def numbers(self, part: np.ndarray, layer: np.ndarray, index: np.ndarray) -> np.ndarray:
        """int64, the number of each feature; -1 where there is none."""
        result, first = np.full(len(part), -1, np.int64), 0
        for place, (layers, n_features) in enumerate(self.parts):
            row = np.searchsorted(layers, layer).clip(max=len(layers) - 1)
            there = (part == place) & (np.asarray(layers)[row] == layer) & (index >= 0) & (index < n_features)
            result[there] = first + row[there] * n_features + index[there]
            first += len(layers) * n_features
        return result

    def feature(self, number: int) -> tuple[str, int, int]:
        """Part, layer and index of a feature."""
        for part, (layers, n_features) in zip(PARTS, self.parts, strict=False):
            if number < len(layers) * n_features:
                return part, layers[number // n_features], number % n_features
            number -= len(layers) * n_features
        raise AssertionError("a number beyond the last feature")

    def name(self, number: int) -> str:
        """`2/345`, or `attention:2/345`."""
        part, layer, index = self.feature(number)
        return f"{'attention:' if part == 'attention' else ''}{layer}/{index}"

    def named(self, name: str) -> int:
        """The number of a feature named so.

        Raises:
            ValueError: another form of name, or no such feature.
        """
        part, layer, index, _ = parse_feature_name(name)
        (number,) = self.numbers(np.array([PARTS.index(part)]), np.array([layer]), np.array([index])).tolist()
        if number < 0:
            there = "; ".join(
                f"{part} layers {', '.join(map(str, layers))} with features 0 to {n_features - 1}"
                for part, (layers, n_features) in zip(PARTS, self.parts, strict=False)
            )
            raise ValueError(f"there is no feature {name.strip()!r:.60}: expected one of {there}")
        return int(number)
