"""Losses by their names in configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replacement.training.jacobian import JacobianMatching
from replacement.training.losses import Auxiliary, L1OfNorms, L2OfNorms, Loss, PreActivation, Tanh
from replacement.training.output_kl import OutputKL
from replacement.training.tables import from_table

_KINDS: tuple[type[Loss], ...] = (L1OfNorms, L2OfNorms, Tanh, PreActivation, Auxiliary, JacobianMatching, OutputKL)
LOSSES: dict[str, type[Loss]] = {kind.name: kind for kind in _KINDS}
"""Every loss besides the reconstruction, by name."""


def loss_from_dict(value: Mapping[str, Any]) -> Loss:
    """Read what `Loss.to_dict` wrote.

    >>> loss_from_dict({"name": "tanh", "coefficient": 1e-3})
    Tanh(coefficient=0.001, c=4.0)

    Raises:
        ValueError: unknown name, a parameter the loss does not have or one it needs, or a value of another type.
    """
    return from_table(value, LOSSES, what="loss", setting="training.losses")
