"""Sizes of the queries and keys of low-rank sparse attention. Q: groups of queries and keys, C: width of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from replacement.crosscoder.rotation import Rotary
from replacement.number_checks import number, whole_number


@dataclass(frozen=True, kw_only=True)
class QueryKeys:
    """Sizes of a Lorsa's queries and keys, the same in every layer.

    Raises:
        ValueError: no group, no channel, more rotated channels than there are, or a negative epsilon.
    """

    n_groups: int
    """Groups Q of heads that share queries and keys."""
    width: int
    """Channels C of a query or key."""
    rotary: Rotary | None = None
    """Rotary positions of queries and keys; None for none."""
    norm_epsilon: float | None = None
    """Where queries and keys are divided by their root mean square and multiplied by a gain (Qwen 3, Gemma 3), before they are
    rotated: what is added to the mean square. None for no such norm."""

    def __post_init__(self) -> None:
        whole_number("the number of query-key groups", self.n_groups, least=1)
        whole_number("the width of queries and keys", self.width, least=1)
        if self.rotary is not None and self.rotary.n_channels > self.width:
            raise ValueError(f"queries and keys have {self.width} channels, {self.rotary.n_channels} are to be rotated")
        if self.norm_epsilon is not None:
            number("the epsilon of the norm of queries and keys", self.norm_epsilon)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value; `from_dict` is the inverse."""
        rotary = None if self.rotary is None else self.rotary.to_dict()
        return {
            "n_groups": self.n_groups,
            "width": self.width,
            "rotary": rotary,
            "norm_epsilon": self.norm_epsilon,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> QueryKeys:
        """Read the value `to_dict` wrote.

        Raises:
            ValueError: an entry is missing or of another kind.
        """
        try:
            rotary = None if value["rotary"] is None else Rotary.from_dict(value["rotary"])
            sizes = {name: value[name] for name in ("n_groups", "width", "norm_epsilon")}
        except (KeyError, TypeError) as error:
            raise ValueError(f"cannot read queries and keys from {value!r:.80}: {error!r}") from None
        return cls(**sizes, rotary=rotary)
