"""Rotary position embeddings: queries and keys are turned by angles that grow with their position (Su et al. 2021).

Letters: T tokens, K width of a query or key, R rotated part of K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.number_checks import number, whole_number


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary position embedding: the first R channels are turned, pair by pair, by an angle that depends on the position."""

    cos_TR: Float[Tensor, "T R"]
    sin_TR: Float[Tensor, "T R"]
    neighbours: bool
    """Pairs are the channels (0, 1), (2, 3), ... (GPT-J, Cohere); otherwise (i, i + R / 2)."""

    def apply(self, x: Tensor, position: int | slice = slice(None)) -> Tensor:
        """Rotate the last axis of `[..., K]`: for one position, or for all along the axis before it."""
        rotated, rest = x.tensor_split([self.cos_TR.shape[-1]], dim=-1)
        turned = _rotate_neighbours(rotated) if self.neighbours else _rotate_halves(rotated)
        return torch.cat([rotated * self.cos_TR[position] + turned * self.sin_TR[position], rest], -1)


def _rotate_neighbours(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _rotate_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


@dataclass(frozen=True)
class Rotary:
    """The angles of a rotary position embedding, as a plain value: pair i is turned by `position * frequencies[i]`.

    Raises:
        ValueError: no frequencies, or one that is negative or no finite number.
    """

    frequencies: tuple[float, ...]
    """Radians per position of every pair of channels; twice as many channels are rotated."""
    neighbours: bool = False
    """Whether pairs are the channels (0, 1), (2, 3), ...; see `Rotation`."""

    def __post_init__(self) -> None:
        if not self.frequencies:
            raise ValueError("rotary positions need one frequency or more, got none")
        for frequency in self.frequencies:
            number("a rotary frequency", frequency)

    @classmethod
    def of_base(cls, n_channels: int, *, base: float = 10_000.0, neighbours: bool = False) -> Rotary:
        """The usual frequencies `base ** (-2 i / n_channels)`.

        Raises:
            ValueError: an odd number of channels, or a base that is not above 0.
        """
        if whole_number("the number of rotated channels", n_channels, least=2) % 2:
            raise ValueError(f"the number of rotated channels must be even, got {n_channels}")
        number("the rotary base", base, positive=True)
        return cls(tuple(base ** (-pair / n_channels) for pair in range(0, n_channels, 2)), neighbours)

    @classmethod
    def of_rotation(cls, rotation: Rotation) -> Rotary:
        """The frequencies of a rotation of two positions or more, if they lie below half a turn; see `matches`."""
        angle_R = torch.atan2(rotation.sin_TR[1].double(), rotation.cos_TR[1].double())
        angle_P = angle_R[::2] if rotation.neighbours else angle_R[: len(angle_R) // 2]
        return cls(tuple(angle_P.tolist()), rotation.neighbours)

    def matches(self, rotation: Rotation) -> bool:
        """Whether a rotation turns every position as these frequencies do, and does nothing else (YaRN also scales)."""
        cos_TR, sin_TR = rotation.cos_TR, rotation.sin_TR
        own = self.rotation(len(cos_TR), dtype=cos_TR.dtype, device=cos_TR.device)
        pairs = ((own.cos_TR, cos_TR), (own.sin_TR, sin_TR))
        return own.neighbours == rotation.neighbours and all(
            x.shape == y.shape and bool((x - y).abs().max() < 1e-4) for x, y in pairs
        )

    @property
    def n_channels(self) -> int:
        """Rotated channels R of every query and key; the others are left as they are."""
        return 2 * len(self.frequencies)

    def rotation(self, n_positions: int, *, dtype: torch.dtype, device: torch.device | str) -> Rotation:
        """Cosines and sines of positions 0 to T - 1, computed in float64."""
        position_T = torch.arange(n_positions, dtype=torch.float64)
        angle_TP = position_T[:, None] * torch.tensor(self.frequencies, dtype=torch.float64)
        angle_TR = angle_TP.repeat_interleave(2, -1) if self.neighbours else angle_TP.repeat(1, 2)
        cos_TR, sin_TR = (x.to(device=device, dtype=dtype) for x in (angle_TR.cos(), angle_TR.sin()))
        return Rotation(cos_TR, sin_TR, neighbours=self.neighbours)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value; `from_dict` is the inverse."""
        return asdict(self) | {"frequencies": list(self.frequencies)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Rotary:
        """Read the value `to_dict` wrote."""
        return cls(tuple(value["frequencies"]), bool(value["neighbours"]))
