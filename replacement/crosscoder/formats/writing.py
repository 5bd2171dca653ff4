"""What writers of layouts share: refusing what a layout cannot say, and writing tensors and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.mapped_file import write_tensors


def check_holds(layout: str, problems: Mapping[str, bool]) -> None:
    """Refuse a crosscoder that a layout has no place for.

    Args:
        problems: what the layout cannot say, and whether the crosscoder has it.

    Raises:
        ValueError: names the first one that it has.
    """
    for problem, is_there in problems.items():
        if is_there:
            raise ValueError(f"the layout {layout} has no place for {problem}")


def common_problems(crosscoder: Crosscoder, *, positions: int | range) -> dict[str, bool]:
    """Problems, for `check_holds`, that all published layouts have: sites of a second model, and positions without features.

    Args:
        positions: how many positions without features the layout can say.
    """
    sites = (*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites)
    n_positions = crosscoder.undecomposed_positions
    fits = n_positions in (positions if isinstance(positions, range) else (positions,))
    return {
        "a second model": any(site.model for site in sites),
        f"{n_positions} positions without features": not fits,
    }


def decoders_by_target(crosscoder: Crosscoder, group: int) -> Tensor:
    """Decoder `[F, W, D]` of a group for all sites that it writes."""
    return torch.stack([crosscoder.decoder(group, site) for site in crosscoder.wiring.writes[group]], dim=1)


def write_named(path: Path, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> None:
    """Write a safetensors file of the tensors that are not None."""
    kept = [(name, value.shape, partial(Tensor.detach, value)) for name, value in tensors.items() if value is not None]
    write_tensors(path, kept, dtype)


def write_json(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as JSON."""
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
